"""Safetensors files: written whole, and read after checking that the header accounts for every byte of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dualbranch.memory import in_huge_pages
from dualbranch.storage import MAX_JSON, CheckpointError, parse_json
from dualbranch.whole_file import whole_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What weights may be saved as."""
_STORED = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32,
    "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""What a file may hold."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header; `begin`: where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` as safetensors, whole or not at all. Makes the folder.

    Takes tensors of any device and layout; those that share memory are stored once each.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    try:
        with whole_file(path) as temporary:
            safetensors.torch.save_file(plain, temporary, dict(metadata) if metadata else None)
    except SafetensorError as error:  # a full disk, say: it is no OSError there
        raise OSError(f"{path}: can't be written ({error})") from error


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError if its header doesn't fit its size."""
    read_header(Path(path))
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); copy or save it again") from error


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """As `load_tensors`, for the weights of a model: read into memory for tensors that every token reads (`memory.in_huge_pages`)."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            entries = _header_of(file, Path(path))
            sizes = [math.prod(entry.shape) * _STORED[entry.dtype].itemsize for entry in entries.values()]
            for (name, entry), place in zip(entries.items(), in_huge_pages(sizes), strict=True):
                file.seek(entry.begin)
                if file.readinto(memoryview(place.numpy())) < place.numel():
                    raise OSError("it ends early")
                tensors[name] = place.view(_STORED[entry.dtype]).view(entry.shape)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error}); copy or save it again") from error
    return tensors


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names, types and shapes in a safetensors file, after checking that they account for each of its bytes."""
    try:
        with open(path, "rb") as file:
            return _header_of(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error


def _header_of(file: BufferedReader, path: Path) -> dict[str, TensorEntry]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_JSON):
        if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04":  # lengths may begin so, too
            raise CheckpointError(f"{path}: this is a pickle file, which can run code; it isn't read, give safetensors")
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({size} bytes); save it again")
    header = parse_json(path, file.read(length))
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header isn't a table of tensors; save it again")
    header.pop("__metadata__", None)
    spans, entries = [], {}
    for name, entry in header.items():
        try:
            shape, (begin, end), item = entry["shape"], entry["data_offsets"], _STORED[entry["dtype"]].itemsize
            if not isinstance(shape, list) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, begin, end)):
                raise ValueError("negative size")
            if math.prod(max(n, 1) for n in shape) >= 2**63:  # of none, or of more than any tensor
                raise ValueError("too large")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name} has a malformed header entry; save it again") from error
        if math.prod(shape) * item != end - begin:
            raise CheckpointError(
                f"{path}: tensor {name} has {end - begin} bytes, shape {shape} of {entry['dtype']} needs"
                f" {math.prod(shape) * item}; save it again"
            )
        spans.append((begin, end))
        entries[name] = TensorEntry(entry["dtype"], tuple(shape), 8 + length + begin)
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


def check_tensors(path: Path, header: dict[str, TensorEntry], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes and kinds of numbers in the file are those of the tensors of the model of `config.json`."""
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
    for name, tensor in expected.items():
        shape, kinds = tuple(tensor.shape), ("F16", "BF16", "F32") if tensor.is_floating_point() else ("I32",)
        if header[name].dtype not in kinds:
            raise CheckpointError(f"{path}: tensor {name} holds {header[name].dtype}, needed {' or '.join(kinds)}; save it again")
        if header[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(header[name].shape)}, config.json asks for {list(shape)};"
                " the two belong to different models: save it again"
            )
