"""Evaluation: an iterable of uint8 batches against a reference, in any encoder's features."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "EvaluateConfig": "config",
        "evaluate": "measure",
        "evaluate_file": "measure",
        "Reference": "reference",
        "reference_of": "reference",
        "read_samples": "samples",
    },
)
