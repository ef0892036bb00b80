"""Scripts that run Triton kernels in its interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import repa

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(script: str) -> None:
    """Run a script in a separate process, because Triton selects its interpreter at import; it must print "equal"."""
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(repa.__file__).parents[1]), *sys.path]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]
