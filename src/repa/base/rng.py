"""Random streams named by (seed, purpose), so that no draw depends on the number of processes, batch size or restarts."""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the lower 32 bits of an int64


def fold(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by `keys`; distinct keys give independent streams."""
    text = ":".join([str(int(seed)), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for the stream (seed, *keys), e.g. generator(seed, "step", 1200)."""
    return torch.Generator(device=device).manual_seed(fold(seed, *keys))


class SampleStreams:
    """One independent stream per sample: image 12345 has the same draws in any batch, process, restart and device.

    The counter-based generator `philox` computes a draw from (stream, number of earlier draws, position), so all samples are
    drawn at once, on the device that needs them. Integers are the same on every device. Normal numbers are computed in
    float64 and rounded to float32, because devices differ in the last bit of a logarithm.

    Args:
        seed, indices: of the N streams.
        device: of the draws.
    """

    def __init__(self, seed: int, indices: Iterable[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        # Apple's GPUs have no float64, in which normal numbers are computed.
        self._on = torch.device("cpu") if self.device.type == "mps" else self.device
        keys = torch.tensor([fold(seed, "sample", int(index)) for index in indices], dtype=torch.int64)
        self._keys = keys.to(self._on)[:, None]  # (N, 1)
        self._draws = 0

    def randn(self, *shape: int) -> Tensor:
        """(N, *shape) standard normal, float32, row n from stream n, by the transform of Box and Muller."""
        num = math.prod(shape)
        a, b, c, d = self._words(-(-num // 4))  # (N, K) each
        pairs = [box_muller(*pair) for pair in ((a, b), (c, d))]
        x = torch.stack([part for pair in pairs for part in pair], dim=2)  # (N, K, 4)
        return x.flatten(1)[:, :num].reshape(-1, *shape).to(self.device)

    def randint(self, high: int) -> Tensor:
        """(N,) integers in [0, high), int64; uniform to one part in 2^32 / high."""
        return (self._words(1)[0][:, 0] * high >> 32).to(self.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal like `x` (N, ...), the `randn_like` of samplers."""
        return self.randn(*x.shape[1:]).to(device=x.device, dtype=x.dtype)

    def _words(self, num: int) -> tuple[Tensor, ...]:
        """The next draw of every stream: four (N, num) of integers in [0, 2^32)."""
        place = torch.arange(num, device=self._on).expand(len(self._keys), -1)
        zero = torch.zeros_like(place)
        draw, self._draws = torch.full_like(place, self._draws), self._draws + 1
        return philox((place, draw, zero, zero), (self._keys & WORD, self._keys >> 32 & WORD))


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words of a counter, two of a key.

    Arguments and results are int64 tensors that hold unsigned 32-bit words.
    """
    (a, b, c, d), (k, m) = counter, key
    # Multipliers and increments are the paper's. Products of int64 wrap like products of uint64, which torch lacks.
    for i in range(rounds):
        if i:
            k, m = k + 0x9E3779B9 & WORD, m + 0xBB67AE85 & WORD
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & WORD) ^ b ^ k, q & WORD, (p >> 32 & WORD) ^ d ^ m, p & WORD
    return a, b, c, d


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 bits -> two standard normal numbers, float32 computed in float64; none is beyond 6.7."""
    # Plus 1 avoids the logarithm of 0.
    radius = (-2 * torch.log((a.double() + 1) * 2.0**-32)).sqrt_()
    angle = b.double() * (2.0**-31 * math.pi)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
