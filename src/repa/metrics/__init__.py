"""FID's Inception network, and distances between sets of features, independent of sample files."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.metrics.distances import RunningScore as RunningScore
    from repa.metrics.distances import Statistics as Statistics
    from repa.metrics.distances import frechet_distance as frechet_distance
    from repa.metrics.distances import kernel_distance as kernel_distance
    from repa.metrics.inception import ImageFeatures as ImageFeatures
    from repa.metrics.inception import InceptionV3 as InceptionV3
    from repa.metrics.inception import load_inception as load_inception
    from repa.metrics.manifold import PrecisionRecall as PrecisionRecall
    from repa.metrics.manifold import precision_recall as precision_recall
    from repa.metrics.manifold import precision_recall_in_half as precision_recall_in_half
else:
    __getattr__, __dir__, __all__ = exports(__name__)
