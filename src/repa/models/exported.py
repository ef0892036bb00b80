"""An exported network: a folder with config.json, model.safetensors and a model card, loaded without a run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError
from repa.models.dit import DiT

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1  # raised when an older reader would misunderstand the folder


def save_exported(
    folder: Path, state: Mapping[str, Tensor], arguments: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write weights and configuration: `arguments` are those of DiT, `facts` whatever else a reader should know."""
    config = {"library": "repa", "format": FORMAT, "model": dict(arguments), **facts}
    files.write_json(folder / CONFIG, config)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def load_exported(folder: str | Path) -> DiT:
    """The network of a folder that `repa export` wrote, on the CPU, frozen and in eval mode.

    Raises:
        UserError: no such folder, another format, or weights that are damaged or of another network.
    """
    config, state = read_exported(folder)
    model = DiT(**config["model"])
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def read_exported(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict of DiT) of an exported folder, checked against each other; errors as in load_exported."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no exported network: it has no {CONFIG}. Give the OUT folder of a `repa export`.")
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("library") != "repa" or config.get("format") != FORMAT:
        raise UserError(
            f"{folder / CONFIG} is not of format {FORMAT} of repa: it cannot be loaded as an exported network."
        )
    try:
        state = load_file(folder / WEIGHTS)
        wanted = {key: value.shape for key, value in _on_meta(config["model"]).state_dict().items()}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded as an exported network: {str(error).splitlines()[0]}.") from error
    if {key: value.shape for key, value in state.items()} != wanted:
        raise UserError(f"{folder / WEIGHTS} holds the weights of another network than {CONFIG} describes.")
    return config, state


def _on_meta(arguments: Mapping[str, Any]) -> DiT:
    with torch.device("meta"):
        return DiT(**arguments)
