"""What is exported is what was there: other readers compute the same logits, and coming back gives the same bits."""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path

import public_models
import pytest
import torch

from dualbranch import DualBranchConfig, DualBranchModel, RopeScaling, Tokenizer, generate, load, tokenizer_hf
from dualbranch.accounting import total_params
from dualbranch.convert import families
from dualbranch.convert.export import export, fast_model, slow_model
from dualbranch.precision import quantize
from dualbranch.storage import UNFINISHED
from kernels import SparseSpec

TOK = public_models.tokenizer_of("smollm2")
SIZES = {"vocab_size": TOK.vocab_size + 3, "d_model": 64, "n_layers": 3, "n_stem": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96}
DENSE = DualBranchConfig(**SIZES, max_seq_len=128)
DUAL = dataclasses.replace(DENSE, n_layers=4, n_stem=1, n_tail=1, sparse=SparseSpec(8, 2, 16, 2, 32))
LLAMA3 = RopeScaling("llama3", 8.0, 32, 1.0, 4.0)
YARN = RopeScaling("yarn", 4.0, 32)
LONGROPE = RopeScaling("longrope", 4.0, 32, short_factors=(1.0, 1.1, 1.2, 1.3), long_factors=(1.5, 2.0, 3.0, 4.0))
GEMMA = {"post_norms": True, "qk_norm": True, "activation": "geglu", "embed_scale": 8.0, "n_layers": 4, "n_stem": 4}
GEMMA |= {"sliding_layers": (0, 1, 3), "sliding_window": 7, "sliding_rope_theta": 100.0, "rope_theta": 5000.0}

#: name -> (family, what differs from DENSE)
CASES = {
    "llama": ("llama", {}),
    "llama untied llama3": ("llama", {"tie_embeddings": False, "rope_scaling": LLAMA3, "rope_theta": 500.0, "norm_eps": 1e-5, "head_dim": 20}),
    "qwen2 yarn": ("qwen2", {"qkv_bias": True, "rope_scaling": YARN}),
    "qwen2 window": ("qwen2", {"qkv_bias": True, "sliding_layers": (1, 2), "sliding_window": 6}),
    "qwen3": ("qwen3", {"qk_norm": True, "rope_scaling": RopeScaling("linear", 2.0)}),
    "phi3 partial": ("phi3", {"rotary_dim": 8}),
    "phi3 longrope": ("phi3", {"rotary_dim": 8, "rope_scaling": LONGROPE, "max_seq_len": 32, "tie_embeddings": False}),
    "phi3 window": ("phi3", {"sliding_layers": (0, 1, 2), "sliding_window": 9}),
    "gemma3": ("gemma3_text", GEMMA | {"rope_scaling": RopeScaling("linear", 8.0), "logit_softcap": 5.0}),
    "gemma3 scale": ("gemma3_text", GEMMA | {"attn_scale": 5**-0.5}),
}
#: what GGUF can't say, and the field it is refused by
NOT_IN_GGUF = {"qwen2 window": "sliding_layers", "phi3 window": "sliding_layers.* phi3", "gemma3 scale": "attn_scale"}


def random_model(config: DualBranchConfig, seed: int = 0) -> DualBranchModel:
    """Weights so large that every quirk shows in the logits."""
    model = DualBranchModel(config).eval()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(20) if name.startswith("embed") else p.mul_(2) if p.dim() > 1 else p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def tokens(n_rows: int = 2, n: int = 30) -> torch.Tensor:
    return torch.randint(7, TOK.vocab_size, (n_rows, n), generator=torch.Generator().manual_seed(n))


