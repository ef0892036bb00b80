"""The one door to the encoders. Free of torch until it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

from repa.base.errors import UserError
from repa.base.registry import Registry, parse_spec

if TYPE_CHECKING:
    import torch

    from repa.encoders.contract import VisionEncoder


class EncoderRegistry(Registry):
    """Names of encoders; the reference code's spellings, dinov2-vit-b and dinov2reg-vit-b, are understood too."""

    def target(self, spec: str) -> str:
        return super().target(canonical(spec))

    def check(self, spec: str) -> str:
        return super().check(canonical(spec))


def canonical(spec: str) -> str:
    """dinov2-vit-b -> dinov2-b, dinov2reg-vit-b -> dinov2-reg-b; anything else as it is."""
    if not spec.startswith("dinov2"):
        return spec
    return spec.replace("dinov2reg", "dinov2-reg", 1).replace("-vit-", "-", 1)


def load_encoder(
    spec: str, *, weights: str | Path | None = None, device: "str | torch.device" = "cpu"
) -> "VisionEncoder":
    """A frozen vision encoder, ready to use on `device`.

    Args:
        spec: a name of ENCODERS, or `package.module.function` of your own; function(name, weights) -> VisionEncoder.
        weights: local weights instead of the encoder's own: a folder as on the hub (DINOv2), or a file (tiny).
        device: where it computes.

    Raises:
        UserError: unknown name; weights missing, damaged or another model's; neither network nor cached weights.
    """
    from repa.encoders import ENCODERS
    from repa.encoders.contract import VisionEncoder

    spec = ENCODERS.check(spec)
    if weights is not None and not Path(weights).exists():
        raise UserError(f"weights={weights} for the encoder {spec} does not exist.")
    name, _ = parse_spec(spec)
    encoder = ENCODERS.build(spec)(name, None if weights is None else Path(weights))
    if not isinstance(encoder, VisionEncoder):
        raise UserError(
            f"The encoder {spec} must be a repa.encoders.VisionEncoder, but {type(encoder).__name__} came back."
        )
    return encoder.to(device)
