"""How the process holds the memory of its tensors. Knows nothing of models."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate
from weakref import WeakValueDictionary

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Bytes: where tensors in common memory begin, a cache line, and a huge page of x86-64 and of most ARM64 systems.
LINE, HUGE_PAGE = 64, 2**21
#: The memory of tensors in huge pages, by each one's address, as long as it lives.
_regions: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
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


def in_huge_pages(sizes: Sequence[int]) -> list[Tensor]:
    """Writable uint8 tensors of so many bytes, all zero, on the CPU: side by side in memory that asks for pages of 2 MiB, where the system takes such
    wishes (Linux) and they fill one; else each by itself. The memory stays as long as one of them does.

    For what a decoded token reads all of, weights and cache: the processor reads ahead no further than a page, and has to look up each
    (docs/experiments.md, "pages of 2 MB").
    """
    starts = list(accumulate((-(-n // LINE) * LINE for n in sizes), initial=0))
    memory = _huge_memory(starts[-1]) if starts[-1] >= HUGE_PAGE else None
    if memory is None:
        return [torch.zeros(n, dtype=torch.uint8, device="cpu") for n in sizes]
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    tensors = [_zeros_at(memory, first + start, n) for start, n in zip(starts, sizes, strict=False)]
    _regions.update((t.data_ptr(), memory) for t in tensors if t.numel())
    return tensors


def _huge_memory(n_bytes: int) -> mmap.mmap | None:
    """Memory of which whole huge pages hold `n_bytes`, wherever they begin; None where there is none to ask for."""
    try:
        memory = mmap.mmap(-1, -(-n_bytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError) as error:  # other systems; a kernel without them, or too little memory
        logger.info("memory: small pages (%s)", error)
        return None
    return memory


def _zeros_at(memory: mmap.mmap, start: int, n_bytes: int) -> Tensor:
    """With a storage of its own, so that neither autograd nor what saves tensors takes its neighbours for the same."""
    if not n_bytes:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=start)


@torch.inference_mode(False)
@torch.no_grad()
def move_to_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Moves what is on the CPU and contiguous there, one tensor at a time, into memory of its own, unless all of it lies in such memory or there is none.
    Tensors that share memory no longer do. Mutates the tensors' `data`."""
    tensors = [t for t in tensors if t.device.type == "cpu" and t.is_contiguous() and t.numel()]
    if all(t.data_ptr() in _regions for t in tensors):
        return
    places = in_huge_pages([t.nbytes for t in tensors])
    if places[0].data_ptr() in _regions:
        for t, place in zip(tensors, places, strict=True):
            t.data = place.view(t.dtype).view(t.shape).copy_(t.detach())
