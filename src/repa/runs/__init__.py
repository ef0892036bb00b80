"""Run folders: file names, checkpoints, metrics, and loading a trained network."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.runs.checkpoint import Checkpoint as Checkpoint
    from repa.runs.checkpoint import load_checkpoint as load_checkpoint
    from repa.runs.checkpoint import save_checkpoint as save_checkpoint
    from repa.runs.loading import LoadedRun as LoadedRun
    from repa.runs.loading import load_run as load_run
    from repa.runs.log import MetricsLog as MetricsLog
    from repa.runs.log import read_metrics as read_metrics
    from repa.runs.writer import Writer as Writer
else:
    __getattr__, __dir__, __all__ = exports(__name__)
