"""Where an encoder's weights lie, and the network that they make: a folder as on the hub, or an original project's file."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.base import files
from repa.base.errors import UserError
from repa.encoders.families import Family
from repa.encoders.originals import convert, state_dict_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLED = "pytorch_model.bin"  # of hub repositories from before safetensors


class Contents(NamedTuple):
    """What a checkpoint holds, in the hub's names."""

    config: Any
    tensors: dict[str, Tensor]


def locate(name: str, family: Family, size: str, weights: Path | None) -> Path:
    """What was given; else what the user put into the cache folder; else the hub's folder, fetched if need be."""
    if weights is not None:
        return weights
    shelf = files.cache_folder() / "encoders"
    places, by_hand = [shelf / name], []
    if family.hub[size]:
        by_hand.append(
            f"weights=FOLDER (--feature-weights {name}=FOLDER) with {CONFIG} and {WEIGHTS}, or put it in {shelf / name}"
        )
    if family.original:
        places.append(shelf / family.original.file.format(size=size))
        by_hand.append(
            f"weights=FILE (--feature-weights {name}=FILE) with the checkpoint of {family.original.project}, or put it in {places[-1]}"
        )
    for place in places:
        if place.exists():
            return place
    if hub := family.hub[size]:
        return download(name, hub, " or ".join(by_hand))
    raise UserError(f"The weights of the encoder {name} are not on the hub: give {' or '.join(by_hand)}.")


def download(name: str, hub: str, by_hand: str) -> Path:
    """The folder of the hub's cache with the configuration and the weights, fetched when they are not there yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    def both(weights: str, cached: bool) -> Path:
        return [Path(hf_hub_download(hub, file, local_files_only=cached)) for file in (CONFIG, weights)][-1].parent

    for weights in (WEIGHTS, PICKLED):
        try:
            return both(weights, cached=True)  # asks nobody: a machine without a network does not wait for a time-out
        except LocalEntryNotFoundError:
            continue
    try:
        try:
            return both(WEIGHTS, cached=False)
        except LocalEntryNotFoundError:
            raise  # no network
        except EntryNotFoundError:
            return both(PICKLED, cached=False)
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


def weights_file(name: str, family: Family, path: Path) -> Path:
    """The one file with the tensors; raises UserError where `path` is no checkpoint of this family."""
    if path.is_file() and family.original:
        return path
    for wanted in ((CONFIG,), (WEIGHTS, PICKLED)):
        if not any((path / file).is_file() for file in wanted):
            or_file = f", or the file of {family.original.project}" if family.original else ""
            raise UserError(
                f"weights={path} for the encoder {name} must be a folder with {CONFIG} and {WEIGHTS}{or_file}: "
                f"no {wanted[0]}."
            )
    found = files.read_json(path / CONFIG).get("model_type")
    if found not in family.model_types:
        allowed = " or ".join(map(repr, family.model_types))
        raise UserError(f"{path} holds a model of type {found!r}, but the encoder {name} is of type {allowed}.")
    return next(path / file for file in (WEIGHTS, PICKLED) if (path / file).is_file())


def read(name: str, family: Family, path: Path) -> tuple[nn.Module, Path]:
    """The network of `path`, float32, every tensor of it from the file, and that file.

    Raises:
        UserError: the file is damaged, is another model's, or lacks tensors.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    file, model = weights_file(name, family, path), getattr(transformers, family.model)
    try:
        contents = read_original(name, family, file) if file == path else read_folder(family, file)
        net, report = model.from_pretrained(
            None, config=contents.config, state_dict=contents.tensors, dtype=torch.float32, output_loading_info=True,
            **family.build,
        )  # fmt: skip
    except UserError:
        raise
    except (
        SafetensorError, StrictDataclassError, pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError
    ) as error:  # fmt: skip
        fits = f"its {CONFIG}" if file != path else f"the encoder {name}"
        raise UserError(f"{file} is damaged or does not fit {fits}: {str(error).partition(chr(10))[0]}") from error
    if report["missing_keys"]:  # transformers would leave these at random values
        raise UserError(f"{file} lacks weights of the encoder {name}, for example {min(report['missing_keys'])}.")
    if file == path and report["unexpected_keys"]:
        raise UserError(
            f"{file} is another network's: the encoder {name} has no {min(report['unexpected_keys'])}; give the checkpoint "
            f"of {family.original.project}."
        )
    return net, file


def read_folder(family: Family, file: Path) -> Contents:
    """A folder in the hub's format; of a model with more towers, the vision tower."""
    import transformers
    from safetensors.torch import load_file

    config = getattr(transformers, family.model).config_class.from_pretrained(
        file.parent, local_files_only=True, **family.settings
    )
    tensors = load_file(file) if file.name == WEIGHTS else load_pickle(file)
    return Contents(config, {key: value for key, value in tensors.items() if key.startswith(family.subset)} or tensors)


def read_original(name: str, family: Family, file: Path) -> Contents:
    """The original project's checkpoint: its tensors renamed, its configuration read off their shapes."""
    import transformers

    settings, tensors = convert(state_dict_of(load_pickle(file), family.original, name, file), family.original)
    config = getattr(transformers, family.model).config_class(**settings, **family.settings)
    return Contents(config, tensors)


def load_pickle(file: Path) -> dict:
    """A file of torch.save, without running any code of it; training scripts store their arguments as a Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
