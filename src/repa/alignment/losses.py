"""Eq. 8 and related losses: resampling and normalisation of tokens, and losses (N,); the paper's loss is their mean.

Tokens are row-major, (N, rows * columns, F): N images, T tokens, F width, h heads, M images of all processes. A loss of the
whole batch returns the same number for each image. `Alignment` disables autocast around these functions: in half precision
the norms under- or overflow, which is a known source of NaN.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from repa.base import dist
from repa.base.device import at_least_float32
from repa.base.errors import UserError
from repa.base.registry import declared
from repa.models.layers import grid_side


def compares_images(always: Callable[..., bool] | bool = True) -> Callable:
    """Declare that a loss compares images of the batch, always or for some of its settings.

    Such a loss is refused with gradient accumulation, which splits the batch. A private loss declares it with
    `loss.compares_images = True`.
    """

    def declare(loss: Callable) -> Callable:
        loss.compares_images = always  # type: ignore[attr-defined]  # a function may have any
        return loss

    return declare


def compares_relations(loss: Callable) -> Callable:
    """Declare that a loss compares only relations between tokens, so that student and target may differ in width."""
    loss.compares_relations = True  # type: ignore[attr-defined]  # a function may have any
    return loss


def compares_frames(always: Callable[..., bool] | bool = True) -> Callable:
    """Declare that a loss compares the frames of a video, always or for some of its settings: `attach` then passes the tokens of
    all frames, (N, frames * P, F), at once."""

    def declare(loss: Callable) -> Callable:
        loss.compares_frames = always  # type: ignore[attr-defined]  # a function may have any
        return loss

    return declare


def compares(what: Literal["images", "frames"], loss: Callable) -> bool:
    """Whether a loss with bound settings compares images of the batch, or frames of a video."""
    always = declared(loss, f"compares_{what}")
    return always(**getattr(loss, "keywords", {})) if callable(always) else bool(always)


def cosine(
    student: Tensor, target: Tensor, *, axis: Literal["channels", "tokens"] = "channels", margin: NonNegativeFloat = 0.0
) -> Tensor:
    """Eq. 8 with the negative cosine similarity: (N, T, F), (N, T, F) -> (N,) in [-1, 1].

    Args:
        axis: channels compares the vectors of tokens. tokens compares, for each channel, its values over the tokens, which
            reproduces a default argument of SRA's released code.
        margin: a cosine above 1 - margin counts as 1 - margin (0.5 in VA-VAE, arXiv 2501.01423).
    """
    dim = -1 if axis == "channels" else 1
    cosines = (_unit_vectors(student, dim) * _unit_vectors(target, dim)).sum(dim)  # (N, T), or (N, F)
    # Rounding can push a cosine above 1: clamped at 1, it would lose its gradient.
    return -(cosines.clamp(max=1 - margin) if margin else cosines).mean(-1)  # (N,)


@compares_images()
def nt_xent(student: Tensor, target: Tensor, *, temperature: PositiveFloat = 0.07) -> Tensor:
    """Eq. 8 with a normalised temperature-scaled cross entropy: (N, T, F), (N, T, F) -> (N,), at least 0.

    For image n and token position p, with unit vectors h (student) and y (target):

        loss[n] = -mean_p log( exp(h[n,p] . y[n,p] / temperature) / sum_m exp(h[n,p] . y[m,p] / temperature) )

    The paper does not define the negatives of NT-Xent. Here they are the patches at the SAME position in the other images
    of the global batch. Patches of the same image are excluded: neighbours show the same object and would be false
    negatives, and comparing all N*T patches would need (N*T)^2 logits. This needs N*M*T:
    64 MiB in float32 for 256 images of 256 tokens in one process.

    Only targets are gathered from other processes, and they need no gradient. With gradients averaged over processes, as in
    DDP, the result equals that of one process with the full batch. Every process must have the same N.

    Raises:
        UserError: the global batch has one image, hence no negative.
    """
    own, others = _unit_vectors(student), dist.gather(_unit_vectors(target))  # (N, T, F), (M, T, F)
    (num_images, num_tokens, _), num_candidates = own.shape, len(others)
    if num_candidates < 2:
        raise UserError(
            "The loss 'nt_xent' contrasts images of a batch and needs at least 2, but got 1: raise the batch size."
        )
    logits = torch.einsum("npf,mpf->npm", own, others) / temperature  # (N, T, M)
    positive = dist.rank() * num_images + torch.arange(num_images, device=logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), positive.repeat_interleave(num_tokens), reduction="none")  # (N * T,)
    return losses.view(num_images, num_tokens).mean(-1)  # (N,)


def smooth_l1(student: Tensor, target: Tensor, *, beta: PositiveFloat = 0.05) -> Tensor:
    """Quadratic below `beta`, linear above, mean over tokens and channels: (N, T, F) twice -> (N,) (SRA, arXiv 2505.02831)."""
    return F.smooth_l1_loss(student, target, beta=beta, reduction="none").flatten(1).mean(1)


def mse(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over tokens and channels: (N, T, F) twice -> (N,)."""
    return (student - target).square().flatten(1).mean(1)


