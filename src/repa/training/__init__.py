"""Training: the objective, the state that survives a restart, and one loop."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.training.config import OptimizerConfig as OptimizerConfig
    from repa.training.config import PreviewConfig as PreviewConfig
    from repa.training.config import TrainConfig as TrainConfig
    from repa.training.loop import Hook as Hook
    from repa.training.loop import train as train
    from repa.training.objective import Losses as Losses
    from repa.training.objective import Objective as Objective
    from repa.training.state import TrainState as TrainState
else:
    __getattr__, __dir__, __all__ = exports(__name__)
