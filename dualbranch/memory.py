"""How the process holds the memory of its tensors. Knows nothing of models."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Bytes: where tensors in common memory begin, a cache line, and what such memory is a multiple of, a huge page of x86-64 and of most ARM64 systems.
LINE, HUGE_PAGE = 64, 2**21

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


def move_to_huge_pages(tensors: Iterable[Tensor]) -> bool:
    """Moves tensors on the CPU side by side into memory that asks for pages of 2 MiB; returns whether the system takes such wishes (Linux does).

    Decoding reads every weight once per token, and the processor reads ahead no further than a page: a tenth of the time (docs/experiments.md).
    They move one at a time. Tensors that are not contiguous stay; those that share memory no longer do. Mutates the tensors' `data`.
    """
    tensors = [t for t in tensors if t.device.type == "cpu" and t.is_contiguous() and t.numel()]
    ends = [0]
    for t in tensors:
        ends.append(ends[-1] + -(-t.nbytes // LINE) * LINE)
    try:
        memory = mmap.mmap(-1, -(-ends[-1] // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError, ValueError) as error:  # other systems; a kernel without them; nothing to move
        logger.info("memory: weights stay in small pages (%s)", error)
        return False
    for t, start in zip(tensors, ends, strict=False):
        t.data = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape).copy_(t)
    return True
