"""A public model is taught to reason, and learns on from its own solutions: only right ones, only of training problems, sampled once."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from public_models import write_gguf

from dualbranch import load
from dualbranch.chat import render_prompt
from dualbranch.checkpoint import load_checkpoint
from dualbranch.data.problem import split_of, verify
from dualbranch.distill import pipeline, self_training, stages, trainer
from dualbranch.distill.config import RunConfig, load_run
from dualbranch.evaluate import leaks_reasoning
from dualbranch.generate import generate_batch
from dualbranch.modes import resolve
from dualbranch.report import read_metrics, training
from dualbranch.sampling import SamplingParams
from dualbranch.tokenizer_hf import with_thinking
from dualbranch.training_state import load_latest_state

ROOT = Path(__file__).parents[1]
SETTINGS = ["teacher.steps=2", "teacher.n_solutions=200", "student.steps=2", "student.refit_rows=4", "gate.rows=4", "gate.steps=3", "gate.calibration_rows=4",
            "gate.n_problems=4", "data.seq_len=320", "data.text_share=0", "data.corpora=[]", "model.n_stem=1", "model.n_tail=0", "model.fast_n_heads=2",
            "model.fast_d_ff=32", "model.d_gate=4", "precision=fp32", "save_every=2"]  # fmt: skip


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A random llama with SmolLM2's kind of tokenizer, which knows no thinking."""
    path = tmp_path_factory.mktemp("public") / "model.gguf"
    write_gguf(path, overrides={"context_length": 1024})
    return path


def config(public: Path, out: Path, *overrides: str) -> RunConfig:
    return load_run(ROOT / "configs" / "smollm2-reason.yaml", [f"teacher.init={public}", f"out={out}", *SETTINGS, *overrides])


def replies_right_every_other_time(model, tok, prompts, mode, params):
    """Stands in for `generate_batch`; the problems are what `solve` was given last."""
    problems = replies_right_every_other_time.problems
    assert len(prompts) == len(problems) and mode.route == "slow" and mode.thinking == "on"
    form = tok.control
    return [
        SimpleNamespace(answer=p.answer if i % 2 else "nonsense", reasoning=p.trace,
                        ids=[form["<think>"], *tok.encode(p.trace), form["</think>"], *tok.encode(p.answer), form["<|im_end|>"]])
        for i, p in enumerate(problems)
    ]  # fmt: skip


@pytest.fixture
def half_right(monkeypatch):
    solve = self_training.solve

    def remembering(model, tok, problems, *args):
        replies_right_every_other_time.problems = problems
        calls.append(len(problems))
        return solve(model, tok, problems, *args)

    calls: list[int] = []
    monkeypatch.setattr(self_training, "solve", remembering)
    monkeypatch.setattr(self_training, "generate_batch", replies_right_every_other_time)
    return calls


