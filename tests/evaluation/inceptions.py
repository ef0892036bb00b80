"""A fast stand-in for Inception: 6 features, 4 spatial features and 5 logits, all linear in the image's colours."""

import torch
from torch import nn

from repa.evaluation.extractors import InceptionExtractor
from repa.metrics import ImageFeatures
from repa.metrics.inception import SHA256, LoadedInception

PUBLISHED = SHA256 + "0" * 56


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)
        g = torch.Generator().manual_seed(0)
        self.mix = [torch.randn(3 * 4 * 4, dim, generator=g) for dim in (6, 4, 5)]

    def forward(self, images, precision):
        x = nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return ImageFeatures(*(x @ mix for mix in self.mix))


def small_inception(checksum=PUBLISHED):
    extractor = InceptionExtractor(LoadedInception(Small(), checksum))
    extractor.dim = 6
    return extractor
