"""Run folders: names of files, checkpoints, metrics, and a trained network back from a folder alone."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "LoadedRun": "loading",
        "load_run": "loading",
        "save_checkpoint": "checkpoint",
        "load_checkpoint": "checkpoint",
        "Checkpoint": "checkpoint",
        "Writer": "writer",
        "MetricsLog": "log",
        "read_metrics": "log",
    },
)
