"""repa: representation alignment (REPA, arXiv 2410.06940) for diffusion transformers."""

import sys
from itertools import pairwise

if ("-m", "repa") in pairwise(sys.orig_argv) and sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the current folder first: a csv.py there would run in place of Python's own

from importlib.metadata import PackageNotFoundError, version

from repa.base.lazy import exports

try:
    __version__ = version("repa")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

_rooms = {
    "trust": "base.trust",
    "Alignment": "alignment",
    "attach": "alignment",
    "DiT": "models",
    "build_model": "models",
    "open_data": "data",
    "open_source": "data",
    "FeatureCache": "data",
    "load_encoder": "encoders",
    "load_autoencoder": "autoencoders",
    "load_run": "runs",
    "Denoiser": "diffusion",
    "cknna": "analysis",
    "cka": "analysis",
    "frechet_distance": "metrics",
}
__getattr__, __dir__, __all__ = exports(
    __name__,
    _rooms,
    local=("__version__",),
    rooms=(
        "alignment",
        "analysis",
        "autoencoders",
        "conditions",
        "data",
        "diffusion",
        "encoders",
        "evaluation",
        "metrics",
        "models",
        "recipes",
        "report",
        "runs",
        "sampling",
        "training",
    ),
)
