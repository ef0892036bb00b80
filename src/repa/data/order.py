"""The order of images in an epoch: a function of (seed, epoch, place), computed only for the requested places.

Memory does not depend on the number of images: an epoch of a billion images costs the same as one of a thousand.
"""

import functools
from collections.abc import Sequence

import numpy as np

from repa.base.rng import fold

ROUNDS = 12  # with 8 rounds, pairs in the smallest sets are not equally likely
# more shards mix better but need more cache, which holds two windows
WINDOW = 16  # shards


def permute(places: np.ndarray, num: int, key: int) -> np.ndarray:
    """Elements `places` (n,) of the permutation of 0 ... num - 1 with this key, without computing the others; int64.

    A Feistel network (Luby and Rackoff, 1988) permutes the smallest sufficient power of two. Results outside the range
    pass through it again (cycle walking: Black and Rogaway, 2002), less than twice on average.
    """
    # at least two bits: each half of the network needs one
    bits = max(2, (num - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    keys = _round_keys(key)

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x >> low, x & low_mask
        for a, b in zip(keys[::2], keys[1::2], strict=True):
            left = left ^ (_hash(right + a) & high_mask)
            right = right ^ (_hash(left + b) & low_mask)
        return left << low | right

    # unsigned, whose overflow in `_hash` and in the sums of keys is defined, and whose shifts bring in zeros
    x = scramble(np.asarray(places).astype(np.uint64))
    while len(outside := np.flatnonzero(x >= num)):
        x[outside] = scramble(x[outside])
    return x.astype(np.int64)


@functools.lru_cache(64)
def _round_keys(key: int) -> np.ndarray:
    return np.array([fold(key, "round", r) for r in range(ROUNDS)], np.uint64)


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): every bit of x affects every bit of the result."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class GlobalShuffle:
    """Shuffles over all images."""

    def __init__(self, num: int, seed: int):
        self.num, self.seed = num, seed

    def rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Images at `places` (n,) of an epoch, (n,) int64."""
        return permute(places, self.num, fold(self.seed, "epoch", epoch))

    def shards_from(self, epoch: int, place: int) -> list[int]:
        """Shards to prefetch at `place`, most urgent first: none here, because any shard may be next."""
        return []


class WindowShuffle:
    """For remote shards: shards in random order, `window` at a time, and images in random order within a window.

    The other images of a batch come from `window` shards only, which differ in every epoch.

    Args:
        sizes: images in each shard.
        seed: of the order.
        window: number of shards that are shuffled together.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, seed: int, window: int = WINDOW):
        self.sizes, self.seed, self.window = np.asarray(sizes), seed, window
        self.starts = self.sizes.cumsum() - self.sizes
        self._plan = functools.lru_cache(2)(self._planned)  # a batch may need the end of one epoch and the next's start

    def rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Images at `places` (n,) of an epoch, (n,) int64."""
        shards, ends, window_ends = self._plan(epoch)
        out = np.empty(len(places), np.int64)
        windows = np.searchsorted(window_ends, places, side="right")
        for window in np.unique(windows):
            here = windows == window
            start = window_ends[window - 1] if window else 0
            # within the window alone: a permutation of its places, so every image comes once an epoch
            key = fold(self.seed, "epoch", epoch, "window", int(window))
            mixed = start + permute(places[here] - start, int(window_ends[window] - start), key)
            position = np.searchsorted(ends, mixed, side="right")  # in the order of the shards
            shard = shards[position]
            out[here] = self.starts[shard] + mixed - (ends[position] - self.sizes[shard])
        return out

    def shards_from(self, epoch: int, place: int) -> list[int]:
        """The shards of the window of `place` and of the next one, which may be the first of the next epoch."""
        shards, _, window_ends = self._plan(epoch)
        first = int(np.searchsorted(window_ends, place, side="right")) * self.window
        wanted = shards[first : first + 2 * self.window].tolist()
        if first + self.window >= len(shards):
            wanted += self._plan(epoch + 1)[0][: self.window].tolist()
        return list(dict.fromkeys(wanted))

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shards in their order, the place where each ends, the place where each window ends."""
        num = len(self.sizes)
        shards = permute(np.arange(num), num, fold(self.seed, "epoch", epoch, "shards"))
        ends = self.sizes[shards].cumsum()
        last = np.minimum(np.arange(self.window, num + self.window, self.window), num) - 1
        return shards, ends, ends[last]
