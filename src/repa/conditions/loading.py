"""The one door to the text encoders. Free of torch until it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

from repa.base.errors import UserError
from repa.base.registry import parse_spec

if TYPE_CHECKING:
    import torch

    from repa.conditions.contract import TextEncoder


def load_text_encoder(
    spec: str, *, weights: str | Path | None = None, device: "str | torch.device" = "cpu"
) -> "TextEncoder":
    """A frozen text encoder, ready to use on `device`.

    Args:
        spec: a name of TEXT_ENCODERS with its settings, as "clip-l" or "t5-xxl:tokens=256", or `package.module.function` of your
            own; function(name, weights) -> TextEncoder.
        weights: a folder as on the hub instead of the encoder's own repository.
        device: where it computes.

    Raises:
        UserError: unknown name; weights missing, damaged or another model's; neither network nor cached weights.
    """
    from repa.conditions import TEXT_ENCODERS
    from repa.conditions.contract import TextEncoder

    weights = Path(weights).expanduser() if weights else None
    if weights is not None and not weights.exists():
        raise UserError(f"weights={weights} for the text encoder {spec} does not exist: give a folder that does.")
    name, _ = parse_spec(TEXT_ENCODERS.check(spec))
    encoder = TEXT_ENCODERS.build(spec)(name, weights)
    if not isinstance(encoder, TextEncoder):
        raise UserError(
            f"The text encoder {spec} must be a repa.conditions.TextEncoder, but {type(encoder).__name__} came back."
        )
    return encoder.to(device).requires_grad_(False).eval()
