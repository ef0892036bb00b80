"""The registry of encoders, and `load_encoder`. Torch is imported only on use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from repa.base.errors import UserError, require_type
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
    require_type(spec, str, "An encoder is named by a text such as 'dinov2-b'")
    name, colon, settings = spec.partition(":")
    stem, _, size = name.partition("-vit-") if "-vit-" in name else name.rpartition("-")
    stem = STEMS.get(stem, stem)
    if stem not in FAMILIES:
        return spec
    return f"{stem}-{size.lower()}{colon}{settings}"


def by_encoder(given: Any) -> Any:
    """A mapping, or words ENCODER=VALUE, as {canonical name: value}; a word without ENCODER= has the key ""."""
    if not isinstance(given, (dict, list, tuple)):
        return given  # which the type refuses
    # Split at the last =, because an encoder's settings also contain =.
    pairs = given.items() if isinstance(given, dict) else [str(word).rpartition("=")[::2] for word in given]
    values: dict[str, Any] = {}
    for encoder, value in pairs:
        name = canonical(str(encoder))
        if values.setdefault(name, value) != value:
            whom = name or "all encoders, because neither is written ENCODER=VALUE"
            raise UserError(f"{values[name]!r} and {value!r} are both for {whom}: leave one out.")
    return values


def _checked(weights: dict[str, str]) -> dict[str, str]:
    from repa.encoders import ENCODERS

    for encoder, path in weights.items():
        if not (encoder and path):
            raise UserError(f"Local weights must be written ENCODER=PATH, but got {encoder or path!r}.")
        ENCODERS.check(encoder)
    return weights


ByEncoder = Annotated[dict[str, str], BeforeValidator(by_encoder)]
"""Type of a setting with one value per encoder; on the command line words ENCODER=VALUE."""
LocalWeights = Annotated[ByEncoder, AfterValidator(_checked)]
"""Type of a setting: encoder -> path of its local weights."""


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
    from repa.base.pretrained import given_weights, load_frozen
    from repa.encoders import ENCODERS
    from repa.encoders.contract import VisionEncoder

    spec = ENCODERS.check(spec)
    return load_frozen(ENCODERS, VisionEncoder, spec, given_weights(weights, f"encoder {spec}"), device)
