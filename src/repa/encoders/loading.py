"""The registry of encoders, and `load_encoder`. Torch is imported only on use."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from repa.base.errors import UserError
from repa.base.registry import Registry
from repa.encoders.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from repa.encoders.contract import VisionEncoder


STEMS = {"dinov2reg": "dinov2-reg", "dinov1": "dino", "jepa": "ijepa"}  # stem in the reference code -> our stem


class EncoderRegistry(Registry):
    """Names of encoders; also accepts the reference code's spellings, such as dinov2-vit-b and clip-vit-L."""

    def target(self, spec: str) -> str:
        return super().target(canonical(spec))

    def check(self, spec: str) -> str:
        return super().check(canonical(spec))


def canonical(spec: str) -> str:
    """dinov2-vit-b -> dinov2-b, dinov2reg-vit-b -> dinov2-reg-b, jepa-vit-h -> ijepa-h; other names are unchanged."""
    name, colon, settings = spec.partition(":")
    stem, _, size = name.partition("-vit-") if "-vit-" in name else name.rpartition("-")
    stem = STEMS.get(stem, stem)
    if stem not in FAMILIES:
        return spec
    return f"{stem}-{size.lower()}{colon}{settings}"


def weights_for(spec: str, pairs: Sequence[str]) -> str | None:
    """The local path of an encoder among strings ENCODER=PATH, or None."""
    for pair in pairs:
        # Split at the last =, because an encoder's settings also contain =.
        encoder, _, path = pair.rpartition("=")
        if canonical(encoder) == canonical(spec):
            return path
    return None


def _checked(pairs: tuple[str, ...]) -> tuple[str, ...]:
    from repa.encoders import ENCODERS

    for pair in pairs:
        encoder, _, path = pair.rpartition("=")
        if not (encoder and path):
            raise UserError(f"Local weights must be written ENCODER=PATH, but got {pair!r}.")
        ENCODERS.check(encoder)
    return pairs


LocalWeights = Annotated[tuple[str, ...], AfterValidator(_checked)]
"""Type of a setting: local weights of encoders, each written ENCODER=PATH."""


def load_encoder(
    spec: str, *, weights: str | Path | None = None, device: "str | torch.device" = "cpu"
) -> "VisionEncoder":
    """A frozen vision encoder, ready to use on `device`.

    Args:
        spec: a name of ENCODERS, or the dotted name of your own function(name, weights) -> VisionEncoder.
        weights: local weights: a folder in the hub's format, or a file (for tiny, and the original checkpoints of
            docs/encoders.md); None: the default weights.
        device: device of the encoder.

    Raises:
        UserError: unknown name; weights are missing, damaged or of another model; no network access and no cached weights.
    """
    from repa.base.frozen import given_weights, load_frozen
    from repa.encoders import ENCODERS
    from repa.encoders.contract import VisionEncoder

    spec = ENCODERS.check(spec)
    return load_frozen(ENCODERS, VisionEncoder, spec, given_weights(weights, f"encoder {spec}"), device)
