"""Inception score (Salimans et al. 2016)."""

import math

import torch
from torch import Tensor

from repa.base.errors import UserError


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp of the mean KL(p(class | image) || p(class)), averaged over consecutive splits; logits (N, K) -> at least 1.

    The order of the images matters, because each split has its own p(class). 50 000 images in 10 splits of 5000 is what
    the ADM evaluator does; it uses Inception's logits without their bias.

    Raises:
        UserError: fewer images than splits, or splits that are no whole number of at least 1.
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
