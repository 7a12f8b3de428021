"""The training loop's promises: same gradient for any split, same run after any interruption, nothing lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dualbranch.checkpoint import load_checkpoint
from dualbranch.distill import pipeline, stages, trainer
from dualbranch.distill.config import OptimConfig, RunConfig
from dualbranch.distill.main import main
from dualbranch.distill.optim import Muon, lr_factor, orthogonalize
from dualbranch.distill.sources import BatchSource, Prefetcher
from dualbranch.distill.teacher_cache import TeacherCache
from dualbranch.distill.trainer import NonFiniteLoss
from dualbranch.model import DualBranchModel
from dualbranch.schema import ConfigError, load_yaml
from dualbranch.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
SMALLER = [
    "data.batch_rows=4",
    "tokenizer.n_problems=400",
    "tokenizer.vocab_size=700",
    "teacher.steps=6",
    "teacher.n_assess=4",
    "student.steps=4",
    "student.refit_rows=4",
    "gate.rows=4",
    "gate.steps=5",
    "gate.calibration_rows=4",
    "gate.n_problems=4",
    "evaluation.dense_baseline=false",
    "save_every=2",
]


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_yaml(TINY, RunConfig, [*SMALLER, f"out={tmp_path}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny run up to its gate, uninterrupted; read only."""
    folder = tmp_path_factory.mktemp("finished")
    run_to_gate(config(folder))
    return folder / "tiny"


def run_to_gate(c: RunConfig, resume: bool = False) -> None:
    """The pipeline without its evaluation, which has tests of its own."""
    folder = pipeline.open_run(c, resume)
    log = trainer.MetricsLog(folder / "metrics.jsonl")
    teacher, tok = pipeline.make_teacher(c, folder, log, torch.device("cpu"))
    sized = dataclasses.replace(c.model, vocab_size=tok.vocab_size)
    student = pipeline.make_student(c, sized, folder / "student", "student", teacher, tok, log)
    pipeline.make_gate(c, student, folder / "gate", tok, log)


def trace(run: Path) -> list[tuple]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"], r.get("loss"), r.get("grad_norm"), r.get("needs_thinking")) for r in records]


def test_every_stage_leaves_a_checkpoint_and_a_metrics_line_per_step(finished):
    counts = {}
    for name, *_ in trace(finished):
        counts[name] = counts.get(name, 0) + 1
    assert counts == {"teacher": 6, "assess": 1, "student": 4, "gate": 5, "thinking": 1}
    for name in ("teacher", "student", "gate"):
        assert (finished / name / "done").exists()
    model, _ = load_checkpoint(finished / "gate")
    assert model.calibration is not None


def test_frozen_slow_branch_is_the_teacher_bit_for_bit(finished):
    teacher, _ = load_checkpoint(finished / "teacher")
    student, tok = load_checkpoint(finished / "gate")
    t = torch.randint(5, tok.vocab_size, (2, 50))
    assert torch.equal(student(t, "slow").logits, teacher(t).logits)
    assert not torch.equal(student(t, "fast").logits, teacher(t).logits)


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 8])
def test_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch, stop_after):
    """The kill comes after the optimizer moved and before the state is written: everything since the last state is lost."""

    class Killed(BaseException):
        pass

    real, count = trainer.MetricsLog.__call__, [0]

    def dying(self, record):
        real(self, record)
        count[0] += 1
        if count[0] == stop_after:
            with self.path.open("a") as f:
                f.write('{"half a li')
            raise Killed

    monkeypatch.setattr(trainer.MetricsLog, "__call__", dying)
    with pytest.raises(Killed):
        run_to_gate(config(tmp_path))
    monkeypatch.setattr(trainer.MetricsLog, "__call__", real)
    run_to_gate(config(tmp_path), resume=True)
    assert trace(tmp_path / "tiny") == trace(finished)
    for name in ("teacher", "student", "gate"):
        a, b = (load_checkpoint(f / name)[0].state_dict() for f in (finished, tmp_path / "tiny"))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_kill_dash_nine_then_resume_finishes_with_the_same_losses(finished, tmp_path):
    arguments = [sys.executable, "train.py", str(TINY), "--resume"] + [x for o in [*SMALLER, f"out={tmp_path}", "until=teacher"] for x in ("--set", o)]
    process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = tmp_path / "tiny" / "teacher" / "state" / "step-00000002"
    for _ in range(1200):
        if state.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(arguments[2:]) == 0
    assert [r for r in trace(tmp_path / "tiny")] == [r for r in trace(finished) if r[0] in ("teacher", "assess")]


