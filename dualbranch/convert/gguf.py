"""GGUF files as Hugging Face checkpoints: a config, tensors under their Hugging Face names and in that layout, and the raw metadata.

`read_gguf` reads the header with suspicion (every count is held against the bytes that are there before anything is built from it) and
touches no weight; each tensor is read and dequantised to fp32 when its loader is called, so a model never lies in memory twice.
`families.build` takes the result; tokenizers are made from the metadata by `dualbranch.tokenizer_hf`. Block formats are decoded by the
`gguf` package. Writing GGUF: `gguf_writer.py`, by the same tables.

What llama.cpp's converter changed is undone: rows of q and k of the llama architecture go back to halves (it interleaves them), and
Gemma's norms become Hugging Face's `w` (GGUF stores `1 + w`; the model adds the 1).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dualbranch.config import LIMITS
from dualbranch.storage import CheckpointError

#: Tensor types that can be read.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
#: general.architecture -> model_type of the config.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text", "phi3": "phi3"}

_SIZES = {int(gguf.GGMLQuantizationType[name]): (name, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]) for name in TYPES}
_MAX_FIELDS, _MAX_TENSORS, _MAX_STRING, _MAX_ITEMS = 4096, 65_536, 2**24, 2**24
_CHUNK = 2**22  # elements dequantised at a time: bounds the temporaries
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in row-major order, `begin` and `n_bytes` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFCheckpoint:
    """What `read_gguf` found. `config`: Hugging Face's config.json, with `model_type`. `tensors[name]()` is an fp32 tensor in
    Hugging Face's layout, read anew at each call. `metadata`: every field of the header; long number arrays are NumPy views of the file."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Callable[[], Tensor]]
    metadata: dict[str, Any] = field(repr=False)


def read_gguf(path: str | os.PathLike) -> GGUFCheckpoint:
    """The checkpoint in the GGUF file at `path`; no weight is read yet.

    Raises CheckpointError naming file and field or tensor: not GGUF, truncated, counts or shapes that the bytes can't hold, an
    architecture, tensor type or feature that isn't supported, tensors missing or of another shape than the metadata says.
    """
    path = Path(path)
    data, metadata, infos = read_header(path)
    n_files = metadata.get("split.count", 1)
    if isinstance(n_files, int) and n_files > 1:
        raise CheckpointError(f"{path}: one of the {n_files} files of a model; merge them: llama-gguf-split --merge FIRST.gguf MERGED.gguf")
    config = _config(path, metadata, infos)
    tensors: dict[str, Callable[[], Tensor]] = {}
    wanted = _tensors(config, infos)
    for name, (hf_name, shape, change) in wanted.items():
        info = infos.get(name)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} is missing; the file has {len(infos)} of the {len(wanted)} tensors its metadata asks for, or others")
        if info.shape != shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {list(info.shape)}, the metadata asks for {list(shape)}")
        tensors[hf_name] = partial(_load, path, data, info, change)
    extra = [name for name in infos if name not in wanted and name not in _ROPE_TENSORS]
    if extra:
        raise CheckpointError(f"{path}: tensor {extra[0]} isn't part of a {config['model_type']} model as known here ({len(extra)} aren't)")
    return GGUFCheckpoint(path, config, tensors, metadata)


# ---- the header


