"""What the report promises: every part from the run's files, honest verdicts, nothing broken by missing pieces or wild text."""

from __future__ import annotations

import copy
import json
import re

import pytest

from dualbranch import plots
from dualbranch.distill.config import RunConfig
from dualbranch.report import escape, goals, inline, marked, write_report
from dualbranch.schema import save_yaml

LEVELS, TASKS = ("easy", "medium", "hard"), ("arithmetic", "function_call")


def summary(accuracy: float, flops: float, slow: float = 1.0, n: int = 60) -> dict:
    return {
        "n": n, "accuracy": accuracy, "low": max(0.0, accuracy - 0.05), "high": min(1.0, accuracy + 0.05), "flops": flops, "tokens": 40.0,
        "think_tokens": 30.0, "thought_share": 0.5, "slow_share": slow,
    }  # fmt: skip


def run(accuracy: float, flops: float, slow: float = 1.0, hard: float | None = None, leaked: float | None = None, seconds: float = 0.01) -> dict:
    s = summary(accuracy, flops, slow)
    groups = {"task": TASKS, "level": LEVELS, "lang": ("en", "zh"), "task/level": [f"{t}/{v}" for t in TASKS for v in LEVELS]}
    by = {name: {g: dict(s) for g in members} for name, members in groups.items()}
    if hard is not None:
        by["level"]["hard"]["accuracy"] = hard
    example = {
        "task": "arithmetic", "level": "hard", "lang": "zh", "shift": None, "prompt": "3 < 4 | 二加三?", "expected": "5", "reasoning": "*2*", "answer": "`6`",
        "correct": False,
    }  # fmt: skip
    return {"mode": {}, **s, "seconds_per_problem": seconds, "batch_size": 60, "empty_share": 0.0, "leaked_share": leaked, "by": by, "examples": [example]}


@pytest.fixture
def complete() -> dict:
    """An evaluation as `run_evaluation` lays it out, in which every goal is reached."""
    policies = {"random": 0.4, "random in replies": 0.38, "constant": 0.41, "position": 0.35, "gate": 0.2, "oracle": 0.15, "reply oracle": 0.1}
    timing = {"median": 2.0, "low": 1.5, "high": 2.5}
    memory = {
        "params": 100, "param_bytes": 400, "param_bytes_by_part": {"slow branch": 300, "fast branch": 100}, "params_read": {"slow": 75, "fast": 25},
        "kv_bytes_per_token": 64, "peak_rss_bytes": 2**29, "rss_bytes": 2**28,
    }  # fmt: skip
    quality = dict.fromkeys(("thought", "needed", "accuracy", "accuracy_thinking", "accuracy_direct", "either_right", "thought_if_direct_right"), 0.5)
    pieces = [("<bos>", False), ("Add", True), (" 2", True), ("加", True), ("。", False), ("\n", False)]
    return {
        "about": {"run": "demo", "date": "2026-01-02", "commit": "abc1234", "device": "a CPU", "threads": 2, "torch": "2.13", "dtype": "float32", "seed": 3},
        "runs": {
            "teacher think": run(0.97, 8e8, hard=0.95), "teacher direct": run(0.6, 3e8, hard=0.2), "student think": run(0.965, 8e8),
            "student fast": run(0.5, 1e8, slow=0.0, leaked=0.0), "student auto": run(0.95, 3.4e8, slow=0.3, seconds=0.004),
            "student auto 1": run(0.96, 6e8), "student fast, thinking": run(0.7, 2e8, slow=0.0),
            "dense think": run(0.8, 4e8), "dense direct": run(0.4, 1e8, leaked=0.0),
        },
        "curve": [{"budget": 0.3, "run": "student auto"}, {"budget": 1.0, "run": "student auto 1"}],
        "shifts": {"numbers": {"think": run(0.3, 9e8), "auto": run(0.25, 4e8)}},
        "decision": {"all": {"n": 60, **quality, "thought_if_needed": None}},
        "routing": {
            "n_tokens": 900, "n_scored": 600, "slow": {"nll": 0.1, "kl": 0.0}, "fast": {"nll": 0.9, "kl": 0.6}, "headline": 0.3, "gap_closed": 2 / 3,
            "shares": [{
                "share": 0.3, "gap_closed": {"gate": 2 / 3, "position": 0.1, "constant": -0.1},
                "policies": {name: {"kl": kl, "nll": kl + 0.1, "slow_share": 0.3, "flops_per_token": 2e6} for name, kl in policies.items()},
            }],
        },
        "ablations": {
            "budget": 0.3, "slow_share": 0.31, "nll": 0.2, "kl": 0.1,
            "cases": [
                {"branch": b, "replaced_by": r, "nll": 2.0, "kl": 2.0, "delta_nll": 1.8, "delta_kl": 1.9} for b in ("slow", "fast") for r in ("zero", "mean")
            ],
        },
        "gate_examples": [{
            "task": "arithmetic", "level": "hard", "lang": "zh", "n_prompt": 4, "correct": True,
            "tokens": [{"piece": p, "g": 0.1 + 0.1 * i, "use_slow": s} for i, (p, s) in enumerate(pieces)],
        }],
        "speed": {"batch_size": 1, "n_decode": 32, "repeats": 5, "warmup": 1, "rows": [{
            "case": "student fast", "prompt_tokens": 64, "first_token_ms": timing, "prefill_tokens_per_s": timing, "decode_tokens_per_s": timing,
            "slow_share": 0.0, "flops_per_token": 1e6, "params_read": 1e6,
        }]},
        "memory": {"teacher": memory, "student": memory},
        "skipped": [],
    }  # fmt: skip


