"""Hugging Face folders: `config.json` with `model.safetensors`, whole or in shards.

`read_folder` looks at the config and at the headers alone; `families.build` makes the model of them. Read with the suspicion of
`dualbranch.storage`: sizes are accounted for before a tensor is loaded, links out of the folder aren't followed, pickle is never read.
Tokenizers and chat templates: `dualbranch.tokenizer_hf`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualbranch.storage import MAX_JSON, PICKLE_SUFFIXES, CheckpointError, check_inside, link_root, parse_json, read_bytes
from dualbranch.tensor_file import read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARDS = 1024
DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a safetensors file; calling it reads it. `shape` is known before."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        """On the CPU, as stored."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {self.name} is {self.dtype}, needed {', '.join(DTYPES)}; give a checkpoint that isn't quantised")
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {self.name} can't be read ({error})") from error


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` looks like a Hugging Face folder, not one of ours (which has a manifest)."""
    path = Path(path)
    return (path / "config.json").exists() and not (path / "manifest.json").exists()


def read_folder(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """`(config, tensors)` of a Hugging Face folder: config.json as a dict, and a loader for every tensor in its safetensors files.

    Links may lead to other files of the folder, and in a download cache (`snapshots/REVISION/`) to its `blobs`. Raises CheckpointError naming
    the file or tensor: nothing there, no safetensors, truncated files, links elsewhere, an index that doesn't agree with its shards.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    config = _read_json(folder, "config.json")
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return config, _tensors_of(folder, WEIGHTS)
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(f"{folder / pickles[0]}: safetensors only: a pickle file can run code, it isn't read")
        raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX}")
    weight_map = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is missing or malformed")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{folder / INDEX}: {len(shards)} shards, refused above {MAX_SHARDS}")
    for shard in shards:
        if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in this folder")
        check_inside(link_root(folder), folder / shard)
    tensors = {}
    for shard in shards:
        found = _tensors_of(folder, shard)
        named = {name for name, file in weight_map.items() if file == shard}
        if named != set(found):
            name = min(named ^ set(found))
            raise CheckpointError(f"{folder / shard}: tensor {name} is {'missing' if name in named else 'not in the index'}; index and shards don't agree")
        tensors |= found
    return config, tensors


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    check_inside(link_root(folder), folder / name)
    values = parse_json(folder / name, read_bytes(folder / name, MAX_JSON))
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / name}: not a JSON object")
    return values


def _tensors_of(folder: Path, name: str) -> dict[str, LazyTensor]:
    path = folder / name
    check_inside(link_root(folder), path)
    return {tensor: LazyTensor(path, tensor, entry.dtype, entry.shape) for tensor, entry in read_header(path).items()}
