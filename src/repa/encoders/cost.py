"""Parameters and FLOPs of vision encoders; those of the table without their weights."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from repa.base import extras
from repa.base.cost import Cost, cost_of
from repa.encoders.contract import VisionEncoder
from repa.encoders.families import SIZES, family_of, names
from repa.encoders.loading import canonical, load_encoder
from repa.encoders.vit import ViTEncoder


class EncoderCost(NamedTuple):
    """Of one image."""

    dim: int
    """Width of its tokens."""
    cost: Cost


def encoder_cost(spec: str, grid: int, weights: str | Path | None = None) -> EncoderCost:
    """What an encoder costs on a token grid of `grid`.

    An encoder that is not in the table of vision transformers is loaded for it.

    Raises:
        UserError: it cannot be loaded.
    """
    spec = canonical(spec)
    encoder = (_outline(spec, grid) if spec in names() else load_encoder(spec, weights=weights)).to("meta")
    side = grid * encoder.patch_size
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=next(encoder.net.parameters()).dtype)
    return EncoderCost(encoder.dim, cost_of(encoder.net, lambda: encoder.extract(pixels, grid).patches))


def _outline(spec: str, grid: int) -> VisionEncoder:
    """An encoder of the table on the meta device."""
    transformers = extras.need("transformers", f"The cost of the encoder {spec}")
    family, size = family_of(spec)
    dim, depth, heads = SIZES[size]
    settings: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim,
        "patch_size": family.patch, "image_size": grid * family.patch, "num_register_tokens": family.registers,
        "use_swiglu_ffn": size == "g", **family.settings,
    }  # fmt: skip
    network = getattr(transformers, family.model)
    with torch.device("meta"):
        net = network(network.config_class(**settings), **family.build)
    return ViTEncoder(net, family, spec, Path(spec))
