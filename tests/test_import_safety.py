"""Wrong, truncated and hostile Hugging Face folders end in a CheckpointError that names the file, field or tensor; nothing is half-loaded."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from public_models import import_folder, tokenizer_of

from dualbranch import DualBranchModel, load
from dualbranch.convert import families, huggingface
from dualbranch.storage import CheckpointError
from dualbranch.tensor_file import save_tensors

LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip
GEMMA = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}


def random_tensors(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors that fit `config`, under Hugging Face names."""
    c = families.config_of(config)
    shapes = {name: tuple(p.shape) for name, p in DualBranchModel(c).state_dict().items()}
    names = families.tensor_names(families.family_of(config), c, shapes)
    rows = {name: sum(shapes[x][0] for x in ours) for name, ours in names.items()}
    return {name: torch.randn(rows[name], *shapes[ours[0]][1:]).to(dtype) for name, ours in names.items()}


def write_folder(folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    config = LLAMA if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder / "model.safetensors", random_tensors(config) if tensors is None else tensors)
    return folder


def assert_refused(folder: Path, *words: str) -> str:
    """The message of the refusal, which holds `words` and comes within a second."""
    begin = time.perf_counter()
    with pytest.raises(CheckpointError) as raised:
        import_folder(folder)
    seconds = time.perf_counter() - begin
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"
    assert seconds < 1 + os.getloadavg()[0], f"took {seconds:.1f} s"
    return str(raised.value)