def conversations(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((folder / "solutions").glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_a_model_without_a_thinking_mode_gets_one_and_distils_from_its_own_right_solutions(public, tmp_path, half_right):
    c = config(public, tmp_path)
    folder = pipeline.open_run(c, False)
    log = pipeline.MetricsLog(folder / "metrics.jsonl")
    teacher, tok = pipeline.make_teacher(c, folder, log, torch.device("cpu"))
    assert tok.thinks and not load(public).tokenizer.thinks
    assert load_checkpoint(folder / "teacher")[1].thinks
    c = self_training.with_solutions(c, folder, teacher, tok, log)
    kept = conversations(folder)
    assert half_right == [128, 72] and len(kept) == 100 and all(k["right"] for k in kept)
    assert all("nonsense" not in k["messages"][1]["content"] for k in kept)
    assert "of 200 new problems were right in 50.0 %; the student learned from 100" in training(read_metrics(folder / "metrics.jsonl"), folder, c)
    data = stages.source(c, tok, purpose=1)
    documents = {tuple(ids) for ids, _ in data.solutions}
    drawn = [data.example(random.Random(i)) for i in range(60)]
    n_solutions = sum(tuple(ids) in documents for ids, _ in drawn)
    assert 0.5 < n_solutions / 60 < 0.9  # data.thinking is 0.7
    assert all(tok.control["<think>"] not in ids for ids, _ in drawn if tuple(ids) not in documents)
    ids, weights = drawn[0] if tuple(drawn[0][0]) in documents else next(d for d in drawn if tuple(d[0]) in documents)
    assert weights[ids.index(tok.control["<think>"]) + 1] == 1.0
    sized = dataclasses.replace(c.model, vocab_size=tok.vocab_size)
    student = pipeline.make_student(c, sized, folder / "student", "student", teacher, tok, log)
    tokens = torch.tensor([ids])
    torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits)
    student = pipeline.make_gate(c, student, folder / "gate", tok, log)
    prompts = [render_prompt(tok, [{"role": "user", "content": f"What is {n} + 27?"}]) for n in range(10, 30)]
    for mode in ("fast", resolve("think", thinking="off"), resolve("think", thinking_budget=5), resolve("auto", thinking="on", thinking_budget=5), "auto"):
        mode = resolve(mode)
        for reply in generate_batch(student, tok, prompts, mode, SamplingParams(max_tokens=40, temperature=1.0)):
            assert reply.answer.strip() and reply.n_think <= (mode.thinking_budget or 40)
            assert mode.thinking != "off" or not leaks_reasoning(tok, reply)
            assert mode.thinking != "on" or reply.thought


def test_the_control_keeps_wrong_solutions_too_and_a_teacher_that_solves_nothing_is_refused(public, tmp_path, half_right, monkeypatch):
    c = config(public, tmp_path, "teacher.verify=false")
    model, tok = load(public).model, with_thinking(load(public).tokenizer)
    self_training.with_solutions(c, tmp_path, model, tok, lambda record: None)
    assert len(conversations(tmp_path)) == 200
    monkeypatch.setattr(self_training, "verify", lambda problem, answer: False)
    with pytest.raises(ValueError, match=r"solved none of 200.*teacher\.steps"):
        self_training.with_solutions(config(public, tmp_path), tmp_path / "none", model, tok, lambda record: None)


def test_rounds_that_are_done_are_not_sampled_again(public, tmp_path, half_right):
    c = config(public, tmp_path)
    model, tok = load(public).model, with_thinking(load(public).tokenizer)
    self_training.with_solutions(c, tmp_path, model, tok, lambda record: None)
    before = conversations(tmp_path)
    (tmp_path / "solutions" / "00001.jsonl").unlink()
    half_right.clear()
    self_training.with_solutions(c, tmp_path, model, tok, lambda record: None)
    assert half_right == [72] and conversations(tmp_path) == before


def test_problems_to_solve_are_english_of_the_training_split_and_new_to_the_teacher(public, tmp_path):
    c, tok = config(public, tmp_path, "teacher.steps=30", "teacher.decide=0.5"), with_thinking(load(public).tokenizer)
    trained_on, data, needs = set(), stages.source(c, tok), [True, False] * 20
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / stages.ASSESSMENT).write_text(json.dumps(needs))
    assessed = data.assessed_problem
    data.assessed_problem = lambda i: trained_on.add((p := assessed(i)).key) or p
    draw = data.problem
    data.problem = lambda *args: trained_on.add((p := draw(*args)).key) or p
    for step in range(30):
        data.needs_thinking = needs if step >= 15 else ()
        data.batch(step, step / 30)
    problems = self_training.new_problems(c, tok, tmp_path)
    assert all(split_of(p.key) == "train" and p.lang == "en" and p.task in c.data.tasks and verify(p, p.answer) for p in problems)
    assert len({p.prompt for p in problems}) == 200
    assert len(trained_on) > 100 and not trained_on & {p.key for p in problems}


def test_the_decision_to_think_is_found_in_a_public_format(public, tmp_path):
    c, tok = config(public, tmp_path), with_thinking(load(public).tokenizer)
    rows = stages.source(c, tok).batch(0)
    at = stages.decides(tok, rows)
    assert int(at.sum()) == rows.tokens.eq(tok.control["<|im_end|>"]).sum() // 3  # one for each system, user and assistant turn
    assert {tok.control["<think>"], tok.control["</think>"]} == set(rows.targets[at].tolist())
    assert not stages.decides(load(public).tokenizer, rows).any()


