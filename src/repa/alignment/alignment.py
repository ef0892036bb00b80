"""Eq. 8 as a module: project the hidden state, match token grids, compare; and the weight of Eq. 9."""

import torch.nn as nn
from torch import Tensor

from repa.alignment import PROJECTORS, SCHEDULES, SIMILARITIES, TOKEN_NORMS
from repa.alignment.config import AlignmentConfig
from repa.alignment.targets import resize_tokens
from repa.base.errors import UserError
from repa.base.precision import no_autocast


class Alignment(nn.Module):
    """One alignment term: the hidden state of a block against the patches of a frozen encoder.

    Args:
        config: which term; `config.depth` and `config.target` tell the caller what to hand to `forward`.
        hidden_dim: width D of the transformer.
        feature_dim: width F of the encoder's patches.
    """

    def __init__(self, config: AlignmentConfig, hidden_dim: int, feature_dim: int):
        super().__init__()
        self.config = config
        self.feature_dim = feature_dim
        self.projector = PROJECTORS.build(config.projector)(hidden_dim, feature_dim)
        self.similarity = SIMILARITIES.build(config.similarity)
        self.token_norm = TOKEN_NORMS.build(config.token_norm)
        self.schedule = SCHEDULES.build(config.schedule)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Eq. 8, per image: hidden (N, T, D), target (N, M, F) -> (N,) in float32, lower is better.

        Where M is not T, the target's grid is resampled to the student's. Gradients reach `hidden` and the projector,
        never the target.

        Raises:
            UserError: the target has another width than the projector was built for, or the grids differ and one is
                not square.
        """
        if target.shape[-1] != self.feature_dim:
            raise UserError(
                f"The features {self.config.target!r} have {target.shape[-1]} channels, but their projector was built "
                f"for {self.feature_dim}: they come from another encoder than the alignment names."
            )
        projected = self.projector(hidden)  # (N, T, F)
        with no_autocast(hidden.device):  # norms and logits need float32
            matched = resize_tokens(target.detach().float(), hidden.shape[1])  # (N, T, F)
            return self.similarity(projected.float(), self.token_norm(matched))  # (N,)

    def weight(self, step: int) -> float:
        """Lambda of Eq. 9 at a training step; 0 means that neither encoder nor projector need run."""
        return self.config.weight * self.schedule(step)
