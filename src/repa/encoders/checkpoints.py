"""Where an encoder's weights lie, and the network that they make: a folder as on the hub, or an original project's file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repa.base import extras, faults, files
from repa.base.errors import UserError
from repa.base.hub import CONFIG, Repository, found_of
from repa.base.weights import no_larger_than, read_weights
from repa.encoders.families import TORCH_HUB, Family, Original
from repa.encoders.originals import convert_original, state_dict_of

# In a folder as on the hub; pytorch_model.bin is of repositories from before safetensors.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def repository_of(name: str, family: Family, size: str) -> Repository:
    """Where an encoder lies on the hub, and what to give instead."""
    hub, original, ways = family.hub[size], family.original_of(size), []
    if hub:
        ways.append((f"weights=FOLDER with {CONFIG} and {WEIGHTS[0]}", _shelf() / name))
    if original:
        ways.append((f"weights=FILE, the checkpoint of {original.project}", _shelf() / original.file))
    what, places = (" or ".join(map(str, each)) for each in zip(*ways, strict=True))
    by_hand = f"give {what} (--feature-weights {name}=PATH), or put it at {places}"
    return Repository(f"encoder {name}", hub or "", ((CONFIG,), WEIGHTS), by_hand)


def locate_weights(name: str, family: Family, size: str, weights: Path | None) -> Path:
    """What was given, else what is on this machine, else the hub's, which is fetched."""
    if found := weights or on_this_machine(name, family, size):
        return found
    repository = repository_of(name, family, size)
    if not repository.name:
        raise UserError(f"The weights of the encoder {name} are not on the hub: {repository.by_hand}.")
    return repository.fetched()


def on_this_machine(name: str, family: Family, size: str) -> Path | None:
    """What the cache folder holds, else the caches of the hub and of the project's own code; asks no network."""
    repository, original = repository_of(name, family, size), family.original_of(size)
    for place in (name, *([original.file] if original else [])):
        if (path := _shelf() / place).exists():
            return path
    if repository.name and (folder := repository.cached()):
        return folder
    return file if original and (file := kept(original)).is_file() else None


def _shelf() -> Path:
    """Where weights that were fetched by hand are looked for."""
    return files.cache_folder() / "encoders"


def kept(original: Original) -> Path:
    """Where the project's own code would keep the file."""
    if original.kept == TORCH_HUB:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
    else:
        folder = Path.home() / original.kept if original.kept else _shelf()
    return folder / original.file


def read(name: str, family: Family, size: str, path: Path) -> tuple[nn.Module, Path]:
    """The network of `path`, float32, every tensor of it from the file, and that file.

    Raises:
        UserError: the file is damaged, is another model's, or lacks tensors.
    """
    from huggingface_hub.errors import StrictDataclassError

    transformers = extras.need("transformers", f"The encoder {name}")

    original, file, model = family.original_of(size), path, getattr(transformers, family.model)
    # A folder in the hub's format has the hub's names, whichever project trained the network.
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
    except (StrictDataclassError, RuntimeError, ValueError, TypeError) as error:
        fits = f"the encoder {name}" if original else f"its {CONFIG}"
        raise UserError(f"{file} does not fit {fits}: {str(error).partition(chr(10))[0]}") from error
    # transformers fills missing weights with random values and only warns: an alignment target would be noise.
    if report["missing_keys"]:
        raise UserError(
            f"{file} lacks weights of the encoder {name}, for example {min(report['missing_keys'])}: download or copy it again."
        )
    # A folder of the hub may hold a text tower or a decoder besides; a project's own file was renamed by us, so
    # what is left over belongs to another network.
    if original and report["unexpected_keys"]:
        raise UserError(
            f"{file} is another network's: the encoder {name} has no {min(report['unexpected_keys'])}; give the checkpoint "
            f"of {original.project}."
        )
    return net, file


def _contents(
    name: str, family: Family, original: Original | None, file: Path, config_class: Any
) -> tuple[Any, dict[str, Tensor]]:
    """What a checkpoint holds, in the hub's names: the network's configuration and its tensors."""
    tensors = read_weights(file)
    if original:  # no configuration lies beside the file: it is read off the shapes
        settings, tensors = convert_original(state_dict_of(tensors, original, name, file), original)
        return config_class(**settings, **family.settings), tensors
    config = config_class.from_pretrained(file.parent, local_files_only=True, **family.settings)
    # Of a model with more towers, the vision tower.
    return config, {key: value for key, value in tensors.items() if key.startswith(family.subset)} or tensors
