"""Mean and covariance of a stream of features in fixed memory, over batches and processes."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, files
from repa.base.arrays import load_npz
from repa.base.errors import UserError


class Statistics:
    """Running count, mean and covariance of features (N, D), whatever their number, in D * D float64.

    What is kept is the scatter about the mean, updated as by Chan, Golub and LeVeque (1979): sums of plain outer
    products would lose the covariance of features whose mean is large relative to their spread.

    The first batch decides D.

    Args:
        device: where to accumulate; it needs float64, which MPS has not.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.count = 0
        self.device = torch.device(device)
        self._start(0)

    def _start(self, dim: int) -> None:
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)

    def update(self, features: Tensor) -> None:
        """Take in a batch (N, D).

        Raises:
            UserError: the features have another width, or are not all finite.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self._mean)):
            wanted = len(self._mean) if self.count else "D"
            raise UserError(
                f"Statistics are of features (N, {wanted}), but got a batch of shape {tuple(features.shape)}."
            )
        if not features.isfinite().all():
            raise UserError(
                "A feature is NaN or infinite, so no statistics can be had: check the images and the weights."
            )
        if len(features) == 0:
            return
        features = features.detach().to(self.device).double()
        if self.count == 0:
            self._start(features.shape[1])
        mean = features.mean(0)
        centred = features - mean
        self._scatter.addmm_(centred.T, centred)  # in place: D * D numbers are more than a batch is
        self._move(len(features), mean)

    def merge(self, other: "Statistics") -> None:
        """Take in everything that `other` has seen."""
        if other.count:
            self._join(other.count, other._mean.to(self.device), other._scatter.to(self.device))

    def reduce(self) -> None:
        """Make every process hold the statistics of all; each may have seen any number of features, also none."""
        has = self.count > 0
        facts = torch.tensor([self.count, has, has * len(self._mean)], dtype=torch.float64, device=self.device)
        total, num_with, dims = dist.sum_over(facts).tolist()
        if total == 0:
            return
        if not has:
            self._start(round(dims / num_with))
        mean = dist.sum_over(self._mean * (self.count / total))
        shift = self._mean - mean
        self._scatter = dist.sum_over(self._scatter + self.count * torch.outer(shift, shift))
        self._mean, self.count = mean, round(total)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self._start(len(mean))
        assert len(self._mean) == len(mean), "statistics of different features"
        self._scatter += scatter
        self._move(count, mean)

    def _move(self, count: int, mean: Tensor) -> None:
        """Count features whose scatter about their own mean is in already."""
        total = self.count + count
        shift = mean - self._mean
        self._scatter.addr_(shift, shift, alpha=self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,), float64."""
        self._require(1, "mean")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D), float64, divided by N - 1 as by numpy.cov and the ADM evaluator."""
        self._require(2, "covariance")
        return self._scatter / (self.count - 1)

    def _require(self, count: int, what: str) -> None:
        if self.count < count:
            raise UserError(f"The {what} needs at least {count} feature vectors, but only {self.count} were given.")

    def state_dict(self) -> dict[str, np.ndarray]:
        """mu (D,), sigma (D, D), count: the names of the ADM evaluator's reference files."""
        return {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy(), "count": np.array(self.count)}

    @classmethod
    def from_state_dict(cls, state: dict[str, np.ndarray]) -> Self:
        """What `state_dict` gave, on the CPU; other keys are ignored."""
        statistics = cls()
        statistics.count = int(state["count"])
        statistics._mean = torch.from_numpy(np.asarray(state["mu"], np.float64).copy())
        statistics._scatter = torch.from_numpy(np.asarray(state["sigma"], np.float64)) * (statistics.count - 1)
        return statistics

    def save(self, path: str | Path) -> None:
        """Write mu, sigma and count as .npz; an interrupted write leaves what was there."""
        state = self.state_dict()
        with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=state["mu"], sigma=state["sigma"], count=state["count"])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises UserError when it is missing or damaged. Nothing in the file is executed."""
        state = load_npz(path, "statistics")
        if missing := {"mu", "sigma", "count"} - state.keys():
            raise UserError(
                f"{path} holds {', '.join(sorted(state)) or 'nothing'}, but statistics need mu, sigma and count: "
                f"{', '.join(sorted(missing))} missing."
            )
        return cls.from_state_dict(state)
