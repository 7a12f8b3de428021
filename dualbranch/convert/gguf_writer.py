"""Dense models as GGUF files for llama.cpp: the inverse of `gguf.py`, by its tables. `export.py` calls it.

Tensors go through one at a time, so the peak is the model and its largest tensor. What a GGUF file can't say (a scale, a pattern of windows) is found by
reading the written header back: the file is only kept if it describes the same model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from dualbranch.config import DualBranchConfig
from dualbranch.convert import families
from dualbranch.convert.families import Loader
from dualbranch.convert.gguf import ARCHITECTURES, _tensors, read_gguf
from dualbranch.layers import rope_frequencies
from dualbranch.storage import CheckpointError
from dualbranch.tokenizer import TokenizerBase
from dualbranch.tokenizer_hf import gguf_fields
from dualbranch.whole_file import whole_file

#: Names of dtypes -> GGUF's type of matrices. Vectors are always F32.
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1", "q4_0": "Q4_0",
}  # fmt: skip
_UNUSED = 5  # a token's type


def write_gguf(
    path: str | os.PathLike,
    config: DualBranchConfig,
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, Loader],
    tokenizer: TokenizerBase,
    dtype: str = "float32",
    name: str | None = None,
) -> None:
    """Writes `tensors` (Hugging Face names and layout, as `families.hf_tensors` gives them) of the dense model of `config` to the file `path`.

    `dtype`: one of DTYPES; rows that its blocks don't divide are F16. Raises ValueError: an unknown dtype, values that aren't finite in it, a tokenizer
    GGUF has no words for, and settings the file can't hold, by name.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, needed one of {', '.join(DTYPES)}")
    hf_config = dict(hf_config)
    arch = next(a for a, model_type in ARCHITECTURES.items() if model_type == hf_config["model_type"])
    if config.sliding_layers and arch != "gemma3":  # phi3's has a field, which llama.cpp doesn't use
        raise ValueError(f"sliding_layers = {list(config.sliding_layers)[:8]}: llama.cpp has no sliding windows in {arch} models; export it as 'hf'")
    wanted = {their: (name, shape, change) for their, (name, shape, change) in _tensors(hf_config, {}).items()}
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        _add_metadata(writer, arch, config, hf_config, tokenizer, dtype, name or path.stem)
        factors = _rope_factors(config)
        kinds = {}
        for their, (_, shape, _) in wanted.items():
            kind = gguf.GGMLQuantizationType[DTYPES[dtype]] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.F16
            kinds[their] = kind
            plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
            shape = shape if plain else gguf.quant_shape_to_byte_shape(shape, kind)
            kind_of = np.dtype(plain or np.uint8)
            writer.add_tensor_info(their, shape, kind_of, math.prod(shape) * kind_of.itemsize, raw_dtype=None if plain else kind)
        for their, values in factors.items():
            writer.add_tensor_info(their, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for their, (hf_name, _, change) in wanted.items():
            writer.write_tensor_data(_encode(their, _changed(tensors[hf_name]().detach().float().cpu(), change), kinds[their]))
        for values in factors.values():
            writer.write_tensor_data(values)
        writer.close()
        _check(temporary, config)


def _changed(tensor: Tensor, change: Any) -> Tensor:
    """What llama.cpp's converter does to a tensor: the inverse of what the reader does."""
    if change == "minus one":
        return tensor + 1.0
    if change is not None:  # rows (head, half, pair) are stored as (head, pair, half)
        _, n_heads = change
        return tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor


def _encode(name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind.name == "F16":
        tensor = tensor.half()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds NaN, infinity, or what {kind.name} can't hold; choose dtype float32")
    values = tensor.contiguous().numpy()
    return values if kind.name in ("F32", "F16") else gguf.quantize(values, kind)


def _add_metadata(w: gguf.GGUFWriter, arch: str, c: DualBranchConfig, hf_config: Mapping[str, Any], tokenizer: TokenizerBase, dtype: str, name: str) -> None:
    w.add_name(name)
    w.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{DTYPES[dtype]}"])
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(hf_config["max_position_embeddings"])
    w.add_embedding_length(c.d_model)
    w.add_block_count(c.n_layers)
    w.add_feed_forward_length(c.d_ff)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_dimension_count(c.rotary_dim or c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling.kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(c.rope_scaling.kind))
        w.add_rope_scaling_factor(c.rope_scaling.factor)
    if c.rope_scaling.kind in ("yarn", "longrope"):
        w.add_rope_scaling_orig_ctx_len(c.rope_scaling.original_max_seq_len)
    if c.rope_scaling.kind == "longrope":
        w.add_rope_scaling_attn_factors(c.rope_scaling.amplitude)
    if c.sliding_window is not None:
        w.add_sliding_window(c.sliding_window)
    if arch == "gemma3":
        first_full = next((i for i in range(c.n_layers) if i not in c.sliding_layers), c.n_layers)
        w.add_sliding_window_pattern(first_full + 1)
        if c.sliding_rope_theta is not None:
            w.add_rope_freq_base_swa(c.sliding_rope_theta)
        if c.logit_softcap is not None:
            w.add_final_logit_softcapping(c.logit_softcap)
    _add_tokenizer(w, c.vocab_size, tokenizer)


def _add_tokenizer(w: gguf.GGUFWriter, vocab_size: int, tokenizer: TokenizerBase) -> None:
    fields = gguf_fields(tokenizer)
    more = range(tokenizer.vocab_size, vocab_size)  # rows of the embedding that no token has
    w.add_tokenizer_model(fields["model"])
    w.add_tokenizer_pre(fields["pre"])
    w.add_token_list([*fields["tokens"], *(f"[PAD{i}]" for i in more)])
    w.add_token_types([*fields["token_type"], *(_UNUSED for _ in more)])
    if "scores" in fields:
        w.add_token_scores([*fields["scores"], *(-10_000.0 for _ in more)])
    if fields.get("merges"):
        w.add_token_merges(fields["merges"])
    for key, add in (("bos", w.add_bos_token_id), ("eos", w.add_eos_token_id), ("padding", w.add_pad_token_id), ("unknown", w.add_unk_token_id)):
        if f"{key}_token_id" in fields:
            add(fields[f"{key}_token_id"])
    if "add_space_prefix" in fields:
        w.add_add_space_prefix(fields["add_space_prefix"])
    w.add_add_bos_token(fields["add_bos_token"])
    if fields["chat_template"]:
        w.add_chat_template(fields["chat_template"])


def _rope_factors(c: DualBranchConfig) -> dict[str, np.ndarray]:
    """Divisors of the rotary frequencies, where GGUF keeps them as tensors."""
    r = c.rope_scaling
    if r.kind == "llama3":
        plain, _ = rope_frequencies(c.rotary_dim or c.head_dim, c.rope_theta, dataclasses.replace(r, kind="none"))
        scaled, _ = rope_frequencies(c.rotary_dim or c.head_dim, c.rope_theta, r)
        return {"rope_freqs.weight": (plain / scaled).float().numpy()}
    if r.kind == "longrope":
        return {f"rope_factors_{x}.weight": np.array(getattr(r, f"{x}_factors"), np.float32) for x in ("long", "short")}
    return {}


def _check(path: Path, config: DualBranchConfig) -> None:
    """The file describes the model that was written. Raises ValueError naming what it can't say."""
    try:
        read = families.config_of(read_gguf(path).config, config.max_seq_len)
    except CheckpointError as error:
        raise ValueError(f"GGUF can't hold this model: what was written can't be read back: {str(error).removeprefix(f'{path}: ')}") from error
    if config.rope_scaling.kind == read.rope_scaling.kind == "llama3":  # other numbers can make the same frequencies
        ours, theirs = (rope_frequencies(c.rotary_dim or c.head_dim, c.rope_theta, c.rope_scaling)[0] for c in (config, read))
        if torch.allclose(ours, theirs, rtol=1e-5, atol=0.0):
            read = dataclasses.replace(read, rope_scaling=config.rope_scaling)
    found = families.differences(config, read, 1e-6)
    if found:
        raise ValueError(f"GGUF can't hold this model's {', '.join(found)}; export it as 'hf' or 'safetensors'")