def test_ctrl_c_saves_and_says_how_to_continue(finished, tmp_path, monkeypatch, capsys):
    real, count = stages.hard_loss, [0]

    def interrupting(*a):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(stages, "hard_loss", interrupting)
    arguments = [str(TINY)] + [x for o in [*SMALLER, f"out={tmp_path}", "until=teacher"] for x in ("--set", o)]
    assert main(arguments) == 130
    assert "stopped in stage teacher after step 3 of 6; the same command with --resume continues" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert trace(tmp_path / "tiny") == [r for r in trace(finished) if r[0] in ("teacher", "assess")]


def test_non_finite_loss_stops_and_names_the_last_good_state(tmp_path, monkeypatch, capsys):
    real, count = stages.hard_loss, [0]

    def exploding(*a):
        count[0] += 1
        return real(*a) * (float("nan") if count[0] == 4 else 1.0)

    monkeypatch.setattr(stages, "hard_loss", exploding)
    arguments = [str(TINY)] + [x for o in [*SMALLER, f"out={tmp_path}", "until=teacher"] for x in ("--set", o)]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "the loss is nan" in message and "at step 3" in message and "teacher/state" in message and "optim.lr" in message
    assert (tmp_path / "tiny" / "teacher" / "state" / "step-00000002").exists()


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_does_not_depend_on_the_micro_batch_split(parts, finished):
    gradients = []
    for n in (1, parts):
        model, tok = load_checkpoint(finished / "teacher")
        c = load_yaml(finished / "config.yaml", RunConfig)
        data = BatchSource(c.data, tok, 0, c.model.sparse.block_size)

        def loss(rows, step, model=model):
            return {"hard": stages.text_loss(model, rows)}

        loop = trainer.Loop("x", finished, 1, OptimConfig(micro_batches=n), 1, data.batch, loss, print)
        trainer.gradient_step(model, loop, data.batch(0), 0)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-3