def assert_bits_equal(a: DualBranchModel, b: DualBranchModel) -> None:
    wrong = [name for name, x in a.state_dict().items() if not torch.equal(x, b.state_dict()[name])]
    assert not wrong, f"{len(wrong)} tensors differ: {wrong[:3]}"


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_hugging_face_folder_is_the_same_model_to_transformers_and_to_us(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers (pip install 'transformers>=5')")
    family, changes = CASES[name]
    model = random_model(dataclasses.replace(DENSE, **changes))
    sizes = export(model, TOK, tmp_path / "m", to="hf")
    assert sizes["family"] == family
    expected = model(tokens()).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, attn_implementation="eager").eval()
    difference = float((theirs(tokens()).logits - expected).abs().max())
    assert difference <= 1e-4 and expected.std() > 0.3, f"transformers differs by {difference:.1e}; logits vary by {float(expected.std()):.2f}"
    again = load(tmp_path / "m")
    assert again.extra["hf_config"]["model_type"] == family and not families.differences(model.config, again.model.config)
    assert torch.allclose(again.model(tokens()).logits, expected, atol=1e-4)
    export(again.model, again.tokenizer, tmp_path / "n", to="hf")  # out of a file, not of a random number: from here on every bit stays
    assert_bits_equal(load(tmp_path / "n").model, again.model)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "n")
    text = "the user is in 12\n\n 你好 <|im_end|>"
    assert theirs.encode(text, split_special_tokens=True, add_special_tokens=False) == TOK.encode(text) == again.tokenizer.encode(text)
    assert theirs.eos_token_id == TOK.end_id


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_gguf_file_comes_back_as_the_same_model_or_the_field_is_named(name, tmp_path):
    config = dataclasses.replace(DENSE, **CASES[name][1])
    model = random_model(config)
    if name in NOT_IN_GGUF:
        with pytest.raises(ValueError, match=NOT_IN_GGUF[name]):
            export(model, TOK, tmp_path / "m", to="gguf")
        assert not list(tmp_path.iterdir()), "nothing half-written is left"
        return
    export(model, TOK, tmp_path / "m", to="gguf")
    again = load(tmp_path / "m" / "m-float32.gguf")
    difference = float((again.model(tokens()).logits - model(tokens()).logits).abs().max())
    assert difference <= 1e-4, f"logits differ by {difference:.1e}"
    assert again.tokenizer.encode("the user 12") == TOK.encode("the user 12") and again.tokenizer.control == TOK.control
    assert (again.tokenizer.end_id, again.tokenizer.start_ids) == (TOK.end_id, TOK.start_ids)


def test_windows_without_a_pattern_are_not_written_as_gguf(tmp_path):
    with pytest.raises(ValueError, match=r"sliding_layers = \(0, 3\)"):
        export(random_model(dataclasses.replace(DENSE, **GEMMA | {"sliding_layers": (0, 3)})), TOK, tmp_path / "m", to="gguf")


@pytest.mark.parametrize(("dtype", "bits", "error"), [("float16", 16, 2e-3), ("bfloat16", 16, 2e-2), ("q8_0", 8.5, 2e-2), ("q4_0", 4.5, 0.3)])
@torch.no_grad()
def test_smaller_types_are_as_small_and_as_near_as_they_say(tmp_path, dtype, bits, error):
    model = random_model(DENSE)
    export(model, TOK, tmp_path / "m", to="gguf", dtype=dtype)
    again = load(tmp_path / "m" / f"m-{dtype}.gguf").model
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert (a - b).abs().max() <= error * a.abs().max(), name
    n = sum(p.numel() for p in model.parameters())
    size = (tmp_path / "m" / f"m-{dtype}.gguf").stat().st_size
    assert n * bits / 8 <= size <= n * bits / 8 + 25_000, "the header with the tokenizer, and vectors, are all there is besides"
    narrow = random_model(dataclasses.replace(DENSE, d_ff=72))  # 72 neurons make no whole block of 32
    export(narrow, TOK, tmp_path / "narrow", to="gguf", dtype="q8_0")
    assert (load(tmp_path / "narrow" / "narrow-q8_0.gguf").model.blocks[0].slow.ff.w_down.weight - narrow.blocks[0].slow.ff.w_down.weight).abs().max() < 1e-3


