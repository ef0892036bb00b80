"""Layer 1: the Inception network of the FID, and distances between sets of features. Knows nothing of files of samples."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "InceptionFeatures": "inception",
        "InceptionV3": "inception",
        "PrecisionRecall": "manifold",
        "RunningScore": "score",
        "Statistics": "statistics",
        "frechet_distance": "frechet",
        "inception_score": "score",
        "kernel_distance": "kernel",
        "load_inception": "inception_weights",
        "precision_recall": "manifold",
        "precision_recall_in_half": "half",
    },
)
