"""Inception score (Salimans et al. 2016)."""

import math

import torch
from torch import Tensor

from repa.base import dist
from repa.base.errors import UserError

SPLIT_SIZE = 5000  # consecutive images, the ADM evaluator's


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp of the mean KL(p(class | image) || p(class)), averaged over consecutive splits; logits (N, K) -> at least 1.

    The order of the images matters, because each split has its own p(class). 50 000 images in 10 splits of 5000 is what
    the ADM evaluator does; it uses Inception's logits without their bias.

    Raises:
        UserError: fewer images than splits, or splits that are not whole numbers of at least 1.
    """
    if type(splits) is not int or not 1 <= splits <= len(logits):
        raise UserError(
            f"The inception score of {len(logits)} images needs 1 to {len(logits)} splits, but got {splits!r}."
        )
    scores = []
    for part in logits.tensor_split(splits):
        log_p = part.cpu().double().log_softmax(1)  # (n, K)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))  # (K,)
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


class RunningScore:
    """The same of a stream, in fixed memory: split s holds the images s * size to (s + 1) * size - 1, the last the rest.

    The mean of KL(p_i || m) over a split of n images is (1/n) sum_i sum_c p_ic log p_ic - sum_c m_c log m_c, where m is the mean
    of p_i: two sums are enough, and those of several processes add up.
    """

    def __init__(self, size: int = SPLIT_SIZE):
        self.size = size
        self._splits: dict[int, Tensor] = {}  # split -> count, sum of p log p, and p of each class: (2 + K,), float64

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Take in the logits (n, K) of the images `indices` (n,).

        Raises:
            UserError: logits that are not finite.
        """
        if not logits.isfinite().all():
            raise UserError("A logit is NaN or infinite, so there is no inception score: check images and weights.")
        log_p = logits.detach().cpu().double().log_softmax(1)  # (n, K)
        p = log_p.exp()
        rows = torch.cat([torch.ones(len(p), 1, dtype=p.dtype), (p * log_p).sum(1, keepdim=True), p], 1)  # (n, 2 + K)
        splits = indices.cpu() // self.size
        for split in splits.unique().tolist():
            self._splits[split] = self._splits.get(split, 0) + rows[splits == split].sum(0)

    def reduce(self) -> None:
        """Make every process hold the sums of all; each may have seen any images, also none."""
        parts = dist.gather_objects(self._splits)
        self._splits = {}
        for part in parts:
            for split, sums in part.items():
                self._splits[split] = self._splits.get(split, 0) + sums

    @property
    def value(self) -> float:
        """The score; raises UserError when there was no image."""
        if not self._splits:
            raise UserError("The inception score needs at least one image, but none was given.")
        scores = []
        for sums in self._splits.values():
            entropy, marginal = sums[1] / sums[0], sums[2:] / sums[0]
            scores.append((entropy - torch.special.xlogy(marginal, marginal).sum()).exp())
        return torch.stack(scores).mean().item()
