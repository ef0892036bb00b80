"""Stored forms of tokens: float16, int8 with one scale per token, coordinates in a basis of principal directions.

    fp16         the tokens
    int8         q = round(x / s), s = max|x| / 127 of each token; x' = q s
    pcaK         c = (x - mean) B^T in K directions; x' = mean + c B
    pcaK-int8    the coordinates of pcaK as int8

The error of int8 is at most s/2 an entry, so cos(x, x') >= sqrt(1 - r^2) with r = peak / (254 rms) of the token: 0.9997
if the peak is 6 times the root mean square. The error of pcaK is the variance outside the K directions.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa.base.arrays import load_npy
from repa.base.errors import UserError
from repa.data.config import split_format
from repa.data.records import FeatureField

LARGEST = 127  # int8; -128 is unused, so that the codes are symmetric


def to_float16(x: Tensor, made_by: str) -> Tensor:
    """The values in float16; raises UserError for values out of its range."""
    half = x.half()
    # float16 ends at 65,504: infinity would be stored silently, and every loss of that image would be NaN
    if not torch.isfinite(half).all():
        raise UserError(
            f"{made_by} gave values that float16 cannot hold: leave it out of the preparation, and run it in training."
        )
    return half


def pack(tokens: Tensor, form: str, basis: Tensor | None = None, *, made_by: str = "The encoder") -> dict[str, Tensor]:
    """Tokens (n, T, D) -> stored form: `features` (n, T, D or K), and `scale` (n, T) for int8.

    Args:
        form: fp16, int8, pcaK or pcaK-int8.
        basis: float32 (1 + K, D), from `principal_basis`; for the forms with pca.
        made_by: the name of the encoder in errors.

    Raises:
        UserError: values that are not finite, or beyond float16.
    """
    x = tokens.float()
    num_directions, dtype = split_format(form)
    if num_directions:
        assert basis is not None, form
        assert basis.shape == (1 + num_directions, x.shape[-1]), (form, basis.shape)
        # the encoder's autocast would compute this product in bfloat16, which has fewer bits than the stored form
        with torch.autocast(x.device.type, enabled=False):
            x = (x - basis[0]) @ basis[1:].T  # (n, T, K)
    half = to_float16(x, made_by)  # also before int8, so that it refuses values that are not finite too
    if dtype == "fp16":
        return {"features": half}
    scale = x.abs().amax(-1) / LARGEST  # (n, T)
    # a token of zeros has the scale 0; dividing by the smallest float instead gives 0, not NaN
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-LARGEST, LARGEST)
    return {"features": codes.to(torch.int8), "scale": scale}


def unpack(features: Tensor, scale: Tensor | None = None, basis: Tensor | None = None) -> Tensor:
    """Stored rows (n, T, D or K), on any device -> float32 tokens (n, T, D), on that device.

    Args:
        features: field features.NAME.
        scale: field scale.NAME (n, T), if the form of NAME has int8.
        basis: the result of `read_basis` for NAME, on the same device.
    """
    x = features.float()
    if scale is not None:
        x = x * scale[..., None]
    if basis is None:
        return x
    with torch.autocast(x.device.type, enabled=False):
        return basis[0] + x @ basis[1:]  # (n, T, D)


def read_basis(folder: str | Path, facts: FeatureField, device: torch.device | str = "cpu") -> Tensor | None:
    """The mean and the directions of an encoder's stored tokens, float32 (1 + K, D); None without coordinates."""
    if facts.basis is None:
        return None
    path = Path(folder) / facts.basis.file
    basis = load_npy(path, "a basis of tokens", "Run the same `repa prepare` again.")
    if basis.dtype != np.float32 or basis.shape != facts.basis.shape:
        raise UserError(
            f"{path} holds {basis.dtype} {basis.shape}, not float32 {facts.basis.shape}: delete it and run the same "
            "`repa prepare` again."
        )
    return torch.from_numpy(basis).to(device)


def principal_basis(batches: Iterable[Tensor], num_directions: int) -> np.ndarray:
    """Mean and leading principal directions of tokens, float32 (1 + K, D): row 0 the mean, the others orthonormal.

    Args:
        batches: tokens (n, T, D); sums are in float64.
        num_directions: K, at most D.
    """
    # sums of first and second powers: one pass over the tokens, D x D numbers in memory. In float64, because the
    # covariance is a difference of two sums that are nearly equal if the mean is large
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for tokens in batches:
        x = tokens.flatten(0, 1).double()  # (n T, D)
        count, total, square = count + len(x), total + x.sum(0), square + x.T @ x
    assert count, "no tokens to compute directions from"
    mean = total / count
    assert num_directions <= len(mean), (num_directions, len(mean))
    covariance = square / count - torch.outer(mean, mean)
    _, vectors = torch.linalg.eigh(covariance.cpu())  # in ascending order
    directions = vectors.flip(1)[:, :num_directions].T  # (K, D)
    # the sign of an eigenvector is arbitrary and differs between libraries: make the largest entry positive
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return torch.cat([mean.cpu()[None], directions * largest.sign()]).float().numpy()