@compares_relations
@compares_images(lambda scope="sample", **_: scope == "batch")
@compares_frames(lambda scope="sample", **_: scope == "clip")
def gram(
    student: Tensor, target: Tensor, *, norm: Literal["mse", "l1", "relu"] = "mse", margin: NonNegativeFloat = 0.0,
    scope: Literal["sample", "clip", "batch"] = "sample",
) -> Tensor:  # fmt: skip
    """Difference between the cosines of the student's tokens and those of the target's: (N, T, F), (N, T, G) -> (N,).

    With S(u)[i, j] = cos(u_i, u_j) and d = S(student) - S(target), the mean over all pairs of norm(d). Widths may differ.
    U-REPA (arXiv 2503.18414) uses mse, VideoREPA's token relation distillation (arXiv 2505.23656) l1 with margin 0.1.

    Args:
        norm: mse is d^2, l1 is |d|, relu is max(d, 0): only similarities that exceed the target's count.
        margin: |d| (for relu, d) up to this value has no loss.
        scope: sample compares the tokens of an image or frame; clip those of all frames of a video, as VideoREPA does, (frames P)^2
            pairs; batch those of all images of all processes, (M T)^2 pairs.
    """
    own, wanted = _unit_vectors(student), _unit_vectors(target)  # (N, T, F), (N, T, G)
    if scope == "batch":
        # With gradient, unlike in nt_xent: here both members of a pair are student tokens.
        all_own, all_wanted = (dist.gather_with_gradient(x).flatten(0, 1) for x in (own, wanted))  # (M T, F)
        difference = own @ all_own.T - wanted @ all_wanted.T  # (N, T, M T)
    else:
        difference = own @ own.mT - wanted @ wanted.mT  # (N, T, T)
    excess = difference if norm == "relu" else difference.abs()
    excess = (excess - margin).relu() if margin or norm == "relu" else excess
    return (excess.square() if norm == "mse" else excess).flatten(1).mean(1)


@compares_frames()
def crepa(
    student: Tensor,
    target: Tensor,
    *,
    frames: PositiveInt,
    distance: NonNegativeInt = 1,
    temperature: PositiveFloat = 1.0,
    normalize: bool = False,
    cumulative: bool = True,
) -> Tensor:
    """CREPA (arXiv 2506.09229), for videos: aligns a frame's tokens with the features of this frame and its neighbours.

        loss = -mean_i sum_{|i - j| <= distance} exp(-|i - j| / temperature) mean_p cos(student[i, p], target[j, p])

    (N, frames * P, F) twice, frame by frame -> (N,). With `normalize` the weights of a frame sum to 1; the paper's do not.
    Unless `cumulative`, neighbours closer than `distance` are left out.
    """
    if student.shape[1] % frames:
        raise UserError(
            f"The loss 'crepa' needs a number of frames that divides the {student.shape[1]} tokens, but got {frames}: set frames=."
        )
    own, wanted = (_unit_vectors(x).unflatten(1, (frames, -1)) for x in (student, target))  # (N, frames, P, F)
    cosines = torch.einsum("nipf,njpf->nij", own, wanted) / own.shape[2]  # (N, frames, frames)
    places = torch.arange(frames, device=student.device)
    apart = (places[:, None] - places).abs().to(own.dtype)
    seen = apart <= distance if cumulative else (apart == distance) | (apart == 0)
    weights = torch.where(seen, (-apart / temperature).exp(), 0.0)
    if normalize:
        weights = weights / weights.sum(1, keepdim=True)
    return -(weights * cosines).sum((1, 2)) / frames  # (N,)


def attention_ce(student: Tensor, target: Tensor, *, heads: PositiveInt = 12) -> Tensor:
    """HASTE (arXiv 2505.16792): cross entropy of the student's attention with the target's, logits (N, h, T, T) -> (N,).

    The mean over queries and over the first `heads` heads of both, or fewer if one has fewer. Logits include the factor
    head_dim^-0.5.
    """
    if student.ndim != 4 or student.shape[2:] != target.shape[2:]:
        raise UserError(
            f"The loss 'attention_ce' needs logits (N, h, T, T) on the same grid, but got {tuple(student.shape)} and "
            f"{tuple(target.shape)}: use the tap attention and a target with part=attention."
        )
    heads = min(heads, student.shape[1], target.shape[1])
    wanted = target[:, :heads].softmax(-1)
    return -(wanted * student[:, :heads].log_softmax(-1)).sum(-1).mean((1, 2))  # (N,)


