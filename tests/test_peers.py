"""Claims about benchmarks/peers.py: its arithmetic by hand, what it writes, what it skips and stops, and one whole run of our own engines on a tiny model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.checkpoint import LoadedModel, save_checkpoint
from dualbranch.convert.export import export
from kernels import SparseSpec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
import peers_engines  # noqa: E402
import peers_report  # noqa: E402
from peers_engines import Engine, Job  # noqa: E402

SIZES = {"vocab_size": 50, "d_model": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24, "fast_n_heads": 2, "fast_d_ff": 8}
DUAL = DualBranchConfig(**SIZES, n_stem=1, n_tail=1, sparse=SparseSpec(4, 2, 8, 2, 16))
DENSE = DualBranchConfig(**SIZES, n_stem=4)
MACHINE = {"read_bytes_per_s": {"median": 1e9, "low": 1e9, "high": 1e9}, "flops_per_s": {"median": 1e10, "low": 1e10, "high": 1e10}}


@pytest.fixture
def torch_settings():
    """Adapters set what a process of their own needs."""
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


# ---- arithmetic


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_its_branch_and_the_head(tied, tmp_path, tiny, torch_settings):
    model = make_tiny_model(tiny[1].vocab_size, tie_embeddings=tied)
    save_checkpoint(tmp_path / "m", model, tiny[1])
    held = peers_engines.Ours(Job(Engine("x", "ours", str(tmp_path / "m"), "fp32"), "speed", 1, 16)).weight_bytes()
    assert held["all"] == sum(4 * x.numel() for x in [*model.parameters(), *model.buffers()])
    for share in (0.0, 0.25, 1.0):
        matrices = 4 * model.cost(share).params_read
        assert peers_report.weight_bytes_read(model.config, share, held) == pytest.approx(matrices, rel=0.05), "norms and the gate's bias are read too"


def test_a_dense_decoder_reads_all_keys():
    cache = DualBranchModel(DENSE).new_cache(1, 48)
    assert peers_report.kv_bytes_read(DENSE, 1.0, 47, 4) == cache.n_bytes(), "the last of 48 tokens reads what a cache of 48 holds"


def test_the_fast_branch_reads_sinks_window_chosen_blocks_and_pooled_keys():
    row = 2 * 8  # K/V heads x head_dim
    always_slow, fast = 2 * 2 * row * 4 * 100, 2 * 2 * row * 4 * (2 + 8 + 2 * 4) + 2 * row * 4 * 25
    slow_instead = 2 * 2 * row * 4 * 100
    assert peers_report.kv_bytes_read(DUAL, 0.0, 99, 4) == always_slow + fast
    assert peers_report.kv_bytes_read(DUAL, 0.25, 99, 4) == always_slow + 0.75 * fast + 0.25 * slow_instead
    assert peers_report.kv_bytes_read(DUAL, 0.0, 15, 4) == peers_report.kv_bytes_read(DUAL, 1.0, 15, 4), "dense below dense_len"


@given(st.integers(1, 200))
def test_flops_of_a_dense_prompt_are_those_of_its_matrices_and_of_a_triangle_of_scores(n):
    c = DENSE
    layer = c.d_model * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim + 3 * c.d_model * c.d_ff
    expected = n * 2 * c.n_layers * layer + c.n_layers * 4 * c.n_heads * c.head_dim * n * (n + 1) / 2 + 2 * c.vocab_size * c.d_model
    assert peers_report.prompt_flops(c, 1.0, n) == pytest.approx(expected)


def test_the_roofline_is_the_longer_of_reading_and_computing():
    assert peers_report.of_roofline(2.0, 1e9, 1e9, MACHINE) == pytest.approx(0.5), "1 s of reading, 0.1 s of arithmetic"
    assert peers_report.of_roofline(2.0, 1e8, 1e10, MACHINE) == pytest.approx(0.5), "0.1 s of reading, 1 s of arithmetic"


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_nats_are_cross_entropy(n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, ids = 30 * torch.randn(n, 11, generator=generator), torch.randint(11, (n,), generator=generator)
    expected = float(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))
    assert peers_engines.nll(logits.numpy(), ids.tolist()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5), st.integers(1, 64))
def test_lengths_leave_room_for_what_is_decoded_and_change_only_where_they_must(lengths, n_decode):
    found = peers.fitting(lengths, n_decode, 8192)
    assert found == sorted(set(found)) and all(1 <= n <= 8192 - n_decode for n in found)
    assert {n for n in lengths if n + n_decode <= 8192} <= set(found)
    assert max(found) == min(max(lengths), 8192 - n_decode)


def test_lengths_that_cannot_be_are_refused():
    for lengths, n_decode in (([0, 5], 4), ([5], 0), ([5], 8192)):
        with pytest.raises(ValueError, match=r"at least 1 and fit the model's 8192 tokens"):
            peers.fitting(lengths, n_decode, 8192)


def test_a_text_too_short_is_named_with_both_counts(tiny):
    with pytest.raises(ValueError, match=r"has \d+ tokens and 5000 are needed"):
        peers.make_ids(tiny[1], ["the sum of two numbers"], 5000)
    ids = peers.make_ids(tiny[1], ["the sum of", "two apples are left"], 8)
    assert list(ids) == [*tiny[1].start_ids, *tiny[1].encode("the sum of"), *tiny[1].encode("two apples are left")][:8]


def test_peak_memory_is_the_childs_and_not_its_parents():
    child = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import peers_engines; b = bytearray(MB << 20); b[::4096] = b[::4096].replace(b'0', b'1')"
    child += "; print(peers_engines.peak_rss())"
    parent = f"import subprocess, sys; b = b'x' * (300 << 20); child = {child!r}\n"
    parent += "for mb in '1', '200': subprocess.run([sys.executable, '-c', child.replace('MB', mb)], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    small, large = (int(line) >> 20 for line in done.stdout.split())
    assert small < 150 and large - small > 150, f"{small} and {large} MB"


# ---- adapters


@pytest.fixture(scope="module")
def small_models(tiny, tmp_path_factory):
    """A dense model as a checkpoint of ours, as a Hugging Face folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("peers")
    _, tok = tiny
    config = DualBranchConfig(vocab_size=tok.vocab_size, d_model=64, n_layers=2, n_stem=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96, max_seq_len=256)
    model = DualBranchModel(config).eval()
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight.mul_(40)
    save_checkpoint(folder / "ours", model, tok)
    export(model, tok, folder / "hf", to="hf")
    export(model, tok, folder / "gguf", to="gguf")
    return model, {"ours": folder / "ours", "transformers": folder / "hf", "llama.cpp": folder / "gguf" / "gguf-float32.gguf"}


