"""Distances of two sets of features: Fréchet (FID and sFID for Inception, FD for any encoder) and kernel (KID).

Mean, covariance and inception score are computed of a stream of features, in fixed memory, over batches and processes.
"""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from repa.base import dist, rng
from repa.base.device import checked_device
from repa.base.errors import UserError, require_type

SPLIT_SIZE = 5000  # consecutive images, as in the ADM evaluator


class Statistics:
    """Running count, mean and covariance of features (N, D), in D * D float64.

    Stores the scatter about the mean, updated as by Chan, Golub and LeVeque (1979): sums of outer products would lose
    the covariance of features with a mean that is large relative to their spread.

    The first batch determines D.

    Args:
        device: device of the sums; it needs float64, which MPS lacks.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.count = 0
        self.device = checked_device(device)
        self._start(0)

    def _start(self, dim: int) -> None:
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)

    def update(self, features: Tensor) -> None:
        """Add a batch (n, D).

        Raises:
            UserError: the features have another width or are not all finite.
        """
        require_type(features, Tensor, "Statistics need a tensor of features (N, D)")
        if features.ndim != 2 or (self.count and features.shape[1] != len(self._mean)):
            wanted = len(self._mean) if self.count else "D"
            raise UserError(
                f"Statistics need features (N, {wanted}), but got a batch of shape {tuple(features.shape)}."
            )
        if not features.isfinite().all():
            raise UserError("A feature is NaN or infinite: check the images and the weights.")
        if len(features) == 0:
            return
        features = features.detach().to(self.device).double()
        if self.count == 0:
            self._start(features.shape[1])
        mean, total = features.mean(0), self.count + len(features)
        centred, shift = features - mean, mean - self._mean
        self._scatter.addmm_(centred.T, centred)  # in place, because D * D numbers are more than a batch
        # The batch's scatter is about its own mean, so the difference of the two means is added, weighted by both counts.
        self._scatter.addr_(shift, shift, alpha=self.count * len(features) / total)
        self._mean += shift * (len(features) / total)
        self.count = total

    def reduce(self) -> None:
        """Combine the statistics of all processes, for all of them; a process may have seen no features."""
        has = self.count > 0
        facts = torch.tensor([self.count, has, has * len(self._mean)], dtype=torch.float64, device=self.device)
        total, num_with, dims = dist.sum_over(facts).tolist()
        if total == 0:
            return
        if not has:  # collectives need equal shapes: D comes from the processes with features
            self._start(round(dims / num_with))
        mean = dist.sum_over(self._mean * (self.count / total))
        shift = self._mean - mean
        self._scatter = dist.sum_over(self._scatter + self.count * torch.outer(shift, shift))
        self._mean, self.count = mean, round(total)

    @property
    def mean(self) -> Tensor:
        """(D,), float64."""
        self._require(1, "mean")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D), float64, divided by N - 1, as in numpy.cov and the ADM evaluator."""
        self._require(2, "covariance")
        return self._scatter / (self.count - 1)

    def _require(self, count: int, what: str) -> None:
        if self.count < count:
            raise UserError(f"The {what} needs at least {count} feature vectors, but got only {self.count}.")


