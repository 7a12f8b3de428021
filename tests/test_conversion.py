"""A public checkpoint becomes a dual-branch model: pipeline on text alone, sizes from the teacher, logits in slices, text evaluation, commands."""

from __future__ import annotations

import bz2
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from public_models import tokenizer_of, write_folder, write_gguf
from safetensors.torch import save_file

from dualbranch import load
from dualbranch.checkpoint import load_checkpoint, save_checkpoint
from dualbranch.cli import main as cli
from dualbranch.commands import converting, importing
from dualbranch.config import DualBranchConfig
from dualbranch.data import corpora
from dualbranch.data.packing import pack
from dualbranch.distill import losses, pipeline, stages
from dualbranch.distill.config import BRANCH_SETTINGS, DataConfig, GateConfig, RunConfig, StudentConfig, complete_from_teacher, load_run
from dualbranch.distill.cut import init_from_teacher
from dualbranch.distill.sources import BatchSource
from dualbranch.model import DualBranchModel
from dualbranch.precision import quantize
from dualbranch.schema import ConfigError
from dualbranch.text_eval import cut_windows, read_text, text_quality, undo_wikitext
from kernels import SparseSpec

ROOT = Path(__file__).parents[1]
SETTINGS = ["student.steps=3", "student.refit_rows=4", "gate.rows=4", "gate.steps=5", "gate.calibration_rows=4", "data.seq_len=64", "save_every=2",
            "evaluation.routing_rows=4", "evaluation.text_tokens=256", "evaluation.text_window=64", "model.sparse.dense_len=16", "model.sparse.window=16",
            "model.sparse.n_selected_blocks=1"]  # fmt: skip


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A random llama with four layers and three K/V heads, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("public") / "llama"
    write_folder(folder, "smollm2")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 64}
    n = tokenizer_of("smollm2").vocab_size
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": n, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "max_position_embeddings": 128, "hidden_act": "silu", **sizes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (n, 48), "model.norm.weight": (48,)}
    for i in range(4):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (48,), p + "post_attention_layernorm.weight": (48,), p + "self_attn.o_proj.weight": (48, 48)}
        shapes |= {p + f"self_attn.{x}_proj.weight": (rows, 48) for x, rows in (("q", 48), ("k", 24), ("v", 24))}
        shapes |= {p + "mlp.gate_proj.weight": (64, 48), p + "mlp.up_proj.weight": (64, 48), p + "mlp.down_proj.weight": (48, 64)}
    save_file({k: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * 0.3 for k, s in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    rng, words = random.Random(0), "the user sees a river in the old town while rain falls on slow hills".split()
    documents = [" ".join(rng.choices(words, k=60)) + f" {i}." for i in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="module")
def converted(public, text_file, tmp_path_factory) -> Path:
    """A whole run by the command, interrupted by nothing; read only."""
    out = tmp_path_factory.mktemp("runs") / "llama"
    assert cli(["convert", str(public), "--text", str(text_file), "--out", str(out), *(x for s in SETTINGS for x in ("--set", s))]) == 0
    return out


def test_a_converted_model_is_the_original_on_route_slow_bit_for_bit(converted, public):
    student, tok = load_checkpoint(converted / "gate")
    teacher = load(public).model
    t = torch.randint(5, tok.vocab_size, (2, 70))
    assert torch.equal(student(t, "slow").logits, teacher(t).logits)
    assert not torch.equal(student(t, "fast").logits, teacher(t).logits)
    assert student.calibration is not None and student.config.n_stem == 1 and student.config.n_tail == 1


def test_the_report_of_a_text_run_has_text_and_no_problems(converted):
    report = (converted / "report.md").read_text()
    assert "## Text" in report and "held-out text" in report and (converted / "plots" / "text.png").exists()
    for absent in ("## Accuracy", "Deciding to think", "## Shifted problems", "What the gate sends slow", "Teacher with reasoning"):
        assert absent not in report
    evaluation = json.loads((converted / "evaluation.json").read_text())
    routes = {(r["route"], r["budget"]): r for r in evaluation["text"]["held-out text"]["routes"]}
    assert routes["slow", None]["of_slow"] == 1.0 and routes["fast", None]["slow_share"] == 0.0
    assert routes["fast", None]["flops"] < routes["auto", 0.3]["flops"] < routes["slow", None]["flops"]


def test_training_state_holds_trained_weights_only(converted):
    state = next((converted / "student" / "state").glob("step-*"))
    names = json.loads((state / "state.json").read_text())["model"]["dict"]
    assert names and all(".fast." in name for name, _ in names)


def test_a_resumed_conversion_changes_nothing(converted, public, text_file):
    before = (converted / "evaluation.json").read_text()
    args = ["convert", str(public), "--text", str(text_file), "--out", str(converted), *(x for s in SETTINGS for x in ("--set", s))]
    assert cli(args) == 2  # taken
    assert cli([*args, "--resume"]) == 0
    assert (converted / "evaluation.json").read_text() == before


def test_a_student_heals_further_on_its_teacher_and_on_a_fine_tuned_one(converted, public, tmp_path):
    more = [f"student.checkpoint={converted / 'gate'}", f"out={tmp_path}", "name=more"]
    folder = pipeline.run(load_run(converted / "config.yaml", more))
    before, after, teacher = load_checkpoint(converted / "student")[0], load_checkpoint(folder / "student")[0], load(public).model
    t = torch.randint(5, teacher.config.vocab_size, (2, 70))
    assert after.config == before.config and torch.equal(after(t, "slow").logits, teacher(t).logits)
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert any(".fast." in n for n in moved) and not any(".slow." in n for n in moved)
    other = load(public, dense=True).model
    with torch.no_grad():
        for p in other.parameters():
            p += 0.01
    with pytest.warns(UserWarning, match="its slow branch isn't the teacher's"):
        tok = load(public).tokenizer
        start, earlier = pipeline.starting_point(load_run(folder / "config.yaml"), other, tok), load_checkpoint(converted / "gate")[0]
    assert torch.equal(start(t, "slow").logits, other(t).logits)
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, earlier.get_parameter(n))}
    assert moved == {n for n, _ in start.named_parameters() if ".fast." not in n and not n.startswith("gate.")}
    for init, freeze in (("teacher", "false"), ("smaller", "true"), ("scratch", "false")):
        with pytest.raises(ConfigError, match="goes on with a student of the teacher"):
            load_run(folder / "config.yaml", [f"student.init={init}", f"student.freeze_slow={freeze}"])
    dual_teacher = load(converted).model  # its own fast branch is not the one that goes on
    start = pipeline.starting_point(load_run(folder / "config.yaml"), dual_teacher, tok)
    assert all(torch.equal(p, earlier.get_parameter(n)) for n, p in start.named_parameters())
    with pytest.raises(ValueError, match="a tokenizer that reads text otherwise than the teacher's"):
        pipeline.starting_point(load_run(folder / "config.yaml"), other, tokenizer_of("qwen3"))