@pytest.mark.parametrize("library", peers_engines.ADAPTERS)
def test_an_adapter_reads_and_rewinds_as_one_pass_does(library, small_models, torch_settings, monkeypatch):
    adapter_class = peers_engines.ADAPTERS[library]
    if any(importlib.util.find_spec(name) is None for name in adapter_class.needs):
        pytest.skip(f"runs {library} (pip install {adapter_class.pip})")
    model, paths = small_models
    ids = torch.randint(11, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    other = [ids[-1 - i] for i in range(40)]
    error = 3e-2 if library == "llama.cpp" else 1e-3  # llama.cpp keeps K and V in half precision

    def check(found, i: int) -> None:
        difference = float((torch.from_numpy(found.copy()) - expected[i]).abs().max())
        assert difference < error * float(expected.std()), f"logits of token {i} differ by {difference:.1e}"

    engine = Engine(library, library, str(paths[library]), "fp32")
    if library == "llama.cpp":  # both ways: weights laid out anew first
        assert adapter_class(Job(engine, "speed", 1, 64)).read(ids[:3]).shape == (model.config.vocab_size,)
        inner = importlib.import_module("llama_cpp.llama_cpp")
        monkeypatch.setattr(inner, "llama_model_default_params", inner.llama_model_default_params)  # put back afterwards
        engine = replace(engine, repacked=False)
    adapter = adapter_class(Job(engine, "speed", 1, 64))
    assert library != "llama.cpp" or not adapter.model.model_params.use_extra_bufts
    adapter.read(other)
    adapter.rewind(0)
    check(adapter.read(ids[:30]), 29)
    for _ in range(2):
        adapter.rewind(30)
        for i in range(30, 40):
            check(adapter.read([ids[i]]), i)
    assert adapter.slow_share(0, 40) == 1.0
    assert adapter.weight_bytes()["all"] == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.02)
    quality = adapter_class(Job(engine, "quality", 1, 64))
    for _ in range(2):
        found = quality.logits(ids)
        assert found.shape == (40, model.config.vocab_size)
        check(found[17], 17)
    assert peers_engines.decode_error(quality, ids, found) < error
    found[39] = found[38]
    assert peers_engines.decode_error(quality, ids, found) > 1, "an error in the last token alone is seen"


