"""Plain steps that take what the same compiled would take and nothing else, for tests: compiled code reads whatever lies where it expects its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dualbranch import compiled
from dualbranch.runner import BlockStep, plain_steps


def strict_steps(model) -> dict[str, Callable]:
    """`plain_steps(model)`, which raise AssertionError for arguments unlike those that `compiled.example` has a step compiled for."""
    return {name: partial(_checked, name, step, *compiled.example(model, step)) for name, step in plain_steps(model).items()}


def _checked(name: str, step: torch.nn.Module, example: tuple, vary: tuple, *args: Any) -> Any:
    expected, sizes, given = _flat(example), _flat(vary, example), _flat(args)
    assert given.keys() == expected.keys(), f"{name} got {list(given)}"
    for at, tensor in given.items():
        like, may_vary = expected[at], sizes[at] or {}
        assert isinstance(tensor, torch.Tensor), f"{name} got {tensor!r} as {at}"
        fixed = [(i, n) for i, n in enumerate(like.shape) if i not in may_vary]
        assert tensor.dtype == like.dtype and tensor.dim() == like.dim(), (
            f"{name}: {at} is {tensor.dtype} {tuple(tensor.shape)}, not as {like.dtype} {like.shape}"
        )
        assert all(tensor.shape[i] == n for i, n in fixed), f"{name}: {at} has sizes {tuple(tensor.shape)}, compiled for {tuple(like.shape)}"
        is_reach = isinstance(step, BlockStep) and at == len(args) - 2  # nothing is read of it
        assert tensor.is_contiguous() or is_reach, f"{name}: {at} is not contiguous"
    return step(*args)


def _flat(args: tuple, like: tuple | None = None) -> dict[str | int, Any]:
    """The arguments of a step by number, and its weights by name, in their order; `like`: the step's arguments, where these are what varies of each."""
    flat, args = {}, [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]  # what varies of arguments after a star is a tuple of its own
    for i, arg in enumerate(args):
        flat |= arg if isinstance((like or args)[i], dict) else {i: arg}
    return flat