def test_bf16_products_keep_the_gradients_direction_and_fp32_weights(finished):
    """With both branches at work; "fp32" is exact, and "auto" one of the two."""
    model, tok = load_checkpoint(finished / "student")
    c = load_yaml(finished / "config.yaml", RunConfig)
    data = BatchSource(c.data, tok, 0, c.model.sparse.block_size)
    rows, gradients = data.batch(0), {}
    route = torch.rand(rows.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4

    def loss(rows, step):
        logits = model(rows.tokens, route, doc_start=rows.doc_start).logits
        return {"hard": stages.hard_loss(logits.flatten(0, 1), rows.targets.flatten(), rows.loss_weights.flatten())}

    for precision in ("fp32", "bf16", "auto"):
        model.zero_grad()
        trainer.gradient_step(model, trainer.Loop("x", finished, 1, OptimConfig(), 1, data.batch, loss, print, precision), rows, 0)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        gradients[precision] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    cosine = torch.cosine_similarity(gradients["fp32"], gradients["bf16"], dim=0)
    assert cosine > 0.995, cosine
    assert not torch.equal(gradients["fp32"], gradients["bf16"])
    assert any(torch.equal(gradients["auto"], gradients[name]) for name in ("fp32", "bf16"))


def test_batches_prepared_ahead_by_processes_are_the_same(finished):
    tok = Tokenizer.load(finished / "tokenizer.model")
    data = BatchSource(load_yaml(TINY, RunConfig).data, tok, 0, 16)
    ahead = Prefetcher(data.batch, 7, workers=2)
    for step in (0, 1, 2, 5, 6):  # a jump, as after a resume
        assert torch.equal(ahead(step).tokens, data.batch(step).tokens)
    data.seed = 1
    assert not torch.equal(ahead.batch(3).tokens, BatchSource(data.config, tok, 0, 16).batch(3).tokens)
    ahead.restart()
    assert torch.equal(ahead(3).tokens, data.batch(3).tokens)


def test_routes_of_batches_come_in_their_shares_and_mixes_are_mostly_fast(finished):
    c = load_yaml(TINY, RunConfig, [*SMALLER, "student.routes=[0.25, 0.75, 0.0]"])
    student, tok = load_checkpoint(finished / "gate")
    rows = BatchSource(c.data, tok, 0, 16).batch(0)
    routes = [stages.choose_route(c, step, rows, student) for step in range(400)]
    mixes = [r for r in routes if not isinstance(r, str)]
    assert {r for r in routes if isinstance(r, str)} == {"fast"} and 0.68 < len(mixes) / len(routes) < 0.82
    shares = torch.stack([r.float().mean(1) for r in mixes]).flatten()
    assert 0.2 < shares.mean() < 0.3 and shares.median() < 0.2 and shares.max() > 0.9
    again = stages.choose_route(c, 399, rows, student)
    assert routes[399] == again if isinstance(again, str) else torch.equal(routes[399], again)
    assert stages.choose_route(c, 0, rows, load_checkpoint(finished / "teacher")[0]) == "slow"


def test_a_teacher_can_start_from_another_and_keeps_its_tokenizer(finished, tmp_path):
    c = config(tmp_path, f"teacher.init={finished / 'teacher'}", "teacher.steps=1", "teacher.optim.lr=0", "teacher.optim.lr_other=0", "until=teacher")
    folder = pipeline.run(c)
    (old, old_tok, *_), (new, new_tok, *_) = load_checkpoint(finished / "teacher"), load_checkpoint(folder / "teacher")
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    assert new_tok.hash == old_tok.hash


def test_no_piece_of_the_tokenizer_joins_a_name_with_its_surroundings(finished):
    tok = Tokenizer.load(finished / "tokenizer.model")
    for text, name in (("and Anna is", "Anna"), ('{"name": "Anna"}', "Anna"), ("小明今年", "小明"), ("住在小明家", "小明")):
        pieces = [tok.decode([i]) for i in tok.encode(text)]
        assert not any(name in piece and piece != name for piece in pieces), pieces


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda'"):
        pipeline.run(config(tmp_path, "device=cuda"))
    assert not (tmp_path / "tiny").exists()


def test_teacher_cache_runs_the_teacher_once_per_batch_and_forgets_another_teacher(finished, tmp_path):
    model, tok = load_checkpoint(finished / "teacher")
    c = load_yaml(finished / "config.yaml", RunConfig)
    data = BatchSource(c.data, tok, 0, c.model.sparse.block_size)
    cache = TeacherCache(tmp_path, 16, model)
    rows = [data.batch(i) for i in (0, 1)]
    weights = [r.loss_weights for r in rows]
    logits = [model(r.tokens, doc_start=r.doc_start, logits_at=w > 0).logits.detach() for r, w in zip(rows, weights, strict=True)]
    first = float(cache.loss(0, rows[0], logits[0], weights[0]))
    cache.loss(1, rows[1], logits[1], weights[1])
    again = TeacherCache(tmp_path, 16, model)
    assert float(again.loss(0, rows[0], logits[0], weights[0])) == first
    assert (cache.n_computed, again.n_computed) == (2, 0)
    assert abs(first) / float(rows[0].loss_weights.sum()) < 1e-3  # student equals teacher, targets are stored in half precision
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    assert TeacherCache(tmp_path, 16, model).folder != cache.folder
    next(cache.folder.iterdir()).write_bytes(b"damaged")
    for i in (0, 1):
        cache.loss(i, rows[i], logits[i], weights[i])
    assert cache.n_computed == 3


def test_a_run_with_cached_logits_trains(finished, tmp_path):
    run_to_gate(config(tmp_path, "student.cache_logits=8", "student.distinct_batches=2", "student.align=0"))
    losses = [r[2] for r in trace(tmp_path / "tiny") if r[0] == "student"]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("init", ["scratch", "smaller"])
def test_other_student_inits_train_all_of_the_student(finished, tmp_path, init):
    overrides = ["student.init=" + init] + (["model.d_ff=96"] if init == "smaller" else [])
    c = config(tmp_path, *overrides)
    teacher, tok = load_checkpoint(finished / "teacher")
    sized = dataclasses.replace(c.model, vocab_size=tok.vocab_size)
    log = trainer.MetricsLog(tmp_path / "metrics.jsonl")
    student = pipeline.make_student(c, sized, tmp_path / "student", "student", teacher, tok, log)
    fresh = DualBranchModel(sized)
    fresh.init_weights(c.seed + 1)
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, fresh.get_parameter(n))}
    assert any(".slow." in n for n in moved) and any(".fast." in n for n in moved)


def test_resuming_with_another_config_is_refused_naming_the_difference(finished, capsys):
    arguments = [str(TINY), "--resume"] + [x for o in [*SMALLER, f"out={finished.parent}", "student.steps=9"] for x in ("--set", o)]
    assert main(arguments) == 2
    assert "student.steps: 4 -> 9" in capsys.readouterr().err


