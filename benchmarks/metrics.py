"""Time FID, precision and recall from features: ours, plain numpy/scipy, and the matrix products alone.

    python benchmarks/metrics.py                                                     both, 5,000 x 512 against 2,000
    python benchmarks/metrics.py --samples 50000 --reference 10000 --dim 2048 --plain false   the real size, ours only

The floor is the time of the matrix products alone, measured on this machine with blocks of the same shape: all
distances within the samples, within the reference and between them (float32), and the two covariances (float64). Ours
computes each distance within a set only once, so it can be faster than the floor. The script fails when the results of
ours and of the plain implementation differ.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.metrics import Statistics, frechet_distance, precision_recall

BATCH = 256  # rows per update of the statistics
K = 3


def make(num: int, dim: int, seed: int, shift: float) -> Tensor:
    """Features with a decaying spectrum, non-negative as Inception's are: (num, dim) float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.05, dim) / dim**0.5
    return (torch.randn(num, dim, generator=g) @ mix + shift).relu()


def ours(reference: Tensor, samples: Tensor) -> tuple[float, float, float]:
    statistics = [Statistics(), Statistics()]
    for running, features in zip(statistics, (reference, samples), strict=True):
        for batch in features.split(BATCH):
            running.update(batch)
    a, b = statistics
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return distance, *precision_recall(reference, samples, K)


def plain(reference: Tensor, samples: Tensor) -> tuple[float, float, float]:
    """The formulas in numpy and scipy, on whole matrices, without sharing intermediate results."""
    from scipy import linalg

    x, y = reference.numpy(), samples.numpy()
    sigma1, sigma2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(sigma1 @ sigma2).real
    gap = x.mean(0) - y.mean(0)
    distance = gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)

    def distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.maximum((u**2).sum(1)[:, None] - 2 * u @ v.T + (v**2).sum(1), 0)

    def share(queries: np.ndarray, centres: np.ndarray) -> float:
        reach = np.partition(distances(centres, centres), K, axis=1)[:, K]
        return (distances(queries, centres) <= reach).any(1).mean()

    return float(distance), float(share(y, x)), float(share(x, y))


def floor(num_reference: int, num_samples: int, dim: int) -> tuple[float, float]:
    """(seconds, TFLOP) of the products alone, from the measured speed of one block."""

    def speed(make_block: Callable[[], tuple[Tensor, Tensor]]) -> float:
        a, b = make_block()
        a @ b  # warm up
        best = min(_seconds(lambda: a @ b) for _ in range(3))
        return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best

    single = speed(lambda: (torch.randn(2048, dim), torch.randn(dim, 4096)))
    double = speed(lambda: (torch.randn(dim, 2048).double(), torch.randn(2048, dim).double()))
    distances = 2 * dim * (num_samples**2 + num_reference**2 + num_samples * num_reference)
    covariances = 2 * dim**2 * (num_samples + num_reference)
    return distances / single + covariances / double, (distances + covariances) / 1e12


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--reference", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--plain", choices=("true", "false"), default="true", help="also measure numpy/scipy")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="", help="write the figures to this .json file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    reference, samples = make(given.reference, given.dim, 1, 0.0), make(given.samples, given.dim, 2, 0.02)
    found: dict[str, tuple[float, float, float]] = {}
    seconds: dict[str, float] = {}
    bound, tflop = floor(given.reference, given.samples, given.dim)
    ways = {"ours": ours} | ({"plain": plain} if given.plain == "true" else {})

    def keep(name: str, way: Callable[[Tensor, Tensor], tuple[float, float, float]]) -> None:
        found[name] = way(reference, samples)

    for name, way in ways.items():
        seconds[name] = _seconds(functools.partial(keep, name, way))
    print(
        f"{given.samples:,} x {given.dim:,} against {given.reference:,}, {given.threads} threads, torch {torch.__version__}"
    )
    print(f"floor  {bound:8.2f} s   {tflop:.3f} TFLOP")
    for name, value in found.items():
        distance, precision, recall = value
        print(
            f"{name:<6} {seconds[name]:8.2f} s   {seconds[name] / bound:5.2f} of the floor   Fréchet distance {distance:.5f}  "
            f"precision {precision:.4f}  recall {recall:.4f}"
        )
    if "plain" in found:
        np.testing.assert_allclose(found["ours"][0], found["plain"][0], rtol=1e-4)
        np.testing.assert_allclose(found["ours"][1:], found["plain"][1:], atol=2e-3)
    if given.out:
        files.write_text(
            given.out, json.dumps({**vars(given), "floor": bound, "tflop": tflop, "seconds": seconds, "found": found})
        )


if __name__ == "__main__":
    main()
