"""Claims about reading GGUF files: values, layout, config, and what happens with files that lie. All files are written here by `gguf`."""

from __future__ import annotations

import math
import random
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from public_models import SIZES, write_gguf

from dualbranch import generate, load
from dualbranch.convert.gguf import ARCHITECTURES, llama3_scaling, read_gguf
from dualbranch.storage import CheckpointError


def interleave(w: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: (head, half, pair) rows to (head, pair, half)."""
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_equal_what_the_gguf_package_decodes(tmp_path, quant):
    tensors = write_gguf(tmp_path / "m.gguf", "qwen2", quant)
    found = read_gguf(tmp_path / "m.gguf")
    kind = gguf.GGMLQuantizationType[quant]
    written = tensors["blk.1.ffn_up.weight"]
    expected = written.astype(np.float16).astype(np.float32) if quant == "F16" else gguf.dequantize(gguf.quantize(written, kind), kind)
    got = found.tensors["model.layers.1.mlp.up_proj.weight"]()
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), expected)
    assert np.abs(got.numpy() - written).max() <= {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.01}.get(quant, 0.2)


def test_the_row_order_of_llama_is_undone_and_only_there(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf", "llama")
    found = read_gguf(tmp_path / "m.gguf").tensors
    for letter, n_heads in (("q", SIZES["n_heads"]), ("k", SIZES["n_kv_heads"])):
        stored = tensors[f"blk.0.attn_{letter}.weight"]
        assert np.array_equal(interleave(found[f"model.layers.0.self_attn.{letter}_proj.weight"]().numpy(), n_heads), stored)
    assert np.array_equal(found["model.layers.0.self_attn.v_proj.weight"]().numpy(), tensors["blk.0.attn_v.weight"])
    tensors = write_gguf(tmp_path / "q.gguf", "qwen3")
    q = read_gguf(tmp_path / "q.gguf").tensors["model.layers.0.self_attn.q_proj.weight"]()
    assert np.array_equal(q.numpy(), tensors["blk.0.attn_q.weight"])


def test_gemma_norms_lose_the_one_that_the_model_adds(tmp_path):
    tensors = write_gguf(tmp_path / "m.gguf", "gemma3", overrides={"attention.sliding_window": 32})
    found = read_gguf(tmp_path / "m.gguf")
    assert np.allclose(found.tensors["model.norm.weight"]().numpy(), tensors["output_norm.weight"] - 1)
    assert found.config["layer_types"] == ["sliding_attention"] * 2 and found.config["sliding_window"] == 32


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture_loads_and_replies(tmp_path, arch, tied):
    write_gguf(tmp_path / "m.gguf", arch, "Q8_0", tied=tied, overrides={"attention.sliding_window": 32} if arch == "gemma3" else None)
    loaded = load(tmp_path / "m.gguf")
    assert loaded.model.config.tie_embeddings == tied and loaded.extra["hf_config"]["model_type"] == ARCHITECTURES[arch]
    assert generate(loaded, "hello", "think", max_tokens=8).answer.strip()


def test_llama3_scaling_comes_back_from_its_divisors():
    def divisors(theta, dim, factor, low, high, original):
        inv = theta ** (-np.arange(dim // 2) * 2 / dim)
        out = []
        for wavelength in 2 * math.pi / inv:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1.0 if wavelength < original / high else factor if wavelength > original / low else 1 / ((1 - smooth) / factor + smooth))
        return out

    for factor, low, high, original in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 6.0, 5000)):
        got = llama3_scaling(divisors(500_000.0, 128, factor, low, high, original), 500_000.0)
        assert got["factor"] == factor and got["original_max_position_embeddings"] == original
        assert got["high_freq_factor"] / got["low_freq_factor"] == pytest.approx(high / low, rel=1e-3)
    assert llama3_scaling([1.0, 3.0, 2.0, 8.0], 10_000.0) is None


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"block_count": 10**9}, ["block_count", "1000000000"]),
        ({"embedding_length": 32}, ["token_embd.weight", "64"]),
        ({"attention.head_count": 0}, ["head_count"]),
        ({"block_count": 3}, ["blk.2.", "missing"]),
        ({"block_count": 1}, ["blk.1.", "isn't part"]),
        ({"expert_count": 8}, ["expert_count"]),
        ({"rope.dimension_count": 8}, ["rope.dimension_count"]),
        ({"attention.value_length": 32}, ["value_length"]),
        ({"rope.scaling.type": "secret"}, ["rope.scaling.type", "secret"]),
        ({"rope.scaling.type": [1, 2]}, ["rope.scaling.type", "[1 2]"]),
        ({"feed_forward_length": None}, ["feed_forward_length", "missing"]),
    ],
)
def test_metadata_that_lies_is_refused_by_name_within_a_second(tmp_path, overrides, named):
    write_gguf(tmp_path / "m.gguf", overrides=overrides)
    begin = time.process_time()
    with pytest.raises(CheckpointError) as error:
        read_gguf(tmp_path / "m.gguf")
    assert time.process_time() - begin < 1
    assert all(word in str(error.value) for word in ["m.gguf", *named]), str(error.value)


def test_a_rotary_factor_alone_is_linear_as_in_llama_cpp(tmp_path):
    for factor, expected in ((4.0, {"rope_type": "linear", "factor": 4.0}), (0.0, None)):
        write_gguf(tmp_path / "m.gguf", overrides={"rope.scaling.factor": factor})
        assert read_gguf(tmp_path / "m.gguf").config["rope_scaling"] == expected


def test_one_of_several_files_says_how_to_merge_them(tmp_path):
    for n in range(2):
        w = gguf.GGUFWriter(tmp_path / f"m-0000{n + 1}-of-00002.gguf", "llama")
        w.add_uint16("split.no", n)
        w.add_uint16("split.count", 2)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.close()
        with pytest.raises(CheckpointError, match=rf"m-0000{n + 1}-of-00002\.gguf: one of the 2 files .* llama-gguf-split --merge"):
            load(tmp_path / f"m-0000{n + 1}-of-00002.gguf")


def test_unknown_rotary_factors_and_architectures_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", rope_freqs=np.array([1.0, 5.0, 2.0, 8.0, 1.0, 1.0, 1.0, 3.0]))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        read_gguf(tmp_path / "m.gguf")
    w = gguf.GGUFWriter(tmp_path / "n.gguf", "mamba")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(CheckpointError, match=r"mamba.*llama"):
        read_gguf(tmp_path / "n.gguf")


def test_wrong_and_truncated_files_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for name, content in {"empty": b"", "zip": b"PK\3\4" + data[4:], "short": data[:20], "version": data[:4] + struct.pack("<I", 99) + data[8:]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_gguf(tmp_path / name)
    for cut in (100, 2000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"truncated|hold"):
            read_gguf(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"can.t be read"):
        read_gguf(tmp_path / "absent.gguf")


def test_counts_beyond_reason_are_refused_before_anything_is_built(tmp_path):
    for n_tensors, n_fields in ((10**9, 1), (1, 10**9), (2**63, 2**63)):
        (tmp_path / "h.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + bytes(1000))
        begin = time.process_time()
        with pytest.raises(CheckpointError, match="announces"):
            read_gguf(tmp_path / "h.gguf")
        assert time.process_time() - begin < 1


def test_500_mutated_headers_end_in_a_typed_error_or_a_model_within_a_second(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    end = data.index(b"blk.1.ffn_norm.weight") + 60  # the header: what lies behind is numbers
    rng, refused = random.Random(0), 0
    for n in range(500):
        content = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 8])):
            at = rng.randrange(4, end)
            size = rng.choice([1, 1, 4, 8])
            content[at : at + size] = rng.choice([rng.randbytes(size), b"\xff" * size, bytes(size)])
        if n % 10 == 0:
            del content[rng.randrange(end) :]
        (tmp_path / "x.gguf").write_bytes(content)
        begin = time.process_time()
        try:
            for read in read_gguf(tmp_path / "x.gguf").tensors.values():
                read()
        except CheckpointError as error:
            refused += 1
            assert "x.gguf" in str(error)
        assert time.process_time() - begin < 1, n
    assert refused > 50


def test_a_tensor_with_nan_is_refused_when_it_is_read(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-8:-4] = struct.pack("<f", math.nan)
    (tmp_path / "n.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor .blk\.1.*NaN|tensor blk\.1.*NaN"):
        for read in read_gguf(tmp_path / "n.gguf").tensors.values():
            read()
