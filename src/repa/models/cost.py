"""Parameters and FLOPs of a diffusion transformer."""

import torch

from repa.base.cost import Cost, cost_of
from repa.models.config import ModelConfig
from repa.models.dit import build


def model_cost(config: ModelConfig) -> Cost:
    """Of one image; latent size and channels must be filled in."""
    with torch.device("meta"):
        model = build(config)
        x = torch.empty(1, model.latent_channels, model.latent_size, model.latent_size)
        t, label = torch.empty(1), torch.empty(1, dtype=torch.int64)
    return cost_of(model, lambda: model(x, t, label).prediction)