def test_new_tokens_start_like_others_and_are_fitted_where_the_model_is_to_say_them(public, tmp_path):
    c, model, tok = config(public, tmp_path), load(public).model, with_thinking(load(public).tokenizer)
    ids = [tok.control["<think>"], tok.control["</think>"]]
    before = model.embed.weight.detach().clone()
    stages.start_tokens(model, ids, seed=0)
    started = model.embed.weight[ids].detach().clone()
    assert abs(float(torch.cosine_similarity(*(started - before.mean(0)), dim=0))) < 0.5
    spread = (before - before.mean(0)).norm(dim=1).mean()
    assert ((started - before.mean(0)).norm(dim=1) - spread).abs().max() < spread / 2
    batches = [stages.source(c, tok, purpose=7).batch(i) for i in range(4)]

    def loss_of_closing(rows) -> float:
        at = (rows.targets == ids[1]) & (rows.loss_weights > 0)
        return float(torch.nn.functional.cross_entropy(model(rows.tokens, doc_start=rows.doc_start).logits[at], rows.targets[at]).detach())

    unseen = stages.source(c, tok, purpose=8).batch(0)
    at_first = loss_of_closing(unseen)
    stages.fit_tokens(model, ids, batches)
    assert loss_of_closing(unseen) < at_first - 1.0
    changed = (model.embed.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(ids)


@pytest.mark.parametrize("left_over, fitted", [(".step-00000002.tmp", True), (None, True), ("whole", False)])
def test_new_tokens_are_fitted_unless_a_whole_state_holds_them(public, tmp_path, monkeypatch, left_over, fitted):
    c, tok, calls = config(public, tmp_path), with_thinking(load(public).tokenizer), []
    if left_over:
        (tmp_path / "state" / left_over).mkdir(parents=True)
    monkeypatch.setattr(stages, "load_latest_state", lambda folder: object() if left_over == "whole" else load_latest_state(folder))
    monkeypatch.setattr(stages, "fit_tokens", lambda *args: calls.append(1))
    monkeypatch.setattr(stages, "train", lambda *args: None)
    stages.train_teacher(dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=tok.vocab_size)), tok, tmp_path, print, torch.device("cpu"))
    assert bool(calls) is fitted


@pytest.mark.parametrize("stays", [0.0, 0.25, 1.0])
def test_going_back_keeps_a_share_of_what_training_changed_and_all_of_new_tokens(public, stays):
    start, model = load(public).model, load(public).model
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    stages.go_back(model, start, stays, [3, 7])
    for name, p in start.named_parameters():
        expected = p + stays * (trained[name] - p)
        if name == "embed.weight":
            expected[[3, 7]] = trained[name][[3, 7]]
        torch.testing.assert_close(model.get_parameter(name), expected, msg=name)


@pytest.mark.parametrize("stop_after", [2, 4, 5])
def test_a_teacher_goes_back_once_at_its_step_whether_resumed_or_not(public, tmp_path, monkeypatch, stop_after):
    """Steps 0-3, back, steps 4 and 5; a run stopped after so many steps goes on as if it had not been."""
    weights, calls = {}, []
    real, log = stages.go_back, trainer.MetricsLog.__call__
    monkeypatch.setattr(stages, "go_back", lambda *args: calls.append(1) or real(*args))

    def stopping(self, record):
        log(self, record)
        if record["step"] + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    for name in ("whole", "stopped"):
        calls.clear()
        c = config(public, tmp_path / name, "teacher.steps=6", "teacher.blend=0.5", "teacher.blend_at=0.67", "until=teacher")
        if name == "stopped":
            monkeypatch.setattr(trainer.MetricsLog, "__call__", stopping)
            with pytest.raises(trainer.Stopped):
                pipeline.run(c)
            monkeypatch.setattr(trainer.MetricsLog, "__call__", log)
        pipeline.run(c, resume=name == "stopped")
        assert len(calls) == 1
        weights[name] = load_checkpoint(c.folder / "teacher")[0].state_dict()
    assert all(torch.equal(weights["whole"][k], weights["stopped"][k]) for k in weights["whole"])


def test_a_teacher_that_is_to_go_back_does_so_before_its_last_step_at_the_latest(public, tmp_path):
    assert [config(public, tmp_path, "teacher.steps=5", f"teacher.blend_at={at}").teacher.step_back for at in (0, 0.4, 1)] == [0, 2, 4]