class _Cursor:
    """Reads the header front to back; every length is checked against what is left. `what` names the entry in errors."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.what = path, data, 0, "the header"

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.what} {problem}")

    def need(self, n_bytes: int) -> int:
        """Moves past `n_bytes`; returns where they begin."""
        begin = self.at
        if n_bytes > len(self.data) - begin:
            raise self.error(f"needs {n_bytes} bytes at {begin}, the file has {len(self.data)}; it is truncated or damaged, copy it again")
        self.at += n_bytes
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.need(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > _MAX_STRING:
            raise self.error(f"has a string of {length} bytes, refused above {_MAX_STRING}")
        begin = self.need(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise self.error("has a string that isn't UTF-8") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.error(f"has value type {kind}, which GGUF doesn't know")
        kind, n = self.number("I"), self.number("Q")
        if n > _MAX_ITEMS:
            raise self.error(f"has {n} items, refused above {_MAX_ITEMS}")
        if kind == _STRING:
            if 8 * n > len(self.data) - self.at:
                raise self.error(f"has {n} strings, which the file's {len(self.data)} bytes can't hold; it is truncated or damaged")
            return [self.string() for _ in range(n)]
        if kind not in _SCALARS:
            raise self.error(f"is an array of type {kind}, not supported")
        dtype = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(bool)
        return np.frombuffer(self.data, dtype, n, self.need(n * dtype.itemsize)) if n else np.zeros(0, dtype)


def read_header(path: str | os.PathLike) -> tuple[mmap.mmap, dict[str, Any], dict[str, TensorInfo]]:
    """The mapped file, its metadata and where its tensors lie, each wholly inside the file. Raises CheckpointError."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    if size < 24 or data[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file ({size} bytes, beginning {bytes(data[:4])!r})")
    cursor = _Cursor(path, data)
    cursor.at = 4
    version, n_tensors, n_fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version}, versions 2 and 3 (little-endian) can be read")
    for n, limit, what in ((n_fields, _MAX_FIELDS, "metadata fields"), (n_tensors, _MAX_TENSORS, "tensors")):
        if n > limit or 12 * n > size:
            raise CheckpointError(f"{path}: the header announces {n} {what}; refused above {limit}, or beyond what {size} bytes can hold")

    metadata: dict[str, Any] = {}
    for i in range(n_fields):
        cursor.what = f"metadata field {i}"
        key = cursor.string()
        cursor.what = f"metadata field {key[:100]!r}"
        if key in metadata:
            raise cursor.error("stands there twice")
        metadata[key] = cursor.value()

    entries = []
    for i in range(n_tensors):
        cursor.what = f"tensor {i}"
        name = cursor.string()
        cursor.what = f"tensor {name[:100]!r}"
        n_dims = cursor.number("I")
        if not 1 <= n_dims <= 4:
            raise cursor.error(f"has {n_dims} dimensions, needed 1 to 4")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]  # GGUF counts from the innermost
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))

    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {str(alignment)[:40]}, needed a power of two")
    data_begin = -(-cursor.at // alignment) * alignment
    infos: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        cursor.what = f"tensor {name[:100]!r}"
        if name in infos:
            raise cursor.error("stands there twice")
        if kind not in _SIZES:
            known = {int(t): t.name for t in gguf.GGMLQuantizationType}
            raise cursor.error(f"has type {known.get(kind, kind)}, which isn't read; supported: {', '.join(TYPES)}")
        dtype, block, block_bytes = _SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise cursor.error(f"has shape {list(shape)}; rows of {dtype} come in blocks of {block}")
        n_bytes = math.prod(shape) // block * block_bytes
        begin = data_begin + offset
        if offset % alignment or n_bytes > size - begin:
            what = f"of shape {list(shape)} ({dtype}) needs {n_bytes} bytes at {begin}, the file has {size}"
            raise cursor.error(f"{what}; it is truncated or damaged, copy it again")
        infos[name] = TensorInfo(name, dtype, shape, begin, n_bytes)
    reached, last = 0, ""
    for info in sorted(infos.values(), key=lambda t: t.begin):
        if info.begin < reached:
            raise CheckpointError(f"{path}: tensors {last!r} and {info.name!r} overlap")
        reached, last = info.begin + info.n_bytes, info.name
    return data, metadata, infos


# ---- metadata -> config.json


class _Fields:
    """Typed access to the metadata under one architecture's prefix."""

    def __init__(self, path: Path, metadata: dict[str, Any], arch: str) -> None:
        self.path, self.metadata, self.arch = path, metadata, arch

    def get(self, key: str, kind: type | tuple[type, ...], low: float, high: float, default: Any = None) -> Any:
        name = f"{self.arch}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata field {name} is missing")
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():  # one number per layer, all the same
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise CheckpointError(f"{self.path}: metadata field {name} is {str(value)[:60]}, needed one number in [{low:g}, {high:g}]")
        return value

    def integer(self, key: str, high: int, default: int | None = None, low: int = 1) -> int:
        return self.get(key, int, low, high, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A float as it was meant: fp32 1e-5 is 1e-05, not 9.99999974e-06."""
        return float(f"{float(self.get(key, (int, float), 0.0, 1e12, default)):.7g}")


def _config(path: Path, metadata: dict[str, Any], infos: dict[str, TensorInfo]) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise CheckpointError(f"{path}: general.architecture is {str(arch)[:60]!r}, supported: {', '.join(ARCHITECTURES)}")
    f = _Fields(path, metadata, arch)
    if f"{arch}.expert_count" in metadata and f.integer("expert_count", 2**20, low=0):
        raise CheckpointError(f"{path}: metadata field {arch}.expert_count says mixture of experts, which isn't supported")
    embed = infos.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing or isn't a matrix")
    if embed.shape[0] > LIMITS["vocab_size"]:
        raise CheckpointError(f"{path}: tensor token_embd.weight has {embed.shape[0]} rows, refused above {LIMITS['vocab_size']}")
    d_model = f.integer("embedding_length", LIMITS["d_model"])
    n_heads = f.integer("attention.head_count", LIMITS["n_heads"])
    head_dim = f.integer("attention.key_length", LIMITS["head_dim"], default=max(1, d_model // n_heads))
    n_rotary = f.integer("rope.dimension_count", LIMITS["head_dim"], default=head_dim)
    if f.integer("attention.value_length", LIMITS["head_dim"], default=head_dim) != head_dim:
        raise CheckpointError(f"{path}: metadata field {arch}.attention.value_length differs from the key length {head_dim}, which isn't supported")
    if n_rotary > head_dim or (n_rotary < head_dim and arch != "phi3"):
        raise CheckpointError(f"{path}: metadata field {arch}.rope.dimension_count is {n_rotary}, head_dim is {head_dim}; supported for phi3 only")
    n_layers = f.integer("block_count", LIMITS["n_layers"])
    config = {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": embed.shape[0],
        "hidden_size": d_model,
        "intermediate_size": f.integer("feed_forward_length", LIMITS["d_ff"]),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": f.integer("attention.head_count_kv", LIMITS["n_heads"], default=n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": f.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(path, f, infos, n_rotary),
        "max_position_embeddings": f.integer("context_length", LIMITS["max_seq_len"]),
        "tie_word_embeddings": "output.weight" not in infos,
        "hidden_act": "silu",
    }
    if arch != "qwen2" and "blk.0.attn_q.bias" in infos:  # where it goes without saying, Hugging Face's configs don't say it either
        config["attention_bias"] = True
    window = f.integer("attention.sliding_window", 2**31, default=0, low=0) if f"{arch}.attention.sliding_window" in metadata else 0
    if arch == "gemma3":
        pattern = f.integer("attention.sliding_window_pattern", LIMITS["n_layers"], default=6)
        config |= {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            # of the 27B model alone the scale is that of hidden_size / num_attention_heads (llama.cpp knows it by its 62 layers too)
            "query_pre_attn_scalar": d_model // n_heads if n_layers == 62 else head_dim,
            "sliding_window": window or None,
            "sliding_window_pattern": pattern,
            "layer_types": ["full_attention" if (i + 1) % pattern == 0 or not window else "sliding_attention" for i in range(n_layers)],
            "rope_local_base_freq": f.number("rope.freq_base_swa", 10_000.0),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": f.number("final_logit_softcapping", 0.0) or None,
        }
    elif arch == "phi3":
        config |= {"partial_rotary_factor": n_rotary / head_dim, "sliding_window": window or None}
        original = f.integer("rope.scaling.original_context_length", LIMITS["max_seq_len"], default=config["max_position_embeddings"])
        config["original_max_position_embeddings"] = original
    elif window:
        raise CheckpointError(f"{path}: metadata field {arch}.attention.sliding_window is {window}; sliding windows aren't supported for {arch}")
    return config


_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def _rope_scaling(path: Path, f: _Fields, infos: dict[str, TensorInfo], n_rotary: int) -> dict[str, Any] | None:
    def factors(name: str) -> list[float]:
        info = infos[name]
        if info.dtype != "F32" or info.shape != (n_rotary // 2,):
            raise CheckpointError(f"{path}: tensor {name} is {info.dtype} {list(info.shape)}, needed F32 [{n_rotary // 2}]")
        values = np.fromfile(path, "<f4", info.shape[0], offset=info.begin).astype(float)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise CheckpointError(f"{path}: tensor {name} holds values that aren't positive numbers")
        return [float(f"{x:.7g}") for x in values]

    if "rope_freqs.weight" in infos:
        scaling = llama3_scaling(factors("rope_freqs.weight"), f.number("rope.freq_base", 10_000.0))
        if scaling is None:
            raise CheckpointError(f"{path}: tensor rope_freqs.weight isn't Llama 3's scaling of the rotary frequencies; other kinds aren't supported")
        return scaling
    if "rope_factors_long.weight" in infos or "rope_factors_short.weight" in infos:
        missing = [name for name in _ROPE_TENSORS[1:] if name not in infos]
        if missing:
            raise CheckpointError(f"{path}: tensor {missing[0]} is missing beside the other one")
        long, short = factors("rope_factors_long.weight"), factors("rope_factors_short.weight")
        return {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    default = "linear" if f.number("rope.scaling.factor", 0.0) else "none"  # as llama.cpp has it
    kind = f.metadata.get(f"{f.arch}.rope.scaling.type", default)
    if not isinstance(kind, str) or kind not in ("none", "", "linear", "yarn"):
        raise CheckpointError(f"{path}: metadata field {f.arch}.rope.scaling.type is {str(kind)[:40]!r}, supported: none, linear, yarn")
    if kind in ("none", ""):
        return None
    scaling = {"rope_type": kind, "factor": f.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = f.integer("rope.scaling.original_context_length", LIMITS["max_seq_len"])
    return scaling


def llama3_scaling(factors: Sequence[float], rope_theta: float) -> dict[str, Any] | None:
    """The `rope_scaling` of Llama 3 whose divisors of the rotary frequencies are `factors` (head_dim / 2), or None if there is none.

    GGUF keeps the divisors, not the numbers they come from. Between the two ends `1 / divisor` is linear in `1 / wavelength`, which gives the
    numbers back (up to a common scale that changes nothing); the usual ones are tried first.
    """
    f = np.asarray(factors, dtype=float)
    factor = float(f.max())
    turns = rope_theta ** (-np.arange(len(f)) / len(f)) / (2 * math.pi)  # 1 / wavelength

    def divisors(low: float, high: float, original: float) -> np.ndarray:
        smooth = np.clip((original * turns - low) / (high - low), 0.0, 1.0)
        return 1.0 / ((1.0 - smooth) / factor + smooth)

    candidates = [(1.0, 4.0, float(n)) for n in (8192, 4096, 2048, 16384, 32768)]
    between = (f > 1.0 + 1e-4) & (f < factor * (1 - 1e-4))
    if between.sum() >= 2 and factor > 1.0:
        smooth = (1.0 / f[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(turns[between], smooth, 1)
        if slope > 0 > offset:
            candidates.append((1.0, float(1.0 - 1.0 / offset), float(-slope / offset)))
    for low, high, original in candidates:
        if np.allclose(divisors(low, high, original), f, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": round(original),
            }
    return None


# ---- tensors


def _tensors(config: dict[str, Any], infos: dict[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """GGUF name -> (Hugging Face name, shape, change): every tensor a model of this config has."""
    kind = config["model_type"]
    E, F, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, Hk = config["num_attention_heads"], config["num_key_value_heads"]
    norm = "minus one" if kind == "gemma3_text" else None
    q_change, k_change = (("interleaved", H), ("interleaved", Hk)) if kind == "llama" else (None, None)
    out = {"token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], E), None), "output_norm.weight": ("model.norm.weight", (E,), norm)}
    if not config["tie_word_embeddings"]:
        out["output.weight"] = ("lm_head.weight", (config["vocab_size"], E), None)
    for i in range(config["num_hidden_layers"]):
        def add(name: str, hf_name: str, shape: tuple[int, ...], change: Any = None, i: int = i) -> None:
            out[f"blk.{i}.{name}"] = (f"model.layers.{i}.{hf_name}", shape, change)

        if kind == "phi3":  # fused in both formats, in the same order
            add("attn_qkv.weight", "self_attn.qkv_proj.weight", ((H + 2 * Hk) * D, E))
            add("ffn_up.weight", "mlp.gate_up_proj.weight", (2 * F, E))
        else:
            for letter, n_heads, change in (("q", H, q_change), ("k", Hk, k_change), ("v", Hk, None)):
                add(f"attn_{letter}.weight", f"self_attn.{letter}_proj.weight", (n_heads * D, E), change)
                if kind == "qwen2" or config.get("attention_bias"):
                    add(f"attn_{letter}.bias", f"self_attn.{letter}_proj.bias", (n_heads * D,), change)
            add("ffn_gate.weight", "mlp.gate_proj.weight", (F, E))
            add("ffn_up.weight", "mlp.up_proj.weight", (F, E))
        add("attn_output.weight", "self_attn.o_proj.weight", (E, H * D))
        if f"blk.{i}.attn_output.bias" in infos:
            add("attn_output.bias", "self_attn.o_proj.bias", (E,))
        add("ffn_down.weight", "mlp.down_proj.weight", (E, F))
        add("attn_norm.weight", "input_layernorm.weight", (E,), norm)
        if kind in ("qwen3", "gemma3_text"):
            add("attn_q_norm.weight", "self_attn.q_norm.weight", (D,), norm)
            add("attn_k_norm.weight", "self_attn.k_norm.weight", (D,), norm)
        if kind == "gemma3_text":
            add("post_attention_norm.weight", "post_attention_layernorm.weight", (E,), norm)
            add("ffn_norm.weight", "pre_feedforward_layernorm.weight", (E,), norm)
            add("post_ffw_norm.weight", "post_feedforward_layernorm.weight", (E,), norm)
        else:
            add("ffn_norm.weight", "post_attention_layernorm.weight", (E,))
    return out


def _load(path: Path, data: mmap.mmap, info: TensorInfo, change: Any) -> Tensor:
    """One tensor, fp32, in Hugging Face's layout. Raises CheckpointError if it holds NaN or infinity."""
    values = dequantize(data, info)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path}: tensor {info.name} holds NaN or infinity; the file is damaged, copy it again")
    tensor = torch.from_numpy(values)
    if change == "minus one":
        return tensor - 1.0
    if change is not None:  # rows (head, half, pair) were stored as (head, pair, half)
        _, n_heads = change
        return tensor.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return tensor


def dequantize(data: mmap.mmap, info: TensorInfo) -> np.ndarray:
    """The fp32 values of `info`, by chunks of rows, so that temporaries stay small."""
    n_cols = info.shape[-1]
    n_rows = math.prod(info.shape) // n_cols
    rows = np.frombuffer(data, np.uint8, info.n_bytes, info.begin).reshape(n_rows, -1)
    out = np.empty((n_rows, n_cols), np.float32)
    step = max(1, _CHUNK // n_cols)
    kind = gguf.GGMLQuantizationType[info.dtype]
    with np.errstate(all="ignore"):  # what isn't finite is refused by name afterwards
        for r in range(0, n_rows, step):
            part = rows[r : r + step]
            if info.dtype in ("F32", "F16"):
                out[r : r + step] = part.view("<f4" if info.dtype == "F32" else "<f2")
            else:
                out[r : r + step] = gguf.dequantize(part, kind)
    return out.reshape(info.shape)
