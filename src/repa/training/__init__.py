"""Training: the objective, the state that survives a restart, and one loop."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "TrainConfig": "config",
        "OptimizerConfig": "config",
        "PreviewConfig": "config",
        "Objective": "objective",
        "Losses": "objective",
        "TrainState": "state",
        "Hook": "loop",
        "train": "loop",
    },
)