@torch.no_grad()
def test_llama_cpp_computes_the_same_logits(tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("runs the file in llama.cpp (pip install llama-cpp-python, which compiles it)")
    import llama_cpp
    import numpy as np

    full = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # not K and V in half precision
    # llama.cpp's context is at least 256 tokens, and beyond the trained length it takes the long factors
    longrope = {"rope_scaling": dataclasses.replace(LONGROPE, original_max_seq_len=256), "max_seq_len": 256}
    for name, (_, changes) in CASES.items():
        if name in NOT_IN_GGUF:
            continue
        model = random_model(dataclasses.replace(DENSE, **changes | (longrope if name == "phi3 longrope" else {})))
        folder = tmp_path / name.replace(" ", "-")
        export(model, TOK, folder, to="gguf", name="a test")  # llama.cpp expects Phi-3's tokens of a model with phi3 in its name
        llama = llama_cpp.Llama(str(folder / f"{folder.name}-float32.gguf"), n_ctx=256, logits_all=True, verbose=False, **full)
        ids = tokens(1, 20)
        llama.eval(ids[0].tolist())
        theirs, ours = torch.from_numpy(np.array(llama.scores[:20])), model(ids).logits[0]
        difference = float((theirs - ours).abs().max())
        assert difference < (1e-2 if name == "gemma3" else 3e-4), f"{name}: logits differ by {difference:.1e}"  # its GELU is a table in half precision
        assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist()


@pytest.fixture(scope="module")
def our_tokenizer() -> Tokenizer:
    words = "one two three four five six seven eight nine ten eleven twelve chicken rabbit head leg find value".split()
    return Tokenizer.train([f"{words[i % 18]} {words[i * 5 % 18]} {i % 100} + {i * 7 % 100} = {words[i * 7 % 17]}\n" for i in range(700)], 340)


@torch.no_grad()
def test_a_model_of_our_own_exports_with_its_tokenizer_and_comes_back(tmp_path, our_tokenizer):
    transformers = pytest.importorskip("transformers", reason="compares with transformers (pip install 'transformers>=5')")
    tok = our_tokenizer
    model = random_model(dataclasses.replace(DUAL, vocab_size=tok.vocab_size, qk_norm=True))
    for to, path in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "gguf" / "gguf-float32.gguf")):
        assert export(model, tok, tmp_path / to, to=to)["family"] == "qwen3"
        again = load(path)
        assert isinstance(again.tokenizer, Tokenizer) and again.tokenizer.thinks
        t = torch.randint(11, tok.vocab_size, (1, 30))
        assert torch.allclose(again.model(t).logits, model(t, "slow").logits, atol=2e-5)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("one rabbit 12 + 34 = seven\n", "  spaces   and\n\nlines", "你好 émoji 🐇", "<think> is text", ""):
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == tok.encode(text), text
        assert theirs.decode(tok.encode(text), clean_up_tokenization_spaces=False) == text
    turns = [{"role": "user", "content": "one + two?"}]
    rendered = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    from dualbranch.chat import render_prompt

    assert rendered == [*render_prompt(tok, turns), tok.control["</think>"]]


def test_dialects_no_family_speaks_are_refused_by_field(tmp_path):
    for changes, field in (({"logit_softcap": 30.0}, "logit_softcap"), ({"embed_scale": 3.0}, "embed_scale"), ({"qkv_bias": True, "qk_norm": True}, "qk")):
        with pytest.raises(ValueError, match=field):
            export(random_model(dataclasses.replace(DENSE, **changes)), TOK, tmp_path / "m", to="hf")
    assert not list(tmp_path.iterdir())


def test_the_family_asked_for_is_taken_where_it_fits():
    sliding = dataclasses.replace(DENSE, sliding_layers=(0, 1, 2), sliding_window=9)
    assert families.hf_config_of(sliding)["model_type"] == "phi3" and families.hf_config_of(DENSE)["model_type"] == "llama"
    assert families.hf_config_of(DENSE, "phi3")["model_type"] == "phi3"
    assert families.hf_config_of(DENSE, "qwen2")["model_type"] == "llama", "it has no biases"


# ---- branches


