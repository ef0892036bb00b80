"""Evaluation: uint8 images, from files or straight from a sampler, against a reference, by Inception or any encoder."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "EvaluateConfig": "config",
        "ReferenceConfig": "config",
        "evaluate": "measure",
        "evaluate_file": "jobs",
        "evaluate_stream": "jobs",
        "load_judge": "judges",
        "make_reference": "jobs",
        "open_images": "sources",
        "Reference": "reference",
        "reference_of": "reference",
    },
)