class RunningScore:
    """Inception score (Salimans et al. 2016): exp of the mean KL(p(class | image) || p(class)), averaged over splits.

    Split s has the images s * size to (s + 1) * size - 1, the last split the rest. The order of the images matters, because
    each split has its own p(class). The mean of KL(p_i || m) over a split of n images is (1/n) sum_i sum_c p_ic log p_ic -
    sum_c m_c log m_c, where m is the mean of p_i. So two sums per split are enough, and those of several processes add up.
    """

    def __init__(self, size: int = SPLIT_SIZE):
        self.size = size
        self._splits: dict[int, Tensor] = {}  # split -> count, sum of p log p, and p of each class: (2 + K,), float64

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add the logits (n, K) of the images `indices` (n,), without the bias of Inception's last layer, as in the ADM evaluator.

        Raises:
            UserError: logits that are not finite.
        """
        if not logits.isfinite().all():
            raise UserError("A logit is NaN or infinite: check the images and the weights.")
        log_p = logits.detach().cpu().double().log_softmax(1)  # (n, K)
        p = log_p.exp()
        rows = torch.cat([torch.ones(len(p), 1, dtype=p.dtype), (p * log_p).sum(1, keepdim=True), p], 1)  # (n, 2 + K)
        splits = indices.cpu() // self.size
        for split in splits.unique().tolist():
            self._splits[split] = self._splits.get(split, 0) + rows[splits == split].sum(0)

    def reduce(self) -> None:
        """Combine the sums of all processes, for all of them; a process may have seen no images."""
        parts = dist.gather_objects(self._splits)
        self._splits = {}
        for part in parts:
            for split, sums in part.items():
                self._splits[split] = self._splits.get(split, 0) + sums

    @property
    def value(self) -> float:
        """The score, at least 1; raises UserError without images."""
        if not self._splits:
            raise UserError("The inception score needs at least one image, but got none.")
        scores = []
        for sums in self._splits.values():
            negentropy, marginal = sums[1] / sums[0], sums[2:] / sums[0]  # mean of sum_c p log p; p(class), (K,)
            # xlogy, because a class without images counts as 0 log 0 = 0
            scores.append((negentropy - torch.special.xlogy(marginal, marginal).sum()).exp())
        return torch.stack(scores).mean().item()


def frechet_distance(
    mu1: Tensor | ArrayLike, sigma1: Tensor | ArrayLike, mu2: Tensor | ArrayLike, sigma2: Tensor | ArrayLike
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)), in float64; mu (D,), sigma (D, D).

    The trace of the root is computed as that of (S1^(1/2) S2 S1^(1/2))^(1/2), whose argument is symmetric. Its eigenvalues
    are real, and negative ones from rounding (with fewer samples than dimensions) are clamped. Unlike the root of the
    asymmetric product, it needs no dropping of imaginary parts and no added multiple of the identity.

    Raises:
        UserError: shapes do not fit, or a value is not finite.
    """
    # On the CPU: MPS has no float64, and the last digits should not depend on the device.
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).cpu().double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not (sigma1.shape == sigma2.shape == (*mu1.shape, *mu1.shape)):
        raise UserError(
            "The Frechet distance needs two means (D,) and two covariances (D, D) of the same features, but got "
            f"{tuple(mu1.shape)}, {tuple(sigma1.shape)} and {tuple(mu2.shape)}, {tuple(sigma2.shape)}."
        )
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("The Frechet distance needs finite statistics, but got NaN or infinity: check the features.")
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # (D, D), sigma1^(1/2)
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return max(distance.item(), 0.0)  # rounding may make the distance of a set to itself negative


def check_features(a: Tensor, b: Tensor, what: str) -> None:
    """Raises UserError unless two sets of features are finite and (N, D) and (M, D); `what` names the metric."""
    for features in (a, b):
        require_type(features, Tensor, f"{what}: features must be a tensor (N, D)")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"{what}: features must be (N, D) and (M, D), but got {tuple(a.shape)} and {tuple(b.shape)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(
            f"{what}: features must be finite, but contain NaN or infinity: check the images and the weights."
        )


def kernel_distance(
    reference: Tensor,
    samples: Tensor,
    *,
    degree: int = 3,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^degree, averaged over random subsets; (N, D) and (M, D).

    KID on Inception's features (Binkowski et al. 2018).

    Each subset has `subset_size` random features of each set, without repetition. Unbiased: small values can be negative.

    Raises:
        UserError: widths differ, a set is smaller than a subset, or a feature is not finite.
    """
    check_features(reference, samples, "Kernel distance")
    if not 2 <= subset_size <= min(len(reference), len(samples)) or num_subsets < 1:
        raise UserError(
            f"The kernel distance needs subsets of 2 to {min(len(reference), len(samples))} features and at least one "
            f"subset, but got subset_size={subset_size} and num_subsets={num_subsets}."
        )
    generator = rng.generator(seed, "kernel_distance")
    total = 0.0
    for _ in range(num_subsets):
        # From a CPU generator, so that the subsets do not depend on the device of the features.
        x, y = (f[torch.randperm(len(f), generator=generator)[:subset_size].to(f.device)] for f in (reference, samples))
        total += _squared_mmd(x.cpu().double(), y.cpu().double(), degree)
    return total / num_subsets


def _squared_mmd(x: Tensor, y: Tensor, degree: int) -> float:
    """Unbiased, without pairs of a feature with itself; (m, D), (m, D)."""
    m, dim = x.shape
    xx, yy, xy = ((a @ b.T / dim + 1) ** degree for a, b in ((x, x), (y, y), (x, y)))  # (m, m)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()