def written(folder, evaluation: dict, stages: tuple[str, ...] = ("student", "dense", "gate")) -> str:
    save_yaml(folder / "config.yaml", RunConfig(name="demo"))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.dumps({"stage": s, "step": i, "loss": 3.0 / (i + 1), "tokens_per_s": 1000.0}) for s in stages for i in range(50)]
    lines.append(json.dumps({"stage": "evaluation", "step": 0, "part": "x", "accuracy": 0.5}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "null", '{"stage": "stud']))
    return write_report(folder).read_text()


def test_report_of_a_whole_run_has_every_part_and_every_figure_it_shows(tmp_path, complete):
    text = written(tmp_path, complete)
    for part in ("Accuracy", "Accuracy against computation", "Deciding to think", "Shifted problems", "Does the gate earn its place?", "What the gate sends slow", "Speed and memory", "Training", "Some replies", "Conditions"):  # fmt: skip  # noqa: E501
        assert f"\n## {part}\n" in text
    figures = re.findall(r"\]\((plots/[^)]+\.png)\)", text)
    assert sorted(figures) == sorted(f"plots/{p.name}" for p in (tmp_path / "plots").iterdir())
    assert {"plots/losses.png", "plots/accuracy.png", "plots/pareto.png", "plots/routing.png", "plots/gate-1.png"} == set(figures)
    assert all((tmp_path / f).read_bytes().startswith(b"\x89PNG") for f in figures)
    for fact in ("abc1234", "2026-01-02", "a CPU", "2 threads", "torch 2.13", "The teacher was loaded"):
        assert fact in text
    assert "not in this run" not in text


def test_every_table_has_as_many_cells_in_each_row_as_in_its_head(tmp_path, complete):
    text = written(tmp_path, complete)
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()]
        assert len(set(widths)) == 1, block