def test_a_run_that_was_to_stop_early_can_go_on_and_save_more_often(tmp_path):
    early = config(tmp_path, "until=teacher")
    folder = pipeline.open_run(early, False)
    assert pipeline.open_run(dataclasses.replace(early, until="report", save_every=1), True) == folder


def test_what_is_not_done_yet_can_go_on_with_other_settings(tmp_path):
    first = config(tmp_path, "gate.steps=6")
    folder = pipeline.open_run(first, False)
    other = dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, workers=1),
        gate=dataclasses.replace(first.gate, steps=7),
        evaluation=dataclasses.replace(first.evaluation, n_problems=3),
    )
    assert pipeline.open_run(other, True) == folder and load_yaml(folder / "config.yaml", RunConfig) == other
    (folder / "gate").mkdir()
    (folder / "gate" / "done").write_text("")
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(pipeline.RunExists, match=r"gate\.steps: 7 -> 6; evaluation\.n_problems: 3 ->"):
        pipeline.open_run(first, True)


@pytest.mark.parametrize(
    "wrong",
    ["gate.default_budget=30", "evaluation.budgets=[0.1,30]", "data.batch_rows=0", "data.text_share=1.5", "student.temperature=0", "student.steps=-5",
     "data.self_text=100", "data.tasks=[juggling]", "teacher.n_assess=0"],
)  # fmt: skip
def test_numbers_that_no_stage_could_work_with_are_refused_before_the_first(tmp_path, wrong):
    with pytest.raises(ValueError, match=wrong.split("=")[0].split(".")[1]):
        config(tmp_path, wrong)


@pytest.mark.parametrize("wrong", ["data.text=[nofile.txt]", "data.corpora=[nothing]", "evaluation.text=[nofile.txt]", "evaluation.wikitext=[nofile.txt]"])
def test_what_a_later_stage_will_read_is_opened_before_the_first(tmp_path, wrong):
    share = ["data.text_share=0.5"] if wrong.startswith("data") else []
    with pytest.raises(ValueError, match=r"nofile\.txt|nothing"):
        pipeline.run(config(tmp_path, wrong, *share))
    assert not any(tmp_path.iterdir())


def test_rows_that_alignment_lengthens_are_still_as_many_as_asked_for(tmp_path):
    c = config(tmp_path, "data.seq_len=250", "data.batch_rows=16")
    tok = Tokenizer.train(["What is 12 + 7? A farm has chickens and rabbits."] * 50, 300)
    data = BatchSource(c.data, tok, 0, 16)
    assert {len(data.batch(step)) for step in range(12)} == {16}


def test_a_folder_that_cannot_be_written_is_reported_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(TINY), "--set", f"out={tmp_path}/file"]) == 2
    assert "cannot write to the run folder" in capsys.readouterr().err


