"""Classifier-free guidance, in an interval of time and on some channels."""

from collections.abc import Callable

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.diffusion.timesteps import per_sample


def guided(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """null + scale (conditional - null) while t is in the closed interval; conditional elsewhere and for scale 1.

    Inside, the network is called once on the doubled batch [conditional; null]; outside, only on the conditional batch.

    Args:
        predict: (x_t (N, C, H, W), t (N,), labels (N,)) -> output (N, C or 2C, H, W). The second C channels, a learned
            variance, are never guided.
        labels: (N,) classes.
        null_label: the class that means "no class".
        scale: 1 is off, 0 is the unconditional network, above 1 sharpens.
        interval: in our t (0 data, 1 noise): (0, 0.7) leaves the noisiest 30 % of the way unguided.
        channels: guide only the first so many channels (3 is what DiT's and SiT's code does); None or 0 guides all.

    Returns:
        (x_t, t) -> output, for `Denoiser.predict`. With a Python float t, as samplers give, the choice of the batch
        costs no wait for the device. With a tensor each sample is guided by its own time, and the device is waited for.

    Raises:
        UserError: a negative scale, an interval that is none in [0, 1], and, when called, more channels than there are or
            another number of labels than of samples.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"The guidance interval needs 0 <= low <= high <= 1 in t (0 data, 1 noise), but got {low}, {high}."
        )
    if scale < 0 or (channels or 0) < 0:
        raise UserError(f"Guidance scale and channels cannot be negative, but got {scale} and {channels}.")
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])  # (2N,)

    def output(x_t: Tensor, t: float | Tensor) -> Tensor:
        if labels.shape != (len(x_t),):
            raise UserError(f"Labels must have shape ({len(x_t)},), one per sample, but have {tuple(labels.shape)}.")
        if (channels or 0) > x_t.shape[1]:
            raise UserError(f"Guidance on {channels} channels was asked for, but there are only {x_t.shape[1]}.")
        times, inside = per_sample(t, x_t), (t >= low) & (t <= high)
        if scale == 1 or not (inside.any() if isinstance(inside, Tensor) else inside):
            return predict(x_t, times, labels)
        both = predict(torch.cat([x_t, x_t]), torch.cat([times, times]), both_labels)  # (2N, C or 2C, H, W)
        # the difference of two close outputs, times the scale, is no place for half precision
        conditional, null = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2)
        guided_channels = channels or x_t.shape[1]
        difference = (conditional - null)[:, :guided_channels]
        mixed = null[:, :guided_channels] + _strength(scale, inside, x_t) * difference
        return torch.cat([mixed, conditional[:, guided_channels:]], dim=1)

    output.takes_float_time = True
    return output


def _strength(scale: float, inside: bool | Tensor, x_t: Tensor) -> float | Tensor:
    """The scale where guidance is on and 1 (the conditional output) where it is off."""
    if not isinstance(inside, Tensor):
        return scale
    strength = torch.where(inside, scale, 1.0).to(x_t.device)
    return strength.reshape(-1, *[1] * (x_t.ndim - 1))  # (N or 1, 1, 1, 1)