@compares_images()
def dispersive(
    student: Tensor, target: None = None, *, temperature: PositiveFloat = 0.5, normalize: bool = False,
    scope: Literal["global", "device"] = "global",
) -> Tensor:  # fmt: skip
    """Dispersive loss (arXiv 2506.09027): (N, T, D) -> (N,), the same number for each image.

        log mean_ij exp(-|z_i - z_j|^2 / (T D temperature)),   z the tokens of an image as one vector, i = j included

    The squared distance is divided by the number of elements, so that one temperature suits networks of any size; with
    `normalize` the vectors have unit length instead. The authors' PyTorch code uses temperature 1, their paper 0.5.

    Args:
        scope: global disperses the images of all processes, device those of each process separately.
    """
    own = student.flatten(1)  # (N, T D)
    own = F.normalize(own, dim=1) if normalize else own * own.shape[1] ** -0.5
    others = dist.gather_with_gradient(own) if scope == "global" else own  # (M, T D)
    # Centring keeps the distances, and the difference of squares below loses fewer digits.
    others = others - others.mean(0)
    squares = others.square().sum(1)  # (M,)
    # A product instead of (M, M, T D) differences, which do not fit in memory; rounding can make a distance negative.
    distances = (squares[:, None] + squares - 2 * others @ others.T).clamp_min(0)  # (M, M)
    return (-distances / temperature).exp().mean().log().expand(len(student))


def _unit_vectors(x: Tensor, dim: int = -1) -> Tensor:
    return F.normalize(at_least_float32(x), dim=dim)


def resize_tokens(
    tokens: Tensor, num_tokens: int, grid: tuple[int, int] | None = None, own: tuple[int, int] | None = None
) -> Tensor:
    """Resample a row-major token grid to another: (N, M, F) -> (N, num_tokens, F), the same tensor when M fits.

    A smaller grid uses the mean over the area of each new token; a larger one is interpolated bilinearly.

    Args:
        grid: (rows, columns) to resample to; None: a square of `num_tokens`.
        own: (rows, columns) of the tokens; None: the aspect ratio of `grid`, or a square.

    Raises:
        UserError: the grids differ and one has no shape.
    """
    if tokens.shape[1] == num_tokens:
        return tokens
    if num_tokens == 1:  # the mean, for any grid
        return tokens.mean(1, keepdim=True)
    new = grid or (grid_side(num_tokens),) * 2
    old = own or grid_like(tokens.shape[1], new)
    image = tokens.transpose(1, 2).unflatten(2, old)  # (N, F, rows, columns)
    # Bilinear would skip tokens of a grid more than twice as large. Neither changes a side that stays the same.
    image = F.interpolate(image, size=[*map(min, old, new)], mode="area")
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)  # (N, T, F)


def grid_like(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `num_tokens` tokens with the aspect ratio of `grid`; raises UserError if there is no such grid."""
    rows = math.isqrt(num_tokens * grid[0] // grid[1])
    if rows and rows * (num_tokens // rows) == num_tokens and rows * grid[1] == (num_tokens // rows) * grid[0]:
        return rows, num_tokens // rows
    side = grid_side(num_tokens)
    return side, side


def identity(tokens: Tensor) -> Tensor:
    """The paper's choice: patches as the encoder gives them."""
    return tokens


def zscore(tokens: Tensor, *, alpha: float = 0.6) -> Tensor:
    """Spatial normalisation of iREPA (arXiv 2512.10794): (y - alpha * mean(y)) / (std(y) + 1e-6), same shape (N, T, F).

    Mean and unbiased standard deviation are over the tokens of an image, per channel. The mean has no spatial
    information; alpha is the share of it that is subtracted.
    """
    if tokens.shape[1] < 2:
        raise UserError("The token norm 'zscore' needs at least 2 tokens per image, but got 1: use token_norm none.")
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)  # (N, 1, F), unbiased
    return (tokens - alpha * mean) / (std + 1e-6)


def layernorm(tokens: Tensor) -> Tensor:
    """Normalise each token to mean 0 and variance 1 over channels, (N, T, F), for losses that depend on scale, such as `mse`."""
    return F.layer_norm(tokens, tokens.shape[-1:])