# ---- processes, quality, turns


def test_a_job_comes_back_from_json_as_it_was():
    job = Job(Engine("x", "ours", "m", "fp32", "auto", 0.3), "speed", 2, 64, (1, 2), (1,), (1,), 1, ((3, 4), (5,)))
    again = Job.from_json(job.to_json())
    assert again.engine == job.engine and again.to_json() == job.to_json()


def test_a_process_that_fails_and_one_that_takes_too_long_say_so():
    job = Job(Engine("x", "no such library", "m", "fp32"), "speed", 1, 8)
    assert peers.run_job(job, 60) == ([], peers.Early(True, "failed: KeyError: 'no such library'"))
    assert peers.run_job(job, 1e-3) == ([], peers.Early(False, "stopped after 0.001 s"))


def make_args(**changes):
    args = peers.build_parser().parse_args(["m", "--precision", "fp32", "--eager"])
    vars(args).update({"prompts": [4, 8], "contexts": [8], "n_decode": 2, **changes})
    return args


def make_state(name: str, library: str = "llama.cpp", precision: str = "fp32", **more) -> peers.State:
    return peers.State(Engine(name, library, "file", precision, **more), DENSE, [4, 8])


def fake_jobs(monkeypatch, answer):
    """Jobs are answered by `answer(job)` -> (lines, early); returns the list of those run."""
    run = []
    monkeypatch.setattr(peers, "run_job", lambda job, limit: (run.append(job), answer(job))[1])
    return run


def test_an_engine_with_other_weights_is_not_timed_and_a_slow_one_keeps_its_speed(monkeypatch):
    nats = {"ours slow fp32 eager": 2.0, "right": 2.004, "wrong": 2.01, "rounded": 2.04, "fast": 5.0, "stale": 2.0}

    def answer(job):
        if job.engine.name == "slow":
            return [{}, {"nll": 1.0, "n_predicted": 1, "decode_error": 0.0}], peers.Early(False, "stopped after 9 s")
        error = 0.1 if job.engine.name == "stale" else 1e-5
        return [{}, {"nll": 3 * nats[job.engine.name], "n_predicted": 3, "decode_error": error}], None

    fake_jobs(monkeypatch, answer)
    states = [make_state("right"), make_state("wrong"), make_state("rounded", precision="q8_0"), make_state("fast", "ours", route="fast"), make_state("slow")]
    states.append(make_state("stale"))
    peers.check_quality(states, make_args(), ((1, 2, 3, 4),), lambda text: None)
    failed = [s.engine.name for s in states if s.failure is not None]
    assert failed == ["wrong", "stale"], [s.failure for s in states]
    assert "decoded logits differ" in states[5].failure
    assert f"{math.exp(2.01):.3f} where ours is {math.exp(2.0):.3f}" in states[1].failure
    assert states[4].windows is None and states[4].notes == ["perplexity not measured: stopped after 9 s"]


