"""repa: representation alignment (REPA, arXiv 2410.06940) for diffusion transformers."""

import sys
from itertools import pairwise

if ("-m", "repa") in pairwise(sys.orig_argv) and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the current folder first: a csv.py there would run in place of Python's own

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from repa.base.imports import exports

try:
    __version__ = version("repa")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

if TYPE_CHECKING:
    from repa import alignment as alignment
    from repa import analysis as analysis
    from repa import autoencoders as autoencoders
    from repa import conditions as conditions
    from repa import data as data
    from repa import diffusion as diffusion
    from repa import encoders as encoders
    from repa import evaluation as evaluation
    from repa import metrics as metrics
    from repa import models as models
    from repa import recipes as recipes
    from repa import report as report
    from repa import runs as runs
    from repa import sampling as sampling
    from repa import training as training
    from repa.alignment import Alignment as Alignment
    from repa.alignment import attach as attach
    from repa.analysis import cka as cka
    from repa.analysis import cknna as cknna
    from repa.autoencoders import load_autoencoder as load_autoencoder
    from repa.base.trust import trust as trust
    from repa.data import FeatureCache as FeatureCache
    from repa.data import open_data as open_data
    from repa.data import open_source as open_source
    from repa.diffusion import Denoiser as Denoiser
    from repa.encoders import load_encoder as load_encoder
    from repa.metrics import frechet_distance as frechet_distance
    from repa.models import DiT as DiT
    from repa.models import build_model as build_model
    from repa.runs import load_run as load_run
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("__version__",))
