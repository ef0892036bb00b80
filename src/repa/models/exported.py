"""Exported networks: folders with config.json, model.safetensors and a model card, which load without a run folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa.base import faults, files
from repa.base.config import Config
from repa.base.errors import UserError
from repa.base.weights import digest_of
from repa.models.dit import DiT
from repa.models.published import check_values, constructor_arguments, misfit

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHECKSUM = "sha256"  # of the weights, see `digest_of`
FORMAT = 1  # increased by changes that older readers would misunderstand

Side = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ExtraArguments(Config):
    """Arguments of `DiT` that its weights do not determine, from an untrusted file."""

    num_heads: Side
    latent_size: Side | tuple[Side, Side]
    separate_times: bool = False
    patch_overlap: int = Field(0, ge=0, le=1_024)
    # As models.config.Route.
    route: (
        tuple[Side, Side, Fraction, Annotated[int, Field(ge=0, le=1_024)], Literal["identity", "fuse"], Fraction] | None
    ) = None


def save_exported(
    folder: Path, state: Mapping[str, Tensor], arguments: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write weights and configuration: `arguments` of DiT, and `facts` for the user."""
    config = {"library": "repa", "format": FORMAT, "model": dict(arguments), **facts, CHECKSUM: digest_of(state)}
    files.write_sealed(folder / CONFIG, config)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def load_exported(folder: str | Path) -> DiT:
    """The network of a folder of `repa export`, on the CPU, frozen and in eval mode.

    Raises:
        UserError: no such folder, another format, or weights that are damaged or of another network.
    """
    config, state = read_exported(folder)
    model = DiT(**config["model"])
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def read_exported(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict of DiT) of an exported folder, checked for consistency; errors as in load_exported."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is not an exported network: it has no {CONFIG}. Give the OUT folder of `repa export`."
        )
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("library") != "repa" or config.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} does not have repa's export format {FORMAT}: export the network again.")
    where = folder / CONFIG
    given = files.read_object(where, model=dict)["model"]
    extra = ExtraArguments.parse(
        {name: given[name] for name in ExtraArguments.model_fields if name in given}, where=str(where)
    )
    with faults.reading(folder / WEIGHTS, "a safetensors file", "Restore it from a copy."):
        state = load_file(folder / WEIGHTS)
    with faults.reading(where, "the description of a DiT"):
        arguments = constructor_arguments(state, extra.num_heads, extra.patch_overlap)
        arguments |= extra.model_dump(exclude_unset=True)
        # Nothing of the size that the file claims is allocated: shapes are compared on the meta device.
        problem = misfit(state, arguments)
    plain = json.loads(json.dumps(arguments))
    lies = [
        f"its {name} is {value!r:.80}" for name, value in given.items() if name not in plain or value != plain[name]
    ]
    if problem or lies:
        raise UserError(
            f"{folder / WEIGHTS} does not fit the network of {CONFIG}: {problem or lies[0]}. Restore both from one copy."
        )
    config["model"] = arguments
    check_values(state, str(folder / WEIGHTS))
    require_digest(config, state, folder / WEIGHTS)
    return config, state


def require_digest(facts: Mapping[str, Any], state: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError unless the weights match the checksum in `facts`."""
    if CHECKSUM not in facts:
        raise UserError(
            f"{file} cannot be verified: the export has no {CHECKSUM} of its weights, which `repa export` writes. "
            "Export the network again."
        )
    if facts[CHECKSUM] != digest_of(state):
        raise UserError(f"{file} is damaged: its weights do not match their checksum. Restore it from a copy.")
