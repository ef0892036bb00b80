"""Layer 1: distances between sets of features. Knows nothing of images, models or files of samples."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "PrecisionRecall": "manifold",
        "Statistics": "statistics",
        "frechet_distance": "frechet",
        "inception_score": "score",
        "kernel_distance": "kernel",
        "precision_recall": "manifold",
    },
)