@pytest.mark.parametrize(("library", "also_plain", "expected"), [("llama.cpp", False, None), ("llama.cpp", True, "dies"), ("transformers", False, "dies")])
def test_llama_cpp_goes_without_weights_laid_out_anew_where_it_dies_of_them(monkeypatch, library, also_plain, expected):
    def answer(job):
        if job.engine.name == "x" and (job.engine.repacked or also_plain):
            return [], peers.Early(True, "dies")
        return [{}, {"nll": 1.0, "n_predicted": 1, "decode_error": 0.0}], None

    fake_jobs(monkeypatch, answer)
    state = make_state("x", library)
    peers.check_quality([state], make_args(), ((1, 2),), lambda text: None)
    assert state.failure == expected and state.engine.repacked == (expected is not None) and len(state.notes) == (expected is None)


@pytest.mark.parametrize("units", [True, False])
def test_our_packed_weights_may_round_a_pass_only_where_the_cpu_has_units_for_bf16(units, monkeypatch):
    monkeypatch.setattr(peers, "has_bf16_units", lambda device: units)
    assert (peers.differs(Engine("ours", "ours", "file", "int8"), 2.0, 2.0, 0.1) is None) == units
    assert peers.differs(Engine("ours", "ours", "file", "fp32"), 2.0, 2.0, 0.1) is not None


def test_engines_take_turns_and_what_one_did_not_reach_is_not_tried_again(monkeypatch):
    def answer(job):
        lines = [{"load_s": 1.0}, *({"tokens": n} for n in job.lengths)]
        if job.engine.name == "slow" and 8 in job.lengths:
            return lines[:2], peers.Early(False, "stopped after 9 s")
        if job.engine.name == "broken":
            return [], peers.Early(True, "failed: no memory")
        return lines, None

    run = fake_jobs(monkeypatch, answer)
    states = [make_state("quick"), make_state("slow"), make_state("broken")]
    assert len(list(peers.take_turns(states, make_args(repeats=3), (), lambda text: None))) == 3
    assert [j.engine.name for j in run] == ["quick", "slow", "broken", "slow", "quick", "quick", "slow"], "rounds, each begun by another engine"
    assert [j.lengths for j in run if j.engine.name == "slow"] == [(4, 8), (4,), (4,)]
    assert states[1].notes == ["stopped after 9 s, before 8 tokens"] and states[1].failure is None
    assert states[2].failure == "failed: no memory" and all(j.capacity == j.lengths[-1] + 2 and set(j.contexts) <= {8} for j in run)


def test_peers_that_are_not_installed_are_skipped_with_what_to_install(monkeypatch, tmp_path, tiny):
    found_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("llama_cpp", "transformers") else found_spec(name))
    loaded = LoadedModel(*tiny)
    engines, skipped = peers.find_engines(make_args(model="m"), loaded, loaded, tmp_path, print)
    assert [e.name for e in engines] == ["ours slow fp32 eager", "ours fast fp32 eager", "ours auto 0.3 fp32 eager"]
    assert set(skipped) == {"llama.cpp q8_0", "llama.cpp fp32", "transformers fp32", "transformers bf16"}
    assert all("pip install" in reason for reason in skipped.values()) and "llama-cpp-python" in skipped["llama.cpp q8_0"]
    assert not list(tmp_path.iterdir()), "nothing is exported for an engine that can't run"
    engines, skipped = peers.find_engines(make_args(model="m", engines=["transformers fp32"]), loaded, loaded, tmp_path, print)
    assert not engines and set(skipped) == {"transformers fp32"}