def test_a_folder_is_read_and_its_tensors_arrive_where_they_belong(tmp_path):
    tensors = random_tensors(GEMMA)
    model = import_folder(write_folder(tmp_path, GEMMA, tensors))
    assert torch.equal(model.blocks[1].slow.ff.w_down.weight, tensors["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(model.blocks[0].slow.attn_post_norm.weight, tensors["model.layers.0.post_attention_layernorm.weight"] + 1)
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    assert huggingface.is_folder(tmp_path) and not huggingface.is_folder(tmp_path / "nowhere")


LIES = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 400}, {"hidden_size": 2048}, {"hidden_size": 32_768}, {"vocab_size": 10**12}, {"hidden_size": 24.0},
    {"hidden_size": True}, {"hidden_size": None}, {"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"head_dim": 7}, {"rms_norm_eps": "small"},
    {"rms_norm_eps": float("nan")}, {"rope_theta": float("inf")}, {"rope_theta": 10**400}, {"rope_scaling": [1]}, {"hidden_act": "relu"}, {"hidden_act": []},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": "x"}},
    {"attention_bias": True}, {"tie_word_embeddings": "yes"}, {"max_position_embeddings": 2**40}, {"model_type": "mamba"}, {"model_type": {}},
    {"quantization_config": {"bits": 4}},
]  # fmt: skip
GEMMA_LIES = [
    {"layer_types": ["linear_attention"] * 2}, {"layer_types": ["full_attention"]}, {"sliding_window": 0}, {"use_bidirectional_attention": True},
    {"rope_parameters": {"rope_theta": 5.0}}, {"query_pre_attn_scalar": 0}, {"final_logit_softcapping": -1.0},
]  # fmt: skip


@pytest.mark.parametrize("change", LIES, ids=str)
def test_a_config_that_lies_is_refused_by_field(tmp_path, change):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    if change == {"num_hidden_layers": 400}:
        assert_refused(tmp_path, "model.layers.2.input_layernorm.weight is missing")
    elif change == {"hidden_size": 2048}:
        assert_refused(tmp_path, "tensor model.embed_tokens.weight has shape [50, 24]", "[50, 2048]")
    elif change == {"hidden_size": 32_768}:
        assert_refused(tmp_path, "head_dim is 8192")
    else:
        assert_refused(tmp_path, "config: ", "rope_type is 'dynamic'" if "dynamic" in str(change) else next(iter(change)))


@pytest.mark.parametrize("change", GEMMA_LIES, ids=str)
def test_what_gemma_adds_is_checked_too(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        families.config_of(GEMMA | change)


def test_load_names_the_folder_whose_config_lies(tmp_path):
    tokenizer_of("smollm2").save_files(write_folder(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: config: model_type is 'mamba'"):
        load(tmp_path)


def test_wrong_tensors_are_refused_by_name(tmp_path):
    tensors, name = random_tensors(LLAMA), "model.layers.1.self_attn.k_proj.weight"
    assert_refused(write_folder(tmp_path / "a", tensors={k: v for k, v in tensors.items() if k != name}), name, "missing")
    extra = "model.layers.2.mlp.up_proj.weight"
    assert_refused(write_folder(tmp_path / "b", tensors=tensors | {extra: torch.zeros(2)}), extra, "not part of")
    assert_refused(write_folder(tmp_path / "c", tensors=tensors | {name: torch.zeros(24, 12)}), name, "[24, 12]", "[12, 24]")
    assert_refused(write_folder(tmp_path / "d", tensors=tensors | {name: torch.zeros(12, 24, dtype=torch.int8)}), name, "I8", "quantised")
    assert_refused(write_folder(tmp_path / "e", LLAMA | {"tie_word_embeddings": False}, tensors), "lm_head.weight", "missing")
    harmless = {"lm_head.weight": torch.zeros(50, 24), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    assert import_folder(write_folder(tmp_path / "f", tensors=tensors | harmless)).head is None
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[3\]"):  # a loader that doesn't tell its shape
        families.build(LLAMA, {k: lambda v=v: v for k, v in tensors.items()} | {"model.norm.weight": lambda: torch.zeros(3)})


def test_wrong_files_are_refused_by_name(tmp_path):
    assert_refused(tmp_path / "nothing", "no such folder")
    bare = tmp_path / "bare"
    bare.mkdir()
    assert_refused(bare, "config.json", "missing")
    (bare / "config.json").write_text(json.dumps(LLAMA))
    assert_refused(bare, "neither model.safetensors nor")
    (bare / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert_refused(bare, "pytorch_model.bin", "safetensors only")
    (bare / "model.safetensors").write_bytes(b"\x80\x04" + bytes(100))
    assert_refused(bare, "model.safetensors", "pickle")
    cut = write_folder(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-10])
    assert_refused(cut, "model.safetensors", "truncated")
    (cut / "config.json").write_text("[1]")
    assert_refused(cut, "config.json", "not a JSON object")
    (cut / "config.json").write_text("[" * 100_000)
    assert_refused(cut, "config.json", "not JSON")


def test_links_out_of_the_folder_are_not_followed_except_in_a_download_cache(tmp_path):
    real = write_folder(tmp_path / "real")
    for name in ("config.json", "model.safetensors"):
        linked = write_folder(tmp_path / f"linked {name}")
        (linked / name).unlink()
        (linked / name).symlink_to(real / name)
        assert_refused(linked, name, "link out of")
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (real / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert isinstance(import_folder(snapshot), DualBranchModel)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    assert_refused(snapshot, "config.json", "link out of")


def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path):
    tensors = random_tensors(LLAMA)
    folder, names = write_folder(tmp_path, tensors=dict(list(tensors.items())[:5])), list(tensors)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_tensors(folder / "two.safetensors", dict(list(tensors.items())[5:]))

    def index(**changes: str | None) -> None:
        weight_map = {name: "one.safetensors" if i < 5 else "two.safetensors" for i, name in enumerate(names)} | changes
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v}}))

    index()
    assert isinstance(import_folder(folder), DualBranchModel)
    index(**{names[0]: "../one.safetensors"})
    assert_refused(folder, "../one.safetensors", "not the name of")
    index(**{names[0]: "three.safetensors"})
    assert_refused(folder, "three.safetensors", "missing")
    index(**{names[0]: "two.safetensors"})
    assert_refused(folder, names[0])
    index(**{names[0]: None})
    assert_refused(folder, names[0], "not in the index")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert_refused(folder, "index.json", "weight_map")


@pytest.mark.parametrize("what", ["header", "config"])
def test_five_hundred_mutated_files_load_or_raise_checkpoint_error_within_a_second(tmp_path, what):
    rng = random.Random(0)
    config = LLAMA if what == "header" else GEMMA
    folder = write_folder(tmp_path, config)
    path = folder / ("model.safetensors" if what == "header" else "config.json")
    original = path.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little") if what == "header" else len(original)
    pieces = [b"9" * 25, b"-1", b"null", b"true", b'""', b"{}", b"[]", b"1e999", b"NaN", b'"\\ud800"', b"[[[[", b"\x00", b"\xff\xfe", b"0.5"]
    outcomes = {"loaded": 0, "refused": 0}
    for n in range(500):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at, kind = rng.randrange(end), rng.random()
            if kind < 0.4:
                data[at] = rng.choice(b'0123456789"{}[],:.-eEnt \\\x00\xff')
            elif kind < 0.7:
                numbers = [i for i in range(8 if what == "header" else 0, min(end, len(data))) if chr(data[i]).isdigit()]
                i = rng.choice(numbers)
                data[i : i + 1] = rng.choice(pieces)
            elif kind < 0.85:
                del data[at : at + rng.randint(1, 20)]
            else:
                data[at:at] = data[max(0, at - 30) : at]
        path.write_bytes(data)
        begin = time.process_time()
        try:
            import_folder(folder)
            outcomes["loaded"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
        assert time.process_time() - begin < 1, n
    assert outcomes["refused"] > 250, outcomes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_peak_of_an_import_is_below_three_times_the_fp32_weights(tmp_path, dtype):
    big = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 4000, "num_key_value_heads": 4}
    write_folder(tmp_path, big, random_tensors(big, dtype))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError as error:
        pytest.skip(f"the peak of memory can't be reset here ({error})")

    def status(field: str) -> int:
        return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1]) * 1024

    before = status("VmRSS")
    model = import_folder(tmp_path)
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    grown = status("VmHWM") - before
    assert n_bytes > 60e6 and grown < 3 * n_bytes, f"{grown / n_bytes:.2f} times the weights"