@torch.no_grad()
def test_the_slow_branch_alone_is_route_slow_and_the_dual_one_is_all(tmp_path):
    model = random_model(DUAL)
    export(model, TOK, tmp_path / "slow", "slow")
    slow = load(tmp_path / "slow").model
    assert slow.config.is_dense and torch.equal(slow(tokens()).logits, model(tokens(), "slow").logits)
    export(model, TOK, tmp_path / "dual", "dual", extra={"from": "a test"})
    dual = load(tmp_path / "dual")
    assert_bits_equal(model, dual.model)
    assert dual.extra == {"from": "a test"}


@torch.no_grad()
def test_the_fast_branch_alone_is_route_fast_smaller_and_refuses_the_others(tmp_path):
    model = random_model(DUAL)
    sizes = export(model, TOK, tmp_path / "fast", "fast")
    loaded = load(tmp_path / "fast")
    fast, t = loaded.model, tokens(2, 60)  # beyond dense_len
    assert torch.equal(fast(t, "fast").logits, model(t, "fast").logits)
    assert not torch.allclose(fast(t, "fast").logits, model(t, "slow").logits, atol=0.1)
    cache = fast.new_cache(2, 60)
    parts = [fast(t[:, :40], "fast", cache=cache).logits, *(fast(t[:, i : i + 1], "fast", cache=cache).logits for i in range(40, 60))]
    assert torch.allclose(torch.cat(parts, 1), model(t, "fast").logits, atol=1e-4)
    assert sizes["params"] == sum(p.numel() for p in fast.parameters()) == total_params(fast.config)
    assert sizes["params"] < 0.75 * sum(p.numel() for p in model.parameters())
    assert sizes["params_read"] == model.cost("fast").params_read - DUAL.d_model * DUAL.d_gate - DUAL.d_gate
    for route in ("slow", "auto", "soft", torch.ones(2, 60, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"fast branch alone.*mode fast"):
            fast(t, route)
    assert torch.equal(fast(t, torch.zeros(2, 60, dtype=torch.bool)).logits, fast(t, "fast").logits)
    assert generate(loaded, "the user", "fast", max_tokens=4).answer is not None
    assert fast(t, torch.zeros(2, 60, dtype=torch.bool), lengths=torch.tensor([0, 0]), cache=fast.new_cache(2, 60)).logits.shape == (2, 60, DUAL.vocab_size)
    for branch in ("slow", "dual"):
        with pytest.raises(ValueError, match="fast branch alone"):
            export(fast, TOK, tmp_path / "x", branch)
    assert not (tmp_path / "x").exists()
    assert_bits_equal(fast_model(fast), fast)
    export(quantize(fast, "int8"), TOK, tmp_path / "packed", "fast")
    assert torch.equal(load(tmp_path / "packed").model(t, "fast").logits, fast(t, "fast").logits)


@torch.no_grad()
def test_a_fast_branch_of_one_width_exports_as_a_family_up_to_where_it_is_dense(tmp_path):
    for to in ("hf", "gguf"):
        with pytest.raises(ValueError, match=r"fast_n_heads = 2 .* n_heads = 4 of the 2 stem and tail layers"):
            export(random_model(DUAL), TOK, tmp_path / "m", "fast", to)
    model = random_model(dataclasses.replace(DUAL, fast_n_heads=4, fast_d_ff=96))
    export(model, TOK, tmp_path / "m", "fast", "hf")
    again = load(tmp_path / "m").model
    assert again.config.max_seq_len == 32 and torch.allclose(again(tokens(2, 32)).logits, model(tokens(2, 32), "fast").logits, atol=1e-4)
    assert "context is 32 tokens" in (tmp_path / "m" / "README.md").read_text()


# ---- what a user can get wrong, and the card


def test_mistakes_are_named_before_anything_is_written(tmp_path):
    model = random_model(DENSE)
    for args, words in (
        (("slwo", "hf"), "branch is 'slwo'"), (("slow", "onnx"), "to is 'onnx'"), (("slow", "hf", "q8_0"), "dtype is 'q8_0'.*float16.*to hf"),
        (("fast", "safetensors"), "no fast branch"), (("dual", "safetensors"), "no fast branch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            export(model, TOK, tmp_path / "m", *args)
    with pytest.raises(ValueError, match="no public format has two branches"):
        export(random_model(DUAL), TOK, tmp_path / "m", "dual", "gguf")
    for packed, *args in ((quantize(copy.deepcopy(model), "slow=int8"), "slow", "hf"), (quantize(random_model(DUAL), "int8"), "fast", "safetensors")):
        with pytest.raises(ValueError, match=r"packed at .*; export the one it was quantized from"):
            export(packed, TOK, tmp_path / "m", *args)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].slow.w_o.weight[0, 0] = 1e6  # more than half precision holds
    for to in ("hf", "gguf", "safetensors"):
        with pytest.raises(ValueError, match=r"tensor .*(o_proj|attn_output|w_o).*(float|F)(16|32)"):
            export(broken, TOK, tmp_path / "m", to=to, dtype="float16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="m exists already"):
        export(model, TOK, tmp_path / "m")
    assert (tmp_path / "m" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch, to):
    def interrupted(path, *args):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for module in ("dualbranch.checkpoint", "dualbranch.convert.export"):
        monkeypatch.setattr(f"{module}.save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(random_model(DENSE), TOK, tmp_path / "m", to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("import",), ("quantize",), ("export",), ("export", "--to", "hf"), ("export", "--to", "gguf")])
def test_an_empty_folder_on_another_disk_may_be_written_to(tmp_path, monkeypatch, capsys, command):
    from dualbranch.checkpoint import save_checkpoint
    from dualbranch.cli import main

    save_checkpoint(tmp_path / "model", random_model(DENSE), TOK)
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / UNFINISHED / "model.safetensors").mkdir(parents=True)  # of a killed command
    link.symlink_to(disk)

    def within_a_disk(move):
        def moved(a, b):
            if (disk in Path(a).resolve().parents) != (disk in Path(b).resolve().parents):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return move(a, b)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, within_a_disk(getattr(os, name)))
    assert main([command[0], str(tmp_path / "model"), "--out", str(link), *command[1:]]) == 0, capsys.readouterr().err
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link", "model"]
    assert not [p.name for p in disk.iterdir() if p.name.startswith(".")]
    load(disk / "link-float32.gguf" if "gguf" in command else disk)


def test_the_card_states_sizes_and_only_what_was_measured(tmp_path):
    model = random_model(DUAL)
    sizes = export(model, TOK, tmp_path / "a", "dual")
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"{total_params(DUAL):,}" in card and "None was given" in card and "Not known" in card and "Not recorded" in card
    assert sizes["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir() if p.name != "README.md")
    export(model, TOK, tmp_path / "b", "slow", "hf", name="a small one", licence="CC0", made="By a test.", evaluation={"test perplexity": 12.345678})
    card = (tmp_path / "b" / "README.md").read_text()
    assert "None was given" not in card and all(words in card for words in ("# a small one", "CC0", "By a test.", "| test perplexity | 12.35 |", "`llama`"))


def test_the_command_exports_what_it_says_and_explains_mistakes(tmp_path, capsys):
    from dualbranch.checkpoint import save_checkpoint
    from dualbranch.cli import main

    save_checkpoint(tmp_path / "dual", random_model(DUAL), TOK)
    (tmp_path / "e.json").write_text('{"perplexity": 7.25}')
    args = ["export", str(tmp_path / "dual"), "--out", str(tmp_path / "x")]
    assert main([*args, "--to", "gguf", "--dtype", "q8_0", "--evaluation", str(tmp_path / "e.json"), "--licence", "CC0"]) == 0
    assert "slow branch as gguf of the family llama, q8_0" in capsys.readouterr().out
    assert (tmp_path / "x" / "x-q8_0.gguf").is_file() and "| perplexity | 7.25 |" in (tmp_path / "x" / "README.md").read_text()
    assert main([*args, "--to", "gguf"]) == 2 and "exists already" in capsys.readouterr().err


def test_the_card_has_the_runs_numbers_only_where_it_is_the_model_the_run_evaluated(tmp_path, capsys):
    from dualbranch.checkpoint import save_checkpoint
    from dualbranch.cli import main

    run = tmp_path / "run"
    save_checkpoint(run / "teacher", random_model(DENSE), TOK)
    save_checkpoint(run / "student", random_model(DUAL), TOK)
    save_checkpoint(run / "gate", random_model(DUAL), TOK)
    route = {"route": "slow", "budget": None, "slow_share": 1.0, "flops": 1e6, "perplexity": 3.21, "of_slow": 1.0}
    (run / "evaluation.json").write_text(json.dumps({"text": {"stories": {"routes": [route]}}}))
    for name, has_numbers in ((".", True), ("gate", True), ("student", False), ("teacher", False)):
        out = tmp_path / f"card of {name}"
        assert main(["export", str(run / name), "--out", str(out)]) == 0
        assert ("perplexity 3.21" in (out / "README.md").read_text()) == has_numbers, name
    for content in ("[1]", "not JSON", '{"text": {"x": {"ppl": 1}}}', '{"text": {"x": 3}}', '{"recall": [{"distance": 5}]}'):
        (run / "evaluation.json").write_text(content)
        capsys.readouterr()
        assert main(["export", str(run), "--out", str(tmp_path / "x")]) == 2 and "evaluation.json: not" in capsys.readouterr().err, content
        assert not (tmp_path / "x").exists()
        assert main(["export", str(run / "teacher"), "--out", str(tmp_path / "y")]) == 0
        shutil.rmtree(tmp_path / "y")


def test_exporting_leaves_the_model_alone_and_shares_its_memory():
    model = random_model(DUAL)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert slow_model(model).blocks[1].slow.w_q.weight.data_ptr() == model.blocks[1].slow.w_q.weight.data_ptr()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("family", public_models.FAMILIES)
def test_tokenizers_go_through_gguf_metadata_unchanged(family):
    tok = public_models.tokenizer_of(family)
    fields = tokenizer_hf.gguf_fields(tok)
    template = {"tokenizer.chat_template": fields.pop("chat_template")}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | template
    again = tokenizer_hf.tokenizer_from_gguf(metadata)
    for text in ("the user is in 1234, you'll see", "你好\n\n  x", "<|im_end|> <think>"):
        assert again.encode(text) == tok.encode(text)
    for name in ("control", "start_ids", "bos_id", "end_id", "pad_id", "stop_ids", "chat_template", "vocab_size"):
        assert getattr(again, name) == getattr(tok, name), name


def test_a_bos_that_only_the_post_processor_adds_goes_into_gguf_metadata():
    bos, tok = "<|begin_of_text|>", public_models.tokenizer_of("llama3")
    spec, whole = json.loads(tok.files()["tokenizer.json"]), {"Sequence": {"id": "A", "type_id": 0}}
    starts = {bos: {"id": bos, "ids": [tok.control[bos]], "tokens": [bos]}}
    single, pair = [{"SpecialToken": {"id": bos, "type_id": 0}}, whole], [whole, {"Sequence": {"id": "B", "type_id": 1}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": starts}
    fields = tokenizer_hf.gguf_fields(tokenizer_hf.BPETokenizer(json.dumps(spec).encode(), {"eos_token": "<|eot_id|>"}))
    assert fields["add_bos_token"] and fields["bos_token_id"] == tok.control[bos]


def test_a_way_of_cutting_words_that_gguf_cannot_name_is_refused():
    files = TOK.files()
    spec = json.loads(files["tokenizer.json"])
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tok = tokenizer_hf.tokenizer_from_files(files | {"tokenizer.json": json.dumps(spec).encode()})
    with pytest.raises(ValueError, match="no name known here"):
        tokenizer_hf.gguf_fields(tok)
