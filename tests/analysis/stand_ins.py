"""Stand-ins with predictable outputs: a network, an autoencoder, and rearranged data."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from repa.autoencoders.contract import Autoencoder
from repa.data import DataSet
from repa.encoders import load_encoder
from repa.models import Backbone, Output


class Knowing(Backbone):
    """Depth 1 returns the input pixels as tokens, depth 2 the tokens of `tiny` for them, depth 3 zeros."""

    depth, null_label, grid, state_shapes, blocks = 3, 2, (16, 16), {"x": (3, 16, 16)}, ()

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.encoder = load_encoder("tiny")

    def null(self, like):
        return like._replace(labels=torch.full_like(like.labels, self.null_label))

    def matrices(self):
        return []

    def forward(self, state, t, condition, taps=(), keep=None):
        x_t = state["x"]
        assert (condition.labels == self.null_label).all(), "the true class must not be told"
        images = (127.5 * x_t + 128).clamp(0, 255).to(torch.uint8)
        pixels = x_t.flatten(2).transpose(1, 2)  # (N, T, C)
        states = {1: pixels, 2: self.encoder(images, x_t.shape[-1] // 4).patches, 3: torch.zeros_like(pixels)}
        return Output({"x": x_t}, {tap: states[tap.depth] for tap in taps}, {})


class Sampling(Autoencoder):
    """Draws latents from N(0, 1) for every image."""

    def __init__(self):
        super().__init__("sampling", channels=3, factor=1, scale=1.0, shift=0.0)


class Rearranged:
    """Prepared data with some attributes or fields replaced, and rows reordered or repeated."""

    def __init__(self, data, rows=None, fields=None, autoencoder=None, **facts):
        self.data, self.rows, self.fields, self.facts = data, rows, fields or {}, facts
        self.manifest = SimpleNamespace(
            autoencoder=autoencoder or data.manifest.autoencoder, config=data.manifest.config
        )

    def __getattr__(self, name):
        return self.facts[name] if name in self.facts else getattr(self.data, name)

    @property
    def num_images(self):
        return self.data.num_images if self.rows is None else len(self.rows)

    @property
    def originals(self):
        return range(self.num_images)

    def require_images(self, why=""):
        DataSet.require_images(self, why)

    def summary(self):
        return {**self.data.summary(), "rows": None if self.rows is None else self.rows.tolist()}

    def gather(self, field, indices):
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return self.fields[field][rows] if field in self.fields else self.data.gather(field, rows)
