"""Location and loading of an encoder's weights: a folder in the hub's format, or an original project's file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repa.base import extras, faults, files
from repa.base.errors import UserError
from repa.base.hub import CONFIG, Repository, found_of
from repa.base.weights import no_larger_than, read_weights, unread_layer
from repa.encoders.families import TORCH_HUB, Family, Original
from repa.encoders.originals import convert_original, state_dict_of

# File names in the hub's format; repositories from before safetensors have pytorch_model.bin.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def repository_of(name: str, family: Family, size: str) -> Repository:
    """The repository of an encoder on the hub, and the alternatives for its error message."""
    hub, original, ways = family.hub[size], family.original_of(size), []
    if hub:
        ways.append((f"weights=FOLDER with {CONFIG} and {WEIGHTS[0]}", _shelf() / name))
    if original:
        ways.append((f"weights=FILE, the checkpoint of {original.project}", _shelf() / original.file))
    what, places = (" or ".join(map(str, each)) for each in zip(*ways, strict=True))
    by_hand = f"give {what} (--feature-weights {name}=PATH), or put it at {places}"
    return Repository(f"encoder {name}", hub or "", ((CONFIG,), WEIGHTS), by_hand)


def locate_weights(name: str, family: Family, size: str, weights: Path | None) -> Path:
    """The given weights, else those on this machine, else the hub's, which are downloaded."""
    if found := weights or on_this_machine(name, family, size):
        return found
    repository = repository_of(name, family, size)
    if not repository.name:
        raise UserError(f"The weights of the encoder {name} are not on the hub: {repository.by_hand}.")
    return repository.fetched()


def on_this_machine(name: str, family: Family, size: str) -> Path | None:
    """The weights in the cache folder, else in the caches of the hub or of the project's code; without network access."""
    repository, original = repository_of(name, family, size), family.original_of(size)
    for place in (name, *([original.file] if original else [])):
        if (path := _shelf() / place).exists():
            return path
    if repository.name and (folder := repository.cached()):
        return folder
    return file if original and (file := kept(original)).is_file() else None


def _shelf() -> Path:
    """The folder for manually downloaded weights."""
    return files.cache_folder() / "encoders"


def kept(original: Original) -> Path:
    """The path at which the project's own code stores the file."""
    if original.kept == TORCH_HUB:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
    else:
        folder = Path.home() / original.kept if original.kept else _shelf()
    return folder / original.file


def read(name: str, family: Family, size: str, path: Path) -> tuple[nn.Module, Path]:
    """The network of `path` in float32, with every tensor from the file, and that file.

    Raises:
        UserError: the file is damaged, belongs to another model, or lacks tensors.
    """
    from huggingface_hub.errors import StrictDataclassError

    transformers = extras.need("transformers", f"The encoder {name}")

    original, file, model = family.original_of(size), path, getattr(transformers, family.model)
    # A folder in the hub's format always has the hub's tensor names.
    if not (path.is_file() and original):
        repository_of(name, family, size).check(path, family.model_types)
        original, (file,) = None, found_of(WEIGHTS, path)
    try:
        with faults.reading(file, f"weights of the encoder {name}", "Download or copy it again."):
            config, tensors = _contents(name, family, original, file, model.config_class)
        with no_larger_than([file], file if original else file.parent / CONFIG):
            model(config, **family.build)
        net, report = model.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True, **family.build
        )
    except UserError:
        raise
    except (
        StrictDataclassError,
        RuntimeError,
        ValueError,
        TypeError,
        ArithmeticError,
        AttributeError,
        LookupError,
    ) as error:
        fits = f"the encoder {name}" if original else f"its {CONFIG}"
        raise UserError(f"{file} does not fit {fits}: {str(error).partition(chr(10))[0]}") from error
    # transformers only warns about missing weights and fills them with random values: the target would be noise.
    if report["missing_keys"]:
        raise UserError(
            f"{file} lacks weights of the encoder {name}, for example {min(report['missing_keys'])}: download or copy it again."
        )
    if spare := unread_layer(report["unexpected_keys"], net):
        raise UserError(
            f"{file} has {spare}, but its {CONFIG} describes a smaller network: download or copy both again."
        )
    # A folder of the hub may also hold a text tower or a decoder. The tensors of a project's own file were renamed, so any
    # others belong to another network.
    if original and report["unexpected_keys"]:
        raise UserError(
            f"{file} belongs to another network: the encoder {name} has no {min(report['unexpected_keys'])}. Give the checkpoint "
            f"of {original.project}."
        )
    return net, file


def _contents(
    name: str, family: Family, original: Original | None, file: Path, config_class: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of a checkpoint, in the hub's names."""
    tensors = read_weights(file)
    if original:  # the file has no configuration: it follows from the shapes
        settings, tensors = convert_original(state_dict_of(tensors, original, name, file), original)
        return config_class(**settings, **family.settings), tensors
    # return_dict, because a config.json may ask for tuples
    config = config_class.from_pretrained(file.parent, local_files_only=True, return_dict=True, **family.settings)
    # A model with several towers: only the vision tower is used.
    return config, {key: value for key, value in tensors.items() if key.startswith(family.subset)} or tensors