def test_all_goals_reached_is_said_so(complete):
    assert [g.name for g in goals(complete) if g.reached is not True] == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda e: e["runs"]["teacher think"].update(accuracy=0.949), "Teacher with reasoning"),
        (lambda e: e["runs"]["teacher direct"]["by"]["level"]["hard"].update(accuracy=0.81), "Teacher on hard"),
        (lambda e: e["runs"]["student think"].update(accuracy=0.955), "Student `think`"),
        (lambda e: e["runs"]["student auto"].update(accuracy=0.94), "`auto` against `think`, accuracy"),
        (lambda e: e["runs"]["student auto"].update(flops=3.61e8), "`auto` against `think`, FLOPs"),
        (lambda e: e["runs"]["student auto"].update(seconds_per_problem=0.005), "`auto` against `think`, seconds"),
        (lambda e: e["routing"].update(gap_closed=0.49), "Gate: share"),
        (lambda e: e["routing"]["shares"][0]["policies"]["gate"].update(kl=0.36), "Gate beats"),
        (lambda e: e["ablations"]["cases"][3].update(delta_nll=-0.01), "Each branch"),
        (lambda e: e["runs"]["student fast"].update(leaked_share=1 / 60), "No reasoning"),
    ],
)
def test_a_missed_goal_is_reported_as_missed_and_only_that_one(tmp_path, complete, change, name):
    change(complete)
    missed = [g.name for g in goals(complete) if g.reached is False]
    assert len(missed) == 1 and missed[0].startswith(name), missed


def test_headline_names_what_was_missed(tmp_path, complete):
    complete["runs"]["teacher think"] = run(0.9, 8e8, hard=0.9)
    complete["runs"]["student think"] = run(0.9, 8e8)
    complete["runs"]["student auto"] = run(0.9, 3e8, slow=0.3, seconds=0.004)
    text = written(tmp_path, complete)
    assert f"{len(goals(complete)) - 1} of {len(goals(complete))} goals were reached" in text
    assert "**Not reached:** teacher with reasoning (90.0 %; goal >= 95 % correct)" in text


@pytest.mark.parametrize("key", ["curve", "shifts", "decision", "routing", "ablations", "gate_examples", "speed", "memory", "about"])
def test_a_missing_part_is_skipped_and_the_rest_stands(tmp_path, complete, key):
    partial = copy.deepcopy(complete)
    del partial[key]
    text = written(tmp_path, partial, stages=())
    assert "## Accuracy\n" in text and "| student think |" in text
    if key in ("curve", "shifts", "routing", "gate_examples", "speed"):
        assert "not in this run" in text


def test_an_evaluation_with_nothing_in_it_still_gives_a_report(tmp_path):
    text = written(tmp_path, {"skipped": ["everything: no time"]}, stages=("teacher",))
    assert "*everything: not in this run (no time).*" in text and "0 of" in text and "losses.png" in text


def test_a_run_without_evaluation_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="--resume"):
        write_report(tmp_path)


def test_model_text_cannot_break_the_markdown():
    assert inline("a | b\n<b>*c*</b> `d` [e]") == r"a \| b &lt;b&gt;\*c\*&lt;/b&gt; \`d\` \[e\]"
    assert escape(" kept ") == " kept "


def test_slow_tokens_are_bold_and_spaces_survive():
    tokens = [("Add", False), (" 2", True), (" and", True), (" 3", False)]
    assert marked([{"piece": p, "use_slow": s} for p, s in tokens]) == "Add<b> 2 and</b> 3"


def test_chinese_without_a_font_is_drawn_as_token_indices_and_given_as_text(tmp_path, complete, monkeypatch, recwarn):
    monkeypatch.setattr(plots, "cjk_font", lambda: None)
    text = written(tmp_path, complete)
    assert "<b>Add 2加</b>。" in text
    assert not [w for w in recwarn if "Glyph" in str(w.message)], "an empty box was drawn"


def test_a_text_may_have_any_name(tmp_path):
    routes = [{"route": "slow", "budget": None, "flops": 2e6, "perplexity": 3.0}, {"route": "fast", "budget": None, "flops": 1e6, "perplexity": 4.0}]
    assert plots.text_curves(tmp_path / "text.png", {"a$_$b.txt": {"routes": routes}}) == "text.png"


def test_smoothing_is_the_mean_of_the_last_values():
    assert plots.smooth([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1.0, 2.0, 4.0, 6.0])
