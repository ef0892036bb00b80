"""Eq. 8: patch-wise comparison of projected hidden states with the encoder's patches; (N,) losses, lower is better.

N batch, T tokens, F encoder width, M images of all processes. `Alignment` switches autocast off around these functions:
in half precision the norms under- or overflow, which is a known source of NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.base import dist
from repa.base.errors import UserError


def cosine(projected: Tensor, target: Tensor) -> Tensor:
    """Eq. 8 with the negative cosine similarity: (N, T, F), (N, T, F) -> (N,) in [-1, 1]."""
    return -(_unit(projected) * _unit(target)).sum(-1).mean(-1)  # (N,)


def nt_xent(projected: Tensor, target: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Eq. 8 with a normalised temperature-scaled cross entropy: (N, T, F), (N, T, F) -> (N,), at least 0.

    For image n and token position p, with unit vectors h (projected) and y (target):

        loss[n] = -mean_p log( exp(h[n,p] . y[n,p] / temperature) / sum_m exp(h[n,p] . y[m,p] / temperature) )

    The paper names NT-Xent without saying which patches are negatives. Here they are the patches at the SAME place of
    the other images of the global batch. Other patches of the same image are left out: neighbours show the same object
    and would be false negatives, and all N*T patches against each other would cost (N*T)^2 logits. This costs N*M*T:
    64 MiB in float32 for 256 images of 256 tokens in one process.

    Only targets cross processes, and they need no gradient: with the gradient averaged over processes, as DDP does,
    several processes give what one process with the whole batch gives. Every process must hold the same N.

    Raises:
        UserError: the global batch holds one image (there is no negative), or the temperature is not positive.
    """
    if not (isinstance(temperature, (int, float)) and temperature > 0):
        raise UserError(f"The similarity 'nt_xent' needs a temperature above 0, but got {temperature!r}.")
    student, teacher = _unit(projected), dist.gather(_unit(target))  # (N, T, F), (M, T, F)
    (num_images, num_tokens, _), num_candidates = student.shape, len(teacher)
    if num_candidates < 2:
        raise UserError(
            "The similarity 'nt_xent' contrasts images of a batch: it needs 2 or more, but got 1: raise the batch size."
        )
    logits = torch.einsum("npf,mpf->npm", student, teacher) / temperature  # (N, T, M)
    positive = dist.rank() * num_images + torch.arange(num_images, device=logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), positive.repeat_interleave(num_tokens), reduction="none")  # (N * T,)
    return losses.view(num_images, num_tokens).mean(-1)  # (N,)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1, eps=1e-12)