def test_config_mistakes_are_one_line_errors(tmp_path, capsys):
    assert main(["configs/none.yaml"]) == 2
    assert main([str(TINY), "--set", "student.stepz=3"]) == 2
    assert "steps" in capsys.readouterr().err
    assert main([str(TINY), "--set", f"out={tmp_path}", "--set", "data.tasks=[juggling]", "--set", "until=teacher", "--set", "tokenizer.n_problems=200"]) == 2
    assert "juggling" in capsys.readouterr().err
    assert main([str(TINY), "--set", f"out={tmp_path}/b", "--set", "teacher.checkpoint=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        "student.routes=[0,0,0]", "student.routes=[.inf,0,0]", "data.levels_start=[0,0,0]", "data.levels_end=[0,0,0]", "gate.rows=0", "gate.lr=-1",
        "gate.calibration_rows=0", "student.optim.lr=-1", "teacher.optim.lr=.nan", "teacher.optim.clip_norm=0", "student.optim.weight_decay=-5",
        "student.optim.warmup=2", "student.optim.decay=-0.1", "teacher.optim.lr_other=-1", "student.refit_rows=0", "evaluation.max_tokens=1",
    ],
)  # fmt: skip
def test_settings_that_no_stage_can_work_with_are_refused_by_name(tmp_path, setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        config(tmp_path, setting)


def test_routes_are_compared_at_some_share(tmp_path):
    assert config(tmp_path, "evaluation.routing_shares=[]")
    with pytest.raises(ConfigError, match="at least one must lie between 0 and 1"):
        config(tmp_path, "evaluation.routing_shares=[0,1]", "gate.default_budget=1")


def test_a_teacher_goes_on_from_one_branch_of_its_own_sizes(finished, tmp_path):
    with pytest.raises(ValueError, match=r"teacher.init .* has other sizes than the config \(model\.d_ff: .* leave model out"):
        run_to_gate(config(tmp_path / "a", f"teacher.init={finished / 'teacher'}", "until=teacher", "model.d_ff=48"))
    run_to_gate(config(tmp_path / "b", f"teacher.init={finished / 'gate'}", "teacher.steps=0", "until=teacher"))
    made, dual = (load_checkpoint(folder)[0] for folder in (tmp_path / "b" / "tiny" / "teacher", finished / "gate"))
    assert made.config.is_dense and all(torch.equal(p, dual.get_parameter(n)) for n, p in made.named_parameters())


def test_a_gate_may_be_trained_otherwise_until_it_is_done(tmp_path):
    c = config(tmp_path)
    pipeline.open_run(c, resume=False)
    (c.folder / "dense").mkdir()
    (c.folder / "dense" / "done").write_text("")
    pipeline.open_run(config(tmp_path, "gate.lr=0.001"), resume=True)
    with pytest.raises(pipeline.RunExists, match=r"gate\.default_budget"):  # what the dense student costs
        pipeline.open_run(config(tmp_path, "gate.default_budget=0.7"), resume=True)


def test_a_gate_that_does_not_learn_stops_the_run_and_never_decides_for_fast(finished, tmp_path):
    c, (model, tok) = config(tmp_path, "gate.lr=1e30"), load_checkpoint(finished / "student")
    with pytest.raises(NonFiniteLoss, match=r"lower gate\.lr"):
        stages.train_gate(c, tok, model, lambda record: None)
    with torch.no_grad():
        out = model(torch.arange(10, 20)[None], "auto", threshold=0.5)
    assert out.g.isnan().all() and out.use_slow.all()


def test_orthogonalize_brings_singular_values_near_one():
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonalize(x))
    assert s.min() > 0.5 and s.max() < 1.4
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT)


def test_large_matrices_are_orthogonalised_in_bf16_only_where_there_are_units_for_it(monkeypatch):
    found = {}
    for units in (True, False):
        monkeypatch.setattr("dualbranch.distill.optim.has_bf16_units", lambda device, units=units: units)
        for side in (256, 64):
            p = torch.nn.Parameter(torch.zeros(side, 256))
            p.grad = torch.randn(side, 256, generator=torch.Generator().manual_seed(0))
            Muon([p], lr=1.0).step()
            found[units, side] = p.detach()
    assert torch.equal(found[True, 64], found[False, 64]) and not torch.equal(found[True, 256], found[False, 256])
    assert found[True, 256].dtype == torch.float32
    assert torch.cosine_similarity(found[True, 256].flatten(), found[False, 256].flatten(), dim=0) > 0.999


def test_learning_rate_warms_up_holds_and_decays():
    c = OptimConfig(warmup=0.1, decay=0.5)
    factors = [lr_factor(i, 100, c) for i in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[40] == 1.0 and 0 < factors[-1] <= 0.021


def test_doubt_threshold_keeps_as_many_answers_as_the_allowed_errors_let_it():
    doubt, right = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.9], [True, True, False, True, False, True, False]
    assert stages.doubt_threshold(doubt, right, 0.0) == pytest.approx(0.25)
    assert stages.doubt_threshold(doubt, right, 1 / 7) == pytest.approx(0.45)
    assert stages.doubt_threshold(doubt, right, 2 / 7) == pytest.approx(0.7)
    assert stages.doubt_threshold(doubt, right, 1.0) == pytest.approx(0.95)
    assert stages.doubt_threshold([0.2], [False], 0.0) == 0.0


def test_only_hopeless_trials_are_left_out():
    p, kept = [0.1, 0.2, 0.6, 0.7, 0.9, 0.95], [True, True, True, False, False, False]
    assert stages.worth_trying(p, kept, lost=0.0) == 0.7  # all that would be kept is tried
    assert stages.worth_trying(p, kept, lost=0.34) == 0.6  # one of three is given up
    assert stages.worth_trying(p, [False] * 6) == 0.1
    assert stages.worth_trying(p, [True] * 6, lost=0.0) == 1.0