def test_what_our_exporter_cannot_write_is_skipped_with_its_reason(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def refuse(*args):
        raise ValueError("no family has two heads")

    monkeypatch.setattr(peers, "export", refuse)
    engines, skipped = peers.find_engines(make_args(model="m", engines=["llama.cpp"]), LoadedModel(*tiny), None, tmp_path, print)
    assert not engines and skipped == dict.fromkeys(("llama.cpp q8_0", "llama.cpp fp32"), "our exporter can't write it: no family has two heads")


def test_packed_engines_read_checkpoints_of_their_precision(tmp_path, tiny):
    loaded = LoadedModel(*tiny)
    engines, _ = peers.find_engines(make_args(model="m", precision=["int8"], engines=["ours"]), loaded, loaded, tmp_path, print)
    paths = {e.name: Path(e.model) for e in engines}
    assert paths.pop("ours slow fp32 eager") == Path("m")
    assert [p.name for p in paths.values()] == ["slow-int8", "dual-int8", "dual-int8"] and all((p / "manifest.json").is_file() for p in paths.values())
    assert loaded.model.precision == "fp32", "the model itself stays as it is"
    engines, skipped = peers.find_engines(make_args(model="m", precision=["int7"], engines=["ours"]), loaded, None, tmp_path, print)
    assert [e.name for e in engines] == ["ours slow fp32 eager"] and "precision 'int7' is unknown" in skipped["ours slow int7 eager"]


def test_compiled_engines_are_compiled_before_or_skipped(tmp_path, tiny, monkeypatch):
    loaded, built = LoadedModel(*tiny), []
    args = make_args(model="m", precision=["fp32", "int8"], engines=["ours"], eager=False)
    monkeypatch.setattr(peers.compiled, "build", lambda model, note: built.append(model.precision))
    engines, _ = peers.find_engines(args, loaded, None, tmp_path, print)
    assert [(e.name, e.compiled) for e in engines] == [("ours slow fp32 eager", False), ("ours slow fp32", True), ("ours slow int8", True)]
    assert built == ["fp32", "int8"]
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    engines, skipped = peers.find_engines(args, loaded, None, tmp_path / "other", print)
    assert [e.name for e in engines] == ["ours slow fp32 eager"] and all("no-such-compiler" in skipped[name] for name in ("ours slow fp32", "ours slow int8"))


# ---- what is written


def make_result() -> dict:
    def turn(first: float, step: float, memory: int) -> list[dict]:
        start = {"import_s": 1.0, "load_s": 2.0, "warmup_s": 0.5, "weight_bytes": {"all": 4000}, "kv_element_bytes": 4, "details": "AVX2 = 1"}
        start["load_peak_rss_bytes"] = 5 * 10**8
        records = [{"tokens": 4, "first_token_s": first / 2, "prompt_slow_share": 1.0, "peak_rss_bytes": 2}]
        records.append(records[0] | {"tokens": 8, "first_token_s": first, "step_s": step, "step_slow_share": 1.0, "peak_rss_bytes": memory})
        return [start, *records]

    windows = [{"nll": 6.0, "n_predicted": 3, "decode_error": 1e-5}, {"nll": 2.0, "n_predicted": 1}]
    turns = [turn(0.1, 0.02, 10**9), turn(0.3, 0.01, 2 * 10**9), turn(0.2, 0.04, 3 * 10**9)]
    ours = peers_report.summary(Engine("ours slow fp32", "ours", "m", "fp32"), DENSE, turns, windows, MACHINE, [])
    slow = peers_report.summary(Engine("transformers bf16", "transformers", "m", "bf16"), DENSE, [turns[0][:2]], [], MACHINE, ["stopped after 9 s"])
    return {
        "benchmark": "peers", "command": "python benchmarks/peers.py", "date": "2026-11-22 10:00 UTC", "commit": "abc", "device": "a CPU", "model": "m",
        "weights": "m.Q4_1.gguf", "dual": None, "versions": {"torch": "2"}, "machine": MACHINE, "engines": [ours, slow],
        "skipped": {"llama.cpp q8_0": "llama_cpp isn't installed"},
        "settings": {"threads": 2, "repeats": 3, "n_decode": 2, "window": 4, "quality_tokens": 4},
    }  # fmt: skip


def test_a_summary_holds_medians_spread_and_what_was_not_reached():
    ours, slow = make_result()["engines"]
    assert ours["perplexity"] == pytest.approx(math.exp(2)), "nats are averaged over tokens, not over windows"
    assert [r["tokens"] for r in ours["first_token"]] == [4, 8] and [r["tokens"] for r in ours["decode"]] == [8]
    assert ours["decode"][0]["tokens_per_s"] == pytest.approx({"median": 50, "low": 37.5, "high": 75})
    assert ours["first_token"][1]["seconds"]["median"] == 0.2 and ours["peak_rss_bytes"]["median"] == 2e9
    least = max(ours["decode"][0]["bytes"] / 1e9, ours["decode"][0]["flops"] / 1e10)
    assert ours["decode"][0]["of_roofline"] == pytest.approx(least / 0.02)
    assert slow["perplexity"] is None and not slow["decode"] and [r["tokens"] for r in slow["first_token"]] == [4]


def test_tables_put_roofline_and_perplexity_beside_every_speed():
    (_, _, engines), (_, header, first), (_, _, decoded) = peers_report.tables(make_result())
    assert header == ["engine", "4", "8", "perplexity"]
    assert first[0][2].startswith("200 (150 to 250), ") and first[0][2].endswith(" %") and first[0][3] == "7.39"
    assert decoded[0][1].startswith("50.0 (37.5 to 75.0), ") and decoded[1][1:] == ["", ""]
    assert engines[0][5:7] == ["500", "2,000 (1,500 to 2,500)"]


def test_files_hold_the_same_numbers_and_name_hardware_versions_and_the_skipped(tmp_path, capsys):
    result, out = make_result(), tmp_path / "new" / "2026-11-22-cpu"
    peers_report.write(result, str(out))
    assert json.loads(Path(f"{out}.json").read_text()) == json.loads(json.dumps(result))
    text = Path(f"{out}.md").read_text()
    named = ["a CPU, 2 threads", "torch 2", "commit abc", "1.00 GB/s", "from m.Q4_1.gguf", "llama_cpp isn't installed", "AVX2 = 1", "bf16: stopped"]
    for words in [*named, "200 (150 to 250)", "2026-11-22-cpu.png"]:
        assert words in text, words
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    from rich.console import Console

    peers_report.show(result, Console(width=200))
    shown = capsys.readouterr().out
    assert "200 (150 to 250)" in shown and "llama.cpp q8_0: not measured: llama_cpp isn't installed" in shown


def test_nothing_is_drawn_where_no_quality_stands_beside_a_speed(tmp_path):
    result = make_result()
    result["engines"] = result["engines"][1:]
    peers_report.write(result, str(tmp_path / "x"))
    assert not (tmp_path / "x.png").exists() and "png" not in (tmp_path / "x.md").read_text()


# ---- the whole


@pytest.mark.slow  # three processes that import torch
def test_a_quick_run_measures_our_engines_on_a_tiny_model(tmp_path, tiny, monkeypatch, capsys):
    save_checkpoint(tmp_path / "m", *tiny)
    rng = random.Random(0)
    words = "the sum of two numbers is what how many apples are left after three people take".split()
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(words, k=600)))
    monkeypatch.setattr(peers, "measure_machine", lambda c: {key: value["median"] for key, value in MACHINE.items()})
    name = "ours auto 0.3 fp32 eager"
    options = ["--engines", name, "--precision", "fp32", "--eager", "--quick", "--threads", "1", "--text", str(tmp_path / "text.txt")]
    assert peers.main([str(tmp_path / "m"), *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    (engine,) = result["engines"]
    assert engine["engine"] == name and not engine["notes"] and not result["skipped"]
    assert [r["tokens"] for r in engine["first_token"]] == [32, 64] and [r["tokens"] for r in engine["decode"]] == [32]
    assert all(0 < r["slow_share"] < 1 for r in engine["first_token"]), "auto sends some of the prompt's tokens slow, and not all"
    assert engine["decode"][0]["tokens_per_s"]["median"] > 0 and 1e7 < engine["peak_rss_bytes"]["median"] < 4e9
    model, tok = tiny
    windows = peers.cut_windows(tok, [(tmp_path / "text.txt").read_text()], 128, 256).tokens
    with torch.inference_mode():
        nats = sum(float(F.cross_entropy(model(w[None], "auto", budget=0.3).logits[0, :-1], w[1:], reduction="sum")) for w in windows)
    assert engine["perplexity"] == pytest.approx(math.exp(nats / sum(len(w) - 1 for w in windows)), rel=1e-4)
