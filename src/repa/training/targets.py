"""Where the target tokens of a step come from: the shards, or the encoder run on the batch's images."""

from collections.abc import Sequence

import torch

from repa.base.errors import UserError
from repa.data import Batch, DataSet
from repa.encoders import load_encoder
from repa.encoders.contract import Features
from repa.encoders.loading import weights_for
from repa.training.config import TrainConfig


class Targets:
    """Tokens by encoder name for a batch.

    Cached tokens are used where the data has them; otherwise the encoder is loaded and run on the images.
    """

    def __init__(self, config: TrainConfig, data: DataSet, device: torch.device):
        wanted = list(dict.fromkeys(a.target for a in config.alignments))
        self.cached = tuple(name for name in wanted if name in data.features)
        missing = [name for name in wanted if name not in self.cached]
        if missing and not data.has_images:
            raise UserError(
                f"The data in {data.folder} has neither tokens of {missing[0]!r} nor images to make them from: "
                f"run `repa prepare` with --features {' '.join(wanted)}."
            )
        self.grid = config.model.latent_size // config.model.dims().patch_size
        self.notes = [
            f"The stored tokens of {name!r} form a grid of {data.features[name].grid} and are resampled to the network's "
            f"{self.grid}; `repa prepare --grid {self.grid}` stores them at that size."
            for name in self.cached
            if data.features[name].grid != self.grid
        ]
        self.encoders = {
            name: load_encoder(name, weights=weights_for(name, config.feature_weights), device=device)
            for name in missing
        }
        self.dims = {name: data.features[name].dim for name in self.cached} | {
            name: encoder.dim for name, encoder in self.encoders.items()
        }

    def needs_images(self, data: DataSet) -> bool:
        return bool(self.encoders) or not data.has_moments

    def __call__(self, batch: Batch, names: Sequence[str]) -> dict[str, Features]:
        """Features of the encoders in `names`; the others are not run."""
        return {
            name: batch.features[name] if name in self.cached else self.encoders[name](batch.images, self.grid)
            for name in names
        }
