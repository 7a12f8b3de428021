"""How the process holds the memory of its tensors. Knows nothing of models."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

#: Of glibc's malloc.h. The second can be 32 MiB at most: a tensor larger than that still comes from the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Has the C library keep what tensors free for the next ones, from now on and for the whole process; returns whether it does (glibc alone).

    By default every large tensor is fetched from the system and given back, and the processor takes a fault for each of its pages: a quarter of a training
    step of 1,024 tokens and a third of a prefill of 128 went into that (docs/experiments.md). The process then holds its peak until it ends. What is
    free at the call goes back first (40 MB after reading a large tokenizer): call it once the weights are as they stay.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        logger.info("memory: this C library has no mallopt; freed memory goes back to the system")
        return False
    trim(0)
    return bool(mallopt(M_MMAP_THRESHOLD, 32 * 2**20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
