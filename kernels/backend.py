"""Which implementation runs: `auto`, `reference` or `triton`. Called by `ops.py` on every op; imports nothing heavy.

`auto` takes Triton where it runs compiled (CUDA tensors, compute capability 8.0 or newer, a shape and dtype that the kernels know) and
plain PyTorch (`blockwise/`) everywhere else; each choice is logged once, with its reason. `triton` never falls back: it raises.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256

_log = logging.getLogger(__name__)
_state = {"name": "auto"}
_logged: set[tuple[str, str]] = set()


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones there: recent GPUs, and CPUs with AVX512-BF16 or AMX. (Elsewhere they are a hundred times slower.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_backend(name: str) -> None:
    """Chooses the implementation for the whole process. Raises ValueError for a name that is unknown or cannot run here."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        _require(_why_not_here())
    _state["name"] = name


def get_backend(x: Tensor | None = None) -> str:
    """What computes the attention of queries x (B, T, H, D): 'reference', 'triton' or 'blockwise' (plain PyTorch). Logs the reason once.

    Without x: what this process would take for common shapes on its GPU, or on its CPU if it has none.
    Raises ValueError where `triton` was asked for and cannot compute x.
    """
    if _state["name"] == "reference":
        return "reference"
    if _state["name"] == "triton":
        if x is not None:
            _require(_why_not_for(x))
        return _chosen("triton", "asked for" + (", interpreted on the CPU: for checking, not for speed" if interpreted() else ""))
    reason = _why_not_here(compiled=True) or (None if x is None else _why_not_for(x))
    return _chosen("triton", "the kernels run on this GPU") if reason is None else _chosen("blockwise", f"plain PyTorch, because {reason}")


def interpreted() -> bool:
    """Whether Triton's kernels, once imported, run in its interpreter: it reads this variable when it meets a kernel."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot run: {reason}; or use backend 'auto'")


def _chosen(name: str, reason: str) -> str:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        _log.info("attention backend: %s (%s)", name, reason)
    return name


def _why_not_here(compiled: bool = False) -> str | None:
    """Why Triton cannot run in this process, and what to change; None if it can. compiled: the interpreter does not count."""
    if not _has_triton():
        return "the triton package is not installed (pip install triton, on Linux x86_64)"
    if interpreted():
        return "TRITON_INTERPRET is set, and its interpreter is for checking (unset it)" if compiled else None
    if not torch.cuda.is_available():
        return "there is no CUDA device" + ("" if compiled else " (or set TRITON_INTERPRET=1 before the start: an interpreter for checking)")
    return None


def _why_not_for(x: Tensor) -> str | None:
    """Why Triton cannot compute the attention of x (B, T, H, D), and what to change; None if it can."""
    if not interpreted():
        if x.device.type != "cuda":
            return f"the tensors are on {x.device.type} (move them to a CUDA device; or set TRITON_INTERPRET=1 before the start: an interpreter for checking)"
        if _capability(x.device.index or 0) < MIN_CAPABILITY:
            return f"the GPU has compute capability {_capability(x.device.index or 0)}, and the kernels need {MIN_CAPABILITY} or newer"
    if x.dtype not in TRITON_DTYPES:
        return f"the kernels compute in bf16, fp16 and fp32, not in {str(x.dtype).removeprefix('torch.')} (convert q, k, v)"
    if x.shape[-1] % 16 or x.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {x.shape[-1]}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
