"""Sampling: from seeds to images with only a run folder; sharded over processes and resumable."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.sampling.config import SampleConfig as SampleConfig
    from repa.sampling.inputs import about_classes as about_classes
    from repa.sampling.inputs import drawn_classes as drawn_classes
    from repa.sampling.samples import Samples as Samples
    from repa.sampling.samples import generate as generate
    from repa.sampling.samples import prepared as prepared
    from repa.sampling.writing import write_samples as write_samples
else:
    __getattr__, __dir__, __all__ = exports(__name__)
