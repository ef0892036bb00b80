"""Evaluation: uint8 images, from files or straight from a sampler, against a reference, by Inception or any encoder."""

from typing import TYPE_CHECKING

from repa.base.imports import exports

if TYPE_CHECKING:
    from repa.evaluation.config import EvaluateConfig as EvaluateConfig
    from repa.evaluation.config import ReferenceConfig as ReferenceConfig
    from repa.evaluation.extractors import load_extractor as load_extractor
    from repa.evaluation.images import open_images as open_images
    from repa.evaluation.jobs import evaluate_file as evaluate_file
    from repa.evaluation.jobs import evaluate_stream as evaluate_stream
    from repa.evaluation.jobs import make_reference as make_reference
    from repa.evaluation.measure import evaluate as evaluate
    from repa.evaluation.reference import Reference as Reference
    from repa.evaluation.reference import reference_of as reference_of
else:
    __getattr__, __dir__, __all__ = exports(__name__)
