"""What the C library does with the memory of tensors that a step frees and the next one asks for again. Torch-free."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes: glibc takes no larger threshold
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 32 MiB for its next request; returns whether the C library obeys (glibc).

    By default glibc gives large blocks back to the system at once and takes them anew, and the system clears each page on
    its first touch: every activation, rounded weight and gradient of every step. `python benchmarks/train_step.py` and the
    same with `--return-memory` measure the difference.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, NEVER))
