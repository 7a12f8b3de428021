"""The state of a training run on disk: a folder per step, so that a kill at any moment leaves a whole one to go on from."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dualbranch.storage import MAX_JSON, CheckpointError, parse_json, read_manifest, read_verified, remove, sync_folder, verify, write_manifest, write_text
from dualbranch.tensor_file import load_tensors, save_tensors

FORMAT = "dualbranch-state"


@dataclass(frozen=True)
class TrainingState:
    """What `load_latest_state` found: everything `save_state` was given, tensors on the CPU."""

    step: int
    model_state: dict[str, Any]
    optimizer_state: dict[Any, Any]
    meta: dict[str, Any]
    folder: Path


def save_state(
    folder: str | os.PathLike,
    step: int,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[Any, Any],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the state of a training run after `step` as `folder/step-00000123`, and return that folder.

    The three mappings hold tensors, numbers, str, None, and dicts (keys str or int), lists and tuples of these, nested at
    will. Afterwards only the `keep` newest states up to `step` remain; states beyond `step` are of an abandoned attempt
    and go too. Raises ValueError naming the entry of any other type.
    """
    folder = Path(folder)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r}, needed an int >= 0")
    tensors: dict[str, Tensor] = {}
    tree = {
        name: _flatten(value, name, tensors)
        for name, value in (("model", model_state), ("optimizer", optimizer_state), ("meta", meta))
    }
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for leftover in folder.glob(".step-*.tmp"):
        remove(leftover)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "tensors.safetensors", tensors, {})
    write_text(temporary / "state.json", json.dumps({"step": step, **tree}))
    write_manifest(temporary, FORMAT, {})
    if final.exists():  # the same step again, as after a fall back; the state before it is still there
        _discard(final)
    os.rename(temporary, final)
    sync_folder(folder)
    states = _state_folders(folder)
    kept = [path for path in states if _step_of(path) <= step][-max(1, keep) :]
    for path in states:
        if path not in kept:
            _discard(path)
    return final


def _discard(state: Path) -> None:
    """Never half removed under its own name."""
    discarded = state.with_name(f".{state.name}.old.tmp")
    os.rename(state, discarded)
    remove(discarded)


def load_latest_state(folder: str | os.PathLike) -> TrainingState | None:
    """The newest valid state under `folder`, or None if there is none at all. Damaged ones are passed over with a warning.

    Raises CheckpointError if there are states and every one is damaged.
    """
    folders = _state_folders(Path(folder))
    failures = []
    for path in reversed(folders):
        try:
            return _load_state(path)
        except CheckpointError as error:
            failures.append(str(error))
            warnings.warn(f"damaged training state passed over: {error}", stacklevel=2)
    if failures:
        raise CheckpointError(f"{folder}: all {len(failures)} training states are damaged; delete them to start over. {failures[0]}")
    return None


def _load_state(folder: Path) -> TrainingState:
    manifest = read_manifest(folder, FORMAT)
    for name in ("state.json", "tensors.safetensors"):
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder}: the manifest has no {name}; delete this state")
    path = verify(folder, manifest, "tensors.safetensors")
    tensors = load_tensors(path)
    text = read_verified(folder, manifest, "state.json", 64 * MAX_JSON)
    tree = parse_json(folder / "state.json", text)
    try:
        return TrainingState(
            int(tree["step"]),
            _unflatten(tree["model"], tensors),
            _unflatten(tree["optimizer"], tensors),
            _unflatten(tree["meta"], tensors),
            folder,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: not a training state ({error}); delete this state") from error


def _state_folders(folder: Path) -> list[Path]:
    """Complete states, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON that `_unflatten` turns back, its tensors moved into `tensors` under unique names."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{path}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise ValueError(f"{path}: key {key!r} is {type(key).__name__}, needed str or int")
            pairs.append([key, _flatten(item, f"{path}.{key}", tensors)])
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise ValueError(f"{path} is {type(value).__name__}, needed a tensor, number, str, None, dict, list or tuple")


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return content
    raise ValueError(f"unknown entry {kind!r}")
