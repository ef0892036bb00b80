"""Where an encoder's weights lie, and the network that they make: a folder as on the hub, or an original project's file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repa.base import extras, faults, files, trust
from repa.base.errors import UserError
from repa.base.weights import read_weights
from repa.encoders.families import TORCH_HUB, Family, Original
from repa.encoders.originals import convert_original, state_dict_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLED = "pytorch_model.bin"  # of hub repositories from before safetensors


def locate_weights(name: str, family: Family, size: str, weights: Path | None) -> Path:
    """What was given, else what is on this machine, else the hub's, which is fetched."""
    if found := weights or on_this_machine(name, family, size):
        return found
    shelf, hub, original = _shelf(), family.hub[size], family.original_of(size)
    by_hand = []
    if hub:
        by_hand.append(
            f"weights=FOLDER (--feature-weights {name}=FOLDER) with {CONFIG} and {WEIGHTS}, or put it in {shelf / name}"
        )
    if original:
        by_hand.append(
            f"weights=FILE (--feature-weights {name}=FILE) with the checkpoint of {original.project}, or put it in "
            f"{shelf / original.file}"
        )
    if hub:
        return download(name, hub, " or ".join(by_hand))
    raise UserError(f"The weights of the encoder {name} are not on the hub: give {' or '.join(by_hand)}.")


def on_this_machine(name: str, family: Family, size: str) -> Path | None:
    """What the cache folder holds, else the caches of the hub and of the project's own code; asks no network."""
    hub, original = family.hub[size], family.original_of(size)
    for place in (name, *([original.file] if original else [])):
        if (path := _shelf() / place).exists():
            return path
    if hub and (folder := cached(hub)):
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


def cached(hub: str) -> Path | None:
    """The folder of the hub's cache, when it holds both files. Asks nobody: without a network nothing waits for a time-out."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in (WEIGHTS, PICKLED):
        try:
            return _folder_of(hub, weights, local_files_only=True)
        except LocalEntryNotFoundError:
            continue
    return None


def _folder_of(hub: str, weights: str, local_files_only: bool) -> Path:
    """The folder of the hub's cache with the configuration and the weights."""
    from huggingface_hub import hf_hub_download

    found = [hf_hub_download(hub, file, local_files_only=local_files_only) for file in (CONFIG, weights)]
    return Path(found[-1]).parent


def download(name: str, hub: str, by_hand: str) -> Path:
    """The folder of the hub's cache with the configuration and the weights, fetched."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            return _folder_of(hub, WEIGHTS, local_files_only=False)
        # An EntryNotFoundError too, but it says that there is no network, not that the repository has no such file.
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return _folder_of(hub, PICKLED, local_files_only=False)
    except GatedRepoError as error:
        raise UserError(
            f"The weights of the encoder {name} ({hub}) are given only to those who accepted their licence: accept it on "
            f"the hub's page and log in (hf auth login), or give {by_hand}."
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"The weights of the encoder {name} ({hub}) are not on this machine and the hub cannot be reached: "
            f"run once with a network, or give {by_hand}."
        ) from error


def weights_file(name: str, family: Family, original: Original | None, path: Path) -> Path:
    """The one file with the tensors; raises UserError if `path` is not a checkpoint of this family."""
    if path.is_file() and original:
        return path
    for wanted in ((CONFIG,), (WEIGHTS, PICKLED)):
        if not any((path / file).is_file() for file in wanted):
            or_file = f", or the file of {original.project}" if original else ""
            raise UserError(
                f"weights={path} for the encoder {name} must be a folder with {CONFIG} and {WEIGHTS}{or_file}: "
                f"no {wanted[0]}."
            )
    config = files.read_object(path / CONFIG)
    # Before transformers reads it: some keys of a config.json make it fetch code or build other networks.
    trust.require_plain_model(config, path / CONFIG)
    found = config.get("model_type")
    if found not in family.model_types:
        allowed = " or ".join(map(repr, family.model_types))
        raise UserError(
            f"{path} holds a model of type {found!r}, but the encoder {name} is of type {allowed}: give its own folder."
        )
    return next(path / file for file in (WEIGHTS, PICKLED) if (path / file).is_file())


def read(name: str, family: Family, size: str, path: Path) -> tuple[nn.Module, Path]:
    """The network of `path`, float32, every tensor of it from the file, and that file.

    Raises:
        UserError: the file is damaged, is another model's, or lacks tensors.
    """
    from huggingface_hub.errors import StrictDataclassError

    transformers = extras.need("transformers", f"The encoder {name}")

    original = family.original_of(size)
    file, model = weights_file(name, family, original, path), getattr(transformers, family.model)
    # A folder in the hub's format has the hub's names, whichever project trained the network.
    if file != path:
        original = None
    try:
        with faults.reading(file, f"weights of the encoder {name}", "Download or copy it again."):
            config, tensors = _contents(name, family, original, file, model.config_class)
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
