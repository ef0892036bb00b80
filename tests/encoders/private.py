"""A user's encoder: the mean colour of each patch."""

import torch
from torch.nn import functional as F

from repa.encoders import Features, VisionEncoder


class Colours(VisionEncoder):
    def prepare(self, pixels, side):
        return F.interpolate(pixels, (side, side))

    def extract(self, pixels, grid):
        patches = F.adaptive_avg_pool2d(pixels, grid).flatten(2).transpose(1, 2)
        return Features(patches, None)


def load(name, weights):
    return Colours(torch.nn.Conv2d(3, 3, 1), name=name, dim=3, patch_size=2, preprocessing="none", weights_file=weights)


def load_wrong(name, weights):
    return {"dim": 3}


class Map(Colours):
    """Wrongly returns a map instead of tokens."""

    def extract(self, pixels, grid):
        return Features(F.adaptive_avg_pool2d(pixels, grid), None)


class Summary(Colours):
    """Wrongly keeps a class token before the patches."""

    def extract(self, pixels, grid):
        patches = super().extract(pixels, grid).patches
        return Features(torch.cat([patches.mean(1, keepdim=True), patches], 1), None)


def load_map(name, weights):
    return Map(torch.nn.Conv2d(3, 3, 1), name=name, dim=3, patch_size=2, preprocessing="none", weights_file=weights)


def load_summary(name, weights):
    return Summary(torch.nn.Conv2d(3, 3, 1), name=name, dim=3, patch_size=2, preprocessing="none", weights_file=weights)
