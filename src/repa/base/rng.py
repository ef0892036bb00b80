"""Randomness that is a function of (seed, what it is for): nothing depends on process count, batch size or restarts."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def fold(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by `keys`; distinct keys give independent streams."""
    text = ":".join([str(int(seed)), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for the stream (seed, *keys), e.g. generator(seed, "step", 1200)."""
    return torch.Generator(device=device).manual_seed(fold(seed, *keys))


class SampleStreams:
    """One independent stream per sample: image 12345 gets the same draws whatever batch, process count or restart.

    Drawn on the CPU in float32, so that the numbers are also the same on every device.
    """

    def __init__(self, seed: int, indices: Sequence[int]):
        self.generators = [generator(seed, "sample", int(index)) for index in indices]

    def randn(self, *shape: int) -> Tensor:
        """(N, *shape) standard normal, row n from stream n."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def randint(self, high: int) -> Tensor:
        """(N,) integers in [0, high), int64."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal like `x` (N, ...): what samplers take as `randn_like`."""
        return self.randn(*x.shape[1:]).to(device=x.device, dtype=x.dtype)
