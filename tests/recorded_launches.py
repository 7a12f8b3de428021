"""A CUDA graph's semantics on a CPU, for tests: what a function does to tensors is recorded once and replayed on the same memory.

What is recorded are PyTorch's operators and launches of interpreted Triton kernels, with the tensors they met and the numbers they were given: both
stay as they were, as in a graph. Results hold NaN until a replay computes them. What a graph can't record (whatever waits for the device, or
copies data from Python's side) raises RuntimeError.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount", "repeat_interleave.Tensor", "item")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches, self.fresh = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func).removeprefix("aten.")
        if name.startswith(WAITS):
            raise RuntimeError(f"{func} waits for the device: it can't be recorded")
        if name.startswith("lift_fresh") and args[0].dim() > 0:
            raise RuntimeError("a tensor made of Python's numbers is copied to the device: it can't be recorded")
        out = func(*args, **kwargs)
        outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)}
        fresh = [t for t in outs if t.untyped_storage().data_ptr() not in known]
        self.fresh += fresh

        def launch() -> None:
            again = func(*args, **kwargs)
            for old, new in zip(outs, again if isinstance(again, (tuple, list)) else [again], strict=True):
                if any(old is f for f in fresh):
                    old.copy_(new)

        if fresh or func._schema.is_mutable:
            self.launches.append(launch)
        return out


def record(piece):
    """As `graphs.cuda_graph`."""
    recording = _Recording()

    def run(kernel, *args, **kwargs):
        def launch() -> None:
            with _disable_current_modes():
                original(kernel, *args, **kwargs)

        launch()
        recording.launches.append(launch)

    original = InterpretedFunction.run
    with patch.object(InterpretedFunction, "run", run), recording:
        results = piece()
    for t in recording.fresh:
        if t.is_floating_point():
            t.fill_(float("nan"))

    def replay() -> None:
        for launch in recording.launches:
            launch()

    return replay, results
