"""Whether freed memory stays with the process, measured by page faults in a separate process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import repa

FAULTS = """
import resource, sys
sys.path.insert(0, {src!r})
import numpy as np
from repa.base.launch import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
blocks = lambda: [np.ones(2**20) for _ in range(2)]  # 8 MiB each, written to
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_reused_without_new_pages():
    def faults(keep: bool) -> int:
        code = FAULTS.format(src=str(Path(repa.__file__).parents[1]), keep=keep)
        # No NumPy threads, which may have separate heaps, and no huge pages, which cause few faults anyway.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMPY_MADVISE_HUGEPAGE": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        return int(done.stdout)

    given_back, kept = faults(False), faults(True)
    assert given_back > 20_000  # 20 blocks of 2,048 pages of 4 KiB, nearly all new
    assert kept < given_back / 20
