"""Sampling: seeds to images, from a run folder alone; sharded over processes and resumable."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "SampleConfig": "config",
        "about_classes": "labels",
        "drawn_classes": "labels",
        "generate": "samples",
        "Samples": "samples",
        "prepared": "samples",
        "write_samples": "samples",
    },
)