def test_a_student_of_other_sizes_heals_further_by_the_command(public, text_file, tmp_path):
    settings = [x for s in SETTINGS if not s.startswith("model.") for x in ("--set", s)]
    first = ["convert", str(public), "--text", str(text_file), "--fast-ff", "16", "--out", str(tmp_path / "first"), *settings]
    assert cli(first) == 0
    more = ["convert", str(public), "--text", str(text_file), "--set", f"student.checkpoint={tmp_path / 'first' / 'student'}", "--out", str(tmp_path / "more")]
    assert cli([*more, *settings]) == 0
    assert load(tmp_path / "more").model.config == load(tmp_path / "first").model.config


def test_a_run_may_be_moved_and_go_on(converted, text_file, public, tmp_path):
    shutil.copytree(converted, tmp_path / "moved")
    again = ["convert", str(public), "--text", str(text_file), "--out", str(tmp_path / "moved"), "--resume"]
    assert cli([*again, *(x for s in SETTINGS for x in ("--set", s))]) == 0


def test_a_mistake_found_before_anything_was_made_is_mended_by_resuming(public, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("one document " * 40)
    settings = [x for s in (*SETTINGS, "data.self_text=0") for x in ("--set", s)]
    run = ["convert", str(public), "--text", str(tmp_path / "one.txt"), "--out", str(tmp_path / "run"), *settings]
    assert cli([*run, "--set", "data.seq_len=1000"]) == 2
    assert "data.seq_len is 1000, and the model reads 128 tokens" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli(run) == 2 and "no document falls into the text's" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student").exists(), "nothing was trained on text that can't calibrate a gate"
    assert cli([*run, "--set", "data.text_share=0.5", "--resume"]) == 2
    assert "data.text_share is 0.5" in (err := capsys.readouterr().err) and "has no thinking mode" in err
    (tmp_path / "one.txt").write_text("\n<|endoftext|>\n".join(f"the user sees rain {i} " * 40 for i in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train_student", lambda *args: (_ for _ in ()).throw(ValueError("a mistake named inside of a stage")))
        assert cli([*run, "--resume"]) == 2 and "inside of a stage" in capsys.readouterr().err
    assert (tmp_path / "run" / "student").is_dir()
    assert cli([*run, "--set", "student.steps=2", "--resume"]) == 0, "an empty folder of a stage holds no work"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("a text that can be read")
    (tmp_path / "texts" / "two.txt").write_bytes(b"\xff")
    assert cli(["convert", str(public), "--text", str(tmp_path / "texts"), "--out", str(tmp_path / "other"), "--set", "data.seq_len=64"]) == 2
    assert "two.txt" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_under_autocast_a_head_that_does_not_train_is_cast_once(public):
    model, x = load(public).model.requires_grad_(False), torch.randn(5, 48)
    assert model.logits_in_slices() == model.logits  # nothing to cast
    with torch.autocast("cpu", torch.bfloat16):
        found = model.logits_in_slices()
        assert found != model.logits and torch.equal(found(x), model.logits(x))
        model.embed.requires_grad_(True)
        assert model.logits_in_slices() == model.logits


def test_model_settings_left_open_come_from_the_teacher_and_contradictions_are_refused(public):
    run = {"teacher": {"checkpoint": str(public)}}
    model = complete_from_teacher(run | {"model": {"fast_n_heads": 3, "fast_d_ff": 16}})["model"]
    assert (model["d_model"], model["n_heads"], model["n_kv_heads"], model["fast_n_heads"], model["norm_eps"]) == (48, 6, 3, 3, 1e-5)
    assert [complete_from_teacher(run)["model"][name] for name in ("fast_n_heads", "fast_d_ff")] == [6, 16]
    with pytest.raises(ConfigError, match=r"model.d_ff is 32, but the teacher .* has 64"):
        complete_from_teacher(run | {"model": {"d_ff": 32, "fast_n_heads": 3}})
    with pytest.raises(ConfigError, match="n_kv_heads"):
        complete_from_teacher(run | {"model": {"fast_n_heads": 4}})


def test_configs_say_what_the_command_does():
    import yaml

    said = yaml.safe_load((ROOT / "configs/smollm2-135m.yaml").read_text())
    assert {k: said[k] for k in converting.CONVERSION} == converting.CONVERSION
    assert set(said["model"]) == set(BRANCH_SETTINGS)
    slim = yaml.safe_load((ROOT / "configs/smollm2-135m-slim.yaml").read_text())["model"]
    kv, per_head, per_neuron = 2 * 576 * 3 * 64, 2 * 576 * 64, 3 * 576  # SmolLM2-135M
    dense = kv + 9 * per_head + 1536 * per_neuron
    assert (kv + slim["fast_n_heads"] * per_head + slim["fast_d_ff"] * per_neuron) / dense <= 0.30
    assert 576 * said["model"]["d_gate"] < 0.01 * dense


@pytest.mark.parametrize("head_trains", [False, True])
def test_a_loss_in_slices_has_the_value_and_gradient_of_the_whole(monkeypatch, head_trains):
    generator = torch.Generator().manual_seed(0)
    w, hidden, goal = (torch.randn(*s, generator=generator) for s in ((50, 8), (33, 8), (33, 50)))
    targets, weights = torch.randint(50, (33,), generator=generator), torch.rand(33, generator=generator)
    found = []
    for at_once in (2**24, 50 * 7):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
        x, head = hidden.clone().requires_grad_(), w.clone().requires_grad_(head_trains)

        def loss(x, goal, targets, weights, head=head):
            logits = x @ head.T
            return {"hard": losses.hard_loss(logits, targets, weights), "soft": losses.distill_loss(goal, logits, weights)}

        parts = losses.token_loss(loss, 50, x, (goal, targets, weights), [head])
        (sum(parts.values()) / 3).backward()
        found.append([*parts.values(), x.grad, *([head.grad] if head_trains else [])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_text_rows_are_each_seen_once_per_epoch(text_file):
    tok = tokenizer_of("smollm2")
    data = BatchSource(DataConfig(text=(str(text_file),), text_share=1.0, seq_len=64, batch_rows=3), tok, 0, 16)
    n = len(data.packed)
    rows = torch.cat([data.batch(step).tokens for step in range(-(-2 * n // 3))])[: 2 * n]
    for epoch in (rows[:n], rows[n:]):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, data.packed.tokens.tolist()))
    assert not torch.equal(rows[:n], rows[n:])
    assert torch.equal(data.batch(5).tokens, rows[15:18])
    first = data.packed.doc_start == torch.arange(64)
    assert data.packed.tokens[first].ne(tok.bos_id).all()  # this family opens a text with nothing
    assert float(data.packed.loss_weights.sum()) == data.packed.n_tokens - data.packed.n_documents


def test_the_gate_learns_from_text_the_student_has_not_read(text_file, monkeypatch):
    tok = tokenizer_of("smollm2")
    model = DualBranchModel(DualBranchConfig(tok.vocab_size, 32, 3, 1, 0, 4, 2, 8, 48, 4, 48, SparseSpec(8, 4, 16, 2, 64)))
    model.init_weights(0)
    data = DataConfig(text=(str(text_file),), text_share=1.0, seq_len=64, batch_rows=2)
    c = RunConfig(model=model.config, data=data, student=StudentConfig(steps=3), gate=GateConfig(rows=16, steps=2, calibration_rows=2))
    student_data = stages.source(c, tok, purpose=1)
    read = {tuple(row) for step in range(3) for row in student_data.batch(step).tokens.tolist()}
    assert len(student_data.packed) >= 6 + 16, "the text must be longer than the training"
    seen, examples = [], stages.gate_examples
    monkeypatch.setattr(stages, "gate_examples", lambda model, tok, rows: seen.append(rows.tokens) or examples(model, tok, rows))
    stages.train_gate(c, tok, model, lambda record: None)
    fitted, calibrated = (set(map(tuple, tokens.tolist())) for tokens in seen)
    assert fitted == {tuple(row) for step in range(3, 11) for row in student_data.batch(step).tokens.tolist()}, "what training would have read next"
    assert len(fitted) == 16 and not fitted & read and not calibrated & (fitted | read)


@pytest.mark.parametrize("dialect", [{}, {"post_norms": True, "qk_norm": True, "attn_scale": 0.2, "embed_scale": 3.0, "logit_softcap": 30.0,
                                          "sliding_layers": (0, 2), "sliding_window": 12, "sliding_rope_theta": 500.0}])  # fmt: skip
def test_a_branch_as_wide_as_the_teacher_is_cut_without_loss(dialect):
    sparse = SparseSpec(8, 4, 16, 2, 64)
    c = DualBranchConfig(64, 32, 3, 3, 0, 4, 2, 8, 48, 4, 48, sparse, **dialect)
    teacher, student = DualBranchModel(c), DualBranchModel(DualBranchConfig(64, 32, 3, 1, 0, 4, 2, 8, 48, 4, 48, sparse, **dialect))
    teacher.init_weights(0)
    with torch.no_grad():
        teacher.embed.weight.mul_(20)
    student.init_weights(1)
    generator = torch.Generator().manual_seed(0)
    rows = pack([(torch.randint(1, 64, (40,), generator=generator).tolist(), [0.0] + [1.0] * 39) for _ in range(16)], 48, 8, 0)
    init_from_teacher(student, teacher, rows)
    with torch.no_grad():
        fast, slow = (m(rows.tokens, r, doc_start=rows.doc_start).logits for m, r in ((student, "fast"), (teacher, "slow")))
    assert float((fast - slow).square().mean() / slow.square().mean()) < 0.02


def test_perplexity_of_windows_is_that_of_a_plain_loop(tiny):
    model, tok = tiny
    windows = cut_windows(tok, ["how many apples are left after three people take two " * 6], 40)
    found = {(r["route"], r["budget"]): r for r in text_quality(model, windows, (0.3,), second_looks=False)}
    for route, budget in found:
        nll = n = slow = 0.0
        for t in windows.tokens:
            with torch.no_grad():
                out = model(t[None], route, budget=budget) if route == "auto" else model(t[None], route)
            nll += float(F.cross_entropy(out.logits[0, :-1], t[1:], reduction="sum"))
            slow += len(t) if route == "slow" else int(out.use_slow.sum())
            n += len(t)
        assert found[route, budget]["nll"] == pytest.approx(nll / windows.n_tokens, rel=1e-5)
        assert found[route, budget]["slow_share"] == pytest.approx(slow / n)
    slow = found["slow", None]
    text = "how many apples are left after three people take two " * 6
    assert windows.n_bytes == len(text.encode())  # this tokenizer opens each window, so every byte is predicted
    assert slow["bits_per_byte"] == pytest.approx(slow["nll"] * windows.n_tokens / math.log(2) / windows.n_bytes)


@pytest.mark.parametrize("kind", ["own", "space before"])
def test_bytes_of_windows_are_those_of_the_text_wherever_it_is_cut(tiny, kind, monkeypatch):
    _, tok = tiny
    text = " ".join(["曹操引军追赶玄德，玄德急走樊城。", "how many apples"] * 20)
    texts = [text, text] if kind == "own" else [" how many of the apples are left" * 9]  # its first space is the one put there
    monkeypatch.setattr(tok, "_strips_space", kind != "own")
    wanted = sum(len(t.encode()) - (kind != "own") for t in texts)
    assert {window: cut_windows(tok, texts, window).n_bytes for window in range(5, 60)} == dict.fromkeys(range(5, 60), wanted)


@pytest.mark.parametrize("most, least", [(8192, 7000), (600, 500), (3, 0)])
def test_max_tokens_counts_tokens_of_short_texts_too(tiny, most, least):
    _, tok = tiny
    texts = [f"note {i}: three people take {i} apples" for i in range(300)]
    n = [len(t) for t in cut_windows(tok, texts, 1024, most).tokens]
    all_of_it = sum(len(t) for t in cut_windows(tok, texts, 1024).tokens)
    assert min(least, all_of_it) <= sum(n) <= most or len(n) == 1
    assert most < all_of_it or len(n) == 300


def test_wikitext_spacing_is_undone(tmp_path):
    assert undo_wikitext('well @-@ known , 1 @,@ 200 ( about 3 @.@ 5 ) it \'s " good " .') == "well-known, 1,200 (about 3.5) it's \"good\"."
    (tmp_path / "t.txt").write_text("a\nb\nc\nd ,\n")
    assert read_text(tmp_path / "t.txt", wikitext=True, last=0.25) == "d,\n"
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert read_text(tmp_path / "marked.txt") == "a\nb\n"
    with pytest.raises(ValueError, match="can't be read"):
        read_text(tmp_path / "none.txt")


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"><page><title>Rain</title><ns>0</ns><revision><text>{{Infobox|a={{b}}}}
'''Rain''' is [[liquid water|water]] in [[drop]]s.&lt;ref name="x"&gt;A [[book]]&lt;/ref&gt; {| class="t"
|-
| cell
|}
[[File:Rain.jpg|thumb|A [[street]] in rain]]
== Causes ==
* one &amp;nbsp;two ( ) [http://example.org a site] LONG
==References==
{{reflist}} gone</text></revision></page><page><title>Old</title><ns>0</ns><redirect title="Rain"/><revision><text>#REDIRECT [[Rain]]</text></revision>
</page></mediawiki>"""


def test_wiki_markup_becomes_running_text():
    (title, text), = corpora.read_wikipedia(bz2.compress(DUMP.replace("LONG", "word " * 120).encode()))
    assert title == "Rain" and text.startswith("Rain\n\nRain is water in drops.\n\nCauses\n\none two a site word word")
    assert not any(mark in text for mark in ("[[", "{{", "{|", "|", "''", "<", "gone", "cell", "street", "=="))


def test_corpora_are_split_by_title_and_unknown_ones_refused():
    shares = [corpora.split_of_title(f"title {i}") for i in range(4000)]
    assert 0.06 < shares.count("valid") / 4000 < 0.10 and 0.06 < shares.count("test") / 4000 < 0.10
    with pytest.raises(ValueError, match="there are wikipedia, sanguo"):
        corpora.load_corpus("nowhere", "train")
    chapters = list(corpora.read_sanguo(json.dumps(["第一回 甲\n\n \n\t话说", " \n"]).encode()))
    assert chapters == [("第一回 甲", "第一回 甲\n话说\n")]


def test_importing_gemma_in_half_precision_says_that_its_norms_are_rounded(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", "gemma3", family="gemma", overrides={"attention.sliding_window": 32})
    for dtype, said in (("float32", False), ("bfloat16", True)):
        assert cli(["import", str(tmp_path / "m.gguf"), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert ("1 + w, rounded to bfloat16" in capsys.readouterr().out) == said
    exact, rounded = (load(tmp_path / dtype).model.norm.weight for dtype in ("float32", "bfloat16"))
    assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_import_loads_weights_as_it_writes_them_and_writes_what_float32_would_give(public, tmp_path, monkeypatch, dtype):
    seen = []
    monkeypatch.setattr(importing, "save_checkpoint", lambda folder, model, *args: (seen.append(model.dtype), save_checkpoint(folder, model, *args)))
    found = load(public)
    save_checkpoint(tmp_path / "ours", found.model, found.tokenizer)
    save_checkpoint(tmp_path / "expected", found.model, found.tokenizer, dtype=dtype)
    for source in (public, tmp_path / "ours"):
        out = tmp_path / f"from {source.name}"
        assert cli(["import", str(source), "--out", str(out), "--dtype", dtype]) == 0
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert seen == [getattr(torch, dtype)] * 2, "loaded as something else, and copied"


def test_the_command_imports_and_evaluates(public, text_file, tmp_path, capsys):
    assert cli(["import", str(public), "--out", str(tmp_path / "m")]) == 0
    t = torch.randint(5, 200, (1, 20))
    assert torch.equal(load(tmp_path / "m").model(t).logits, load(public).model(t).logits)
    assert cli(["import", str(public), "--out", str(tmp_path / "m")]) == 2
    capsys.readouterr()
    assert cli(["eval", str(tmp_path / "m"), "--on", "text", str(text_file), "--max-tokens", "128", "--window", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["route"] for r in found[str(text_file)]["routes"]] == ["slow"]
    for wrong in (["text", str(text_file), "--split", "valid"], ["corpus", "wikipedia", "--wikitext"], ["tasks", "--window", "8", "--distances", "9"]):
        assert cli(["eval", str(tmp_path / "m"), "--on", *wrong]) == 2
        assert "says nothing about" in capsys.readouterr().err
    context = load(tmp_path / "m").model.config.max_seq_len
    assert context < 1024 and cli(["eval", str(tmp_path / "m"), "--on", "text", str(text_file), "--max-tokens", "128"]) == 0  # its context is the window
    for option, value, problem in (("window", context + 1, "context is"), ("window", 0, "at least 1"), ("max-tokens", 0, "at least 1")):
        assert cli(["eval", str(tmp_path / "m"), "--on", "text", str(text_file), f"--{option}", str(value)]) == 2
        assert f"--{option} is {value}" in (said := capsys.readouterr().err) and problem in said


WRONG = ["eval nowhere --on text", "eval nowhere --on text nofile", "eval nowhere --on corpus nothing", "convert nowhere", "frobnicate", ""]


@pytest.mark.parametrize("argv", [line.split() for line in WRONG])
def test_what_a_user_can_get_wrong_ends_in_one_line_and_code_2(argv, capsys):
    assert cli(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_part_that_is_no_table_is_refused_by_name(public, capsys):
    assert cli(["convert", str(public), "--set", "student=foo"]) == 2 and "student" in capsys.readouterr().err


def test_a_smaller_student_has_one_branch(converted, public, tmp_path, capsys):
    assert cli(["convert", str(public), "--student", str(converted), "--out", str(tmp_path / "run")]) == 2
    assert "has two branches" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_fast_branch_alone_is_refused_as_a_teacher(converted, text_file, tmp_path, capsys):
    assert cli(["export", str(converted), "--branch", "fast", "--out", str(tmp_path / "fast")]) == 0
    assert cli(["convert", str(tmp_path / "fast"), "--text", str(text_file), "--out", str(tmp_path / "run")]) == 2
    assert "has its fast branch alone; training needs the model it was exported from" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["teacher", "student"])
def test_packed_weights_are_refused_before_anything_is_trained(public, text_file, tmp_path, capsys, given):
    loaded = load(public)
    save_checkpoint(tmp_path / "packed", quantize(loaded.model, "int8"), loaded.tokenizer)
    models = [str(tmp_path / "packed")] if given == "teacher" else [str(public), "--student", str(tmp_path / "packed")]
    assert cli(["convert", *models, "--text", str(text_file), "--out", str(tmp_path / "run")]) == 2
    assert "packed is packed at int8; training needs the one it was quantized from" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_of_a_public_teacher_is_complete(public, tmp_path):
    (tmp_path / "c.yaml").write_text(f"teacher: {{checkpoint: {public}}}\nmodel: {{fast_n_heads: 3}}\n")
    config = load_run(tmp_path / "c.yaml")
    assert (config.model.d_model, config.model.fast_n_heads, config.model.n_stem) == (48, 3, 1)


def test_a_pruned_model_heals_by_the_same_distillation(public, text_file, tmp_path, capsys):
    assert cli(["prune", str(public), "--share", "0.6", "--text", str(text_file), "--rows", "4", "--seq-len", "64", "--out", str(tmp_path / "pruned")]) == 0
    settings = [s for s in SETTINGS if not s.startswith("model.")] + ["student.steps=8", "student.optim.lr=0.01", "student.optim.lr_other=0.01"]
    run = ["convert", str(public), "--student", str(tmp_path / "pruned"), "--text", str(text_file), "--out", str(tmp_path / "run")]
    assert cli([*run, *(x for s in settings for x in ("--set", s))]) == 0
    found, before = load(tmp_path / "run").model, load(tmp_path / "pruned").model
    assert found.config == before.config and found.config.is_dense and not (tmp_path / "run" / "gate").exists()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"student"' in line]
    assert losses[-1] < losses[0], f"KL to the original went from {losses[0]:.3f} to {losses[-1]:.3f}"
    assert "## Text" in (tmp_path / "run" / "report.md").read_text()
    assert cli([*run, "--set", "student.freeze_slow=true"]) == 2 and "trains a smaller model whole (smaller, false)" in capsys.readouterr().err
