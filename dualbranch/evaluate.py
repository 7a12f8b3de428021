"""What a model can do and what it spends: problems answered in a mode, and the whole evaluation of a run.

`evaluate` is one model in one mode; `run_evaluation` is everything `report.py` shows, as one JSON-serialisable dict
(`evaluation.json`). Deterministic but for seconds and the date. The gate's own study is in `routing_study.py`, speed in `measure.py`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from dualbranch.chat import render_prompt
from dualbranch.data.corpora import load_corpus
from dualbranch.data.problem import LANGS, LEVELS, SHIFTS, Problem, sample_problem, verify
from dualbranch.data.tasks import TASKS
from dualbranch.data.text import load_documents
from dualbranch.distill import stages
from dualbranch.distill.config import RunConfig
from dualbranch.generate import Generation, generate_batch
from dualbranch.measure import about, measure_memory, measure_speed, speed_cases
from dualbranch.model import DualBranchModel
from dualbranch.modes import Mode, resolve
from dualbranch.recall import distances_within, recall
from dualbranch.routing_study import ablations, gate_examples, routing_study
from dualbranch.sampling import SamplingParams
from dualbranch.text_eval import evaluate_texts, read_text
from dualbranch.tokenizer import Tokenizer

Log = Callable[[dict], None]

MARKERS = ("<think>", "</think>")
#: Draws of one problem before it may repeat (a small level has few test problems).
_N_DRAWS = 200


def draw_problems(config: RunConfig, tasks: Sequence[str] = (), split: str = "test", shift: str | None = None) -> list[Problem]:
    """Problems of `split`, the same for the same seed: `n_problems` of each of `tasks` (empty = the config's, else all), spread evenly
    over levels and languages. With `shift`, `n_shifted` of each task that knows it. No prompt twice as long as the split has others.
    """
    n = config.evaluation.n_problems if shift is None else config.evaluation.n_shifted
    cells = [(level, lang) for level in LEVELS for lang in config.data.langs or LANGS]
    problems = []
    for task in dict.fromkeys(tasks or config.data.tasks or TASKS):  # named twice, a task is trained on twice as often
        if shift is not None and shift not in TASKS[task].shifts:
            continue
        rng, seen = random.Random(f"evaluate:{config.seed}:{split}:{task}:{shift}"), set()
        for i in range(n):
            level, lang = cells[i % len(cells)]
            for _ in range(_N_DRAWS):
                problem = sample_problem(rng, task, level, lang, split, shift)
                if problem.prompt not in seen:
                    break
            seen.add(problem.prompt)
            problems.append(problem)
    return problems


def wilson(n_correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): unlike the normal one it stays in [0, 1] and is not empty at 0 or n."""
    if n == 0:
        return 0.0, 1.0
    p, scale = n_correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not leave p outside


@dataclass(frozen=True)
class Answer:
    """One problem, what the model replied, and whether that was right."""

    problem: Problem
    generation: Generation
    correct: bool


@dataclass(frozen=True)
class Summary:
    """Means over some answered problems. `low`, `high`: 95 % interval of `accuracy`. `flops`: of the prompt and everything generated,
    each token by the route it took, dropped and repeated tokens included. `tokens`, `think_tokens`: generated, and those of them inside the
    reasoning; `dropped`: of an answer that was tried and dropped; `second_looks`: computed fast, then slow. `slow_share`: of all tokens
    of the text; the other shares are of problems.
    """

    n: int
    accuracy: float
    low: float
    high: float
    flops: float
    tokens: float
    think_tokens: float
    thought_share: float
    slow_share: float
    dropped: float
    second_looks: float

    @staticmethod
    def of(answers: Sequence[Answer]) -> Summary:
        n, right = len(answers), sum(a.correct for a in answers)
        replies = [a.generation for a in answers]
        n_slow, n_computed = sum(sum(r.use_slow) for r in replies), sum(len(r.use_slow) for r in replies)

        def mean(values: Iterable[float]) -> float:
            return math.fsum(values) / max(1, n)

        return Summary(
            n, right / max(1, n), *wilson(right, n), mean(r.flops for r in replies), mean(len(r.ids) for r in replies),
            mean(r.n_think for r in replies), mean(r.thought for r in replies), n_slow / max(1, n_computed),
            mean(r.n_dropped for r in replies), mean(r.n_second_looks for r in replies),
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One model in one mode over some problems.

    `groups[by][name]`: the same summary by "task", "level", "lang" and "task/level". `seconds_per_problem`: wall-clock of the whole
    batched generation, `batch_size` replies at once, divided by the problems. `leaked_share`: replies with reasoning or its markers although thinking
    was off (None where it was not off). `answers` are not part of the JSON; `examples` are a few of them.
    """

    mode: Mode
    overall: Summary
    groups: dict[str, dict[str, Summary]]
    seconds_per_problem: float
    batch_size: int
    empty_share: float
    leaked_share: float | None
    examples: list[dict]
    answers: list[Answer] = field(repr=False)

    def to_dict(self) -> dict:
        """JSON-serialisable: the overall summary at the top, the rest by name."""
        return {
            "mode": asdict(self.mode),
            **asdict(self.overall),
            "seconds_per_problem": self.seconds_per_problem,
            "batch_size": self.batch_size,
            "empty_share": self.empty_share,
            "leaked_share": self.leaked_share,
            "by": {by: {name: asdict(s) for name, s in group.items()} for by, group in self.groups.items()},
            "examples": self.examples,
        }


GROUPS: dict[str, Callable[[Problem], str]] = {
    "task": lambda p: p.task,
    "level": lambda p: p.level,
    "lang": lambda p: p.lang,
    "task/level": lambda p: f"{p.task}/{p.level}",
}


def evaluate(model: DualBranchModel, tok: Tokenizer, problems: Sequence[Problem], mode: Mode | str, params: SamplingParams, batch_size: int = 128) -> Result:
    """Answers `problems` in `mode` and checks them. Raises ValueError without problems, and what `generate_batch` raises."""
    if not problems:
        raise ValueError("there are no problems to evaluate; raise evaluation.n_problems or n_shifted")
    mode = resolve(mode)
    prompts = [render_prompt(tok, [{"role": "user", "content": p.prompt}]) for p in problems]
    started = time.perf_counter()
    replies = generate_batch(model, tok, prompts, mode, params, batch_size)
    seconds = (time.perf_counter() - started) / len(problems)
    answers = [Answer(p, r, verify(p, r.answer)) for p, r in zip(problems, replies, strict=True)]
    groups = {}
    for by, name_of in GROUPS.items():
        names = dict.fromkeys(name_of(p) for p in problems)
        groups[by] = {name: Summary.of([a for a in answers if name_of(a.problem) == name]) for name in names}
    leaked = sum(leaks_reasoning(tok, r) for r in replies) / len(replies) if mode.thinking == "off" else None
    empty = sum(not r.answer.strip() for r in replies) / len(replies)
    return Result(mode, Summary.of(answers), groups, seconds, min(batch_size, len(problems)), empty, leaked, pick_examples(answers), answers)


def leaks_reasoning(tok: Tokenizer, reply: Generation) -> bool:
    """Whether a reply made with thinking off holds reasoning: a control token of it after the decision, or a marker spelled out."""
    think, close = (tok.control.get(m) for m in MARKERS)  # a model that does not think has neither
    return reply.thought or reply.n_think > 0 or think in reply.ids or close in reply.ids[1:] or any(m in reply.answer for m in MARKERS)


def pick_examples(answers: Sequence[Answer], n: int = 4) -> list[dict]:
    """A few replies to look at: half right and half wrong where there are both, the hardest first, each of another task if possible."""
    by_level = sorted(answers, key=lambda a: -LEVELS.index(a.problem.level))
    chosen: list[Answer] = []
    for wanted, room in ((False, n // 2), (True, n)):
        tasks = {a.problem.task for a in chosen}
        for fresh_only in (True, False):
            for a in by_level:
                if len(chosen) >= room:
                    break
                if a.correct == wanted and not any(a is c for c in chosen) and not (fresh_only and a.problem.task in tasks):
                    chosen.append(a)
                    tasks.add(a.problem.task)
    return [
        {
            "task": a.problem.task, "level": a.problem.level, "lang": a.problem.lang, "shift": a.problem.shift, "prompt": a.problem.prompt,
            "expected": a.problem.answer, "reasoning": a.generation.reasoning, "answer": a.generation.answer, "correct": a.correct,
        }
        for a in chosen
    ]  # fmt: skip


def decision_quality(auto: Result, thinking: Result, direct: Result) -> dict[str, dict]:
    """How well `auto` chose when to reason, by level and over "all": against the same route with thinking on and off, same problems.

    `needed`: share of problems that only reasoning gets right; `thought_if_needed` should be 1. `thought_if_direct_right` is waste.
    `either_right` is what perfect decisions would score. A share of nothing is None.
    """

    def share(flags: Iterable[bool]) -> float | None:
        flags = list(flags)
        return sum(flags) / len(flags) if flags else None

    out = {}
    for level in (*LEVELS, "all"):
        rows = [
            (a.generation.thought, a.correct, t.correct, d.correct)
            for a, t, d in zip(auto.answers, thinking.answers, direct.answers, strict=True)
            if level in ("all", a.problem.level)
        ]
        if rows:
            out[level] = {
                "n": len(rows),
                "thought": share(a for a, _, _, _ in rows),
                "needed": share(t and not d for _, _, t, d in rows),
                "thought_if_needed": share(a for a, _, t, d in rows if t and not d),
                "thought_if_direct_right": share(a for a, _, _, d in rows if d),
                "accuracy": share(c for _, c, _, _ in rows),
                "accuracy_thinking": share(t for _, _, t, _ in rows),
                "accuracy_direct": share(d for _, _, _, d in rows),
                "either_right": share(t or d for _, _, t, d in rows),
            }
    return out


@torch.inference_mode()
def run_evaluation(
    config: RunConfig, tok: Tokenizer, student: DualBranchModel, teacher: DualBranchModel, dense: DualBranchModel | None = None, log: Log | None = None
) -> dict:
    """Everything the report shows, JSON-serialisable (docs/architecture.md). One progress line per part on stderr, one record to `log`.

    Parts that the models can't give (no dense baseline, a student without gate) are left out and named in `skipped`.
    """
    started = time.perf_counter()
    e, console = config.evaluation, Console(stderr=True)
    params, problems = SamplingParams(max_tokens=e.max_tokens), draw_problems(config) if config.data.has_problems else []
    results: dict[str, Result] = {}
    skipped: list[str] = []
    routed = student.gate is not None and student.calibration is not None

    def note(part: str, text: str, **record: float) -> None:
        elapsed = time.perf_counter() - started
        console.print(f"evaluation {elapsed:4.0f} s  {part}: {text}", highlight=False, soft_wrap=True)
        if log is not None:
            log({"stage": "evaluation", "step": note.step, "part": part, "seconds": elapsed, **record})
        note.step += 1

    note.step = 0

    def answer(name: str, model: DualBranchModel, mode: Mode, problems: Sequence[Problem] = problems) -> Result:
        r = evaluate(model, tok, problems, mode, params, e.batch_size)
        text = f"{r.overall.accuracy:.1%} right, {r.overall.flops / 1e6:.0f} MFLOP and {1e3 * r.seconds_per_problem:.0f} ms per problem"
        note(name, text, accuracy=r.overall.accuracy, flops=r.overall.flops)
        return r

    curve: list[dict] = []
    shifted: dict[str, dict] = {}
    out: dict = {}
    default = student.calibration.default_budget if routed else config.gate.default_budget
    if not routed:
        skipped.append("fast, auto, routing study and ablations: the student has no calibrated gate")
    if dense is None:
        skipped.append("dense baseline: the run made none (evaluation.dense_baseline)")
    if config.data.has_problems:
        think, direct = resolve("think"), resolve("think", thinking="off")
        results["teacher think"] = answer("teacher think", teacher, think)
        results["teacher direct"] = answer("teacher direct", teacher, direct)
        results["student think"] = answer("student think", student, think)
        if dense is not None:
            results["dense think"] = answer("dense think", dense, think)
            results["dense direct"] = answer("dense direct", dense, direct)
        if routed:
            results["student fast"] = answer("student fast", student, resolve("fast"))
            results["student fast, thinking"] = answer("student fast, thinking", student, resolve("fast", thinking="on"))
            for budget in sorted({*e.budgets, default}):
                name = "student auto" if budget == default else f"student auto {budget:g}"
                results[name] = answer(name, student, resolve("auto", budget=budget))
                curve.append({"budget": budget, "run": name})
            results["student auto, thinking"] = answer("student auto, thinking", student, resolve("auto", thinking="on"))
            results["student auto, direct"] = answer("student auto, direct", student, resolve("auto", thinking="off"))
            out["decision"] = decision_quality(*(results[f"student auto{x}"] for x in ("", ", thinking", ", direct")))
        for shift in SHIFTS if e.n_shifted else ():
            if not (part := draw_problems(config, shift=shift)):
                continue
            shifted[shift] = {"think": answer(f"shift {shift}, think", student, think, part).to_dict()}
            if routed:
                shifted[shift]["auto"] = answer(f"shift {shift}, auto", student, resolve("auto"), part).to_dict()

    held_out = stages.source(config, tok, "valid", purpose=5).batch(0, n_rows=e.routing_rows)
    if routed:
        reference = stages.source(config, tok, "valid", purpose=6).batch(0, n_rows=e.routing_rows)
        shares = sorted({*e.routing_shares, default} - {0.0, 1.0})
        study = out["routing"] = routing_study(student, held_out, reference, shares, headline=default, seed=config.seed)
        gap = study["gap_closed"]
        note("routing study", "gap closed " + ("unknown" if gap is None else f"{gap:.0%} at {study['headline']:.0%} slow"))
        cases = out["ablations"] = ablations(student, held_out)
        note("ablations", ", ".join(f"{c['branch']} -> {c['replaced_by']} {c['delta_nll']:+.3f}" for c in cases["cases"]) + " nats per token")
        if config.data.has_problems:
            out["gate_examples"] = gate_examples(student, tok, sentences(problems, results["student auto"]))
    if texts := held_out_texts(config):

        def note_text(name: str, records: list[dict]) -> None:
            budgets = (f"{r['route'] if r['budget'] is None else format(r['budget'], 'g')} {r['perplexity']:.2f}" for r in records)
            note(f"text, {name}", "perplexity " + ", ".join(budgets), perplexity=records[0]["perplexity"])

        budgets = sorted({*e.budgets, default} - {0.0, 1.0})
        out["text"] = evaluate_texts(student, tok, texts, budgets, min(e.text_window, student.config.max_seq_len), e.text_tokens, note_text)
        if e.n_recall:
            parts = [text for part in texts.values() for text in part]
            out["recall"] = recall(student, tok, parts, budgets, distances_within(student.config.max_seq_len), e.n_recall, config.seed)
            note("recall", f"{e.n_recall} questions per distance")
    text = held_out.tokens[held_out.real]
    out["speed"] = measure_speed(speed_cases(teacher, student, dense), text, repeats=3)
    note("speed", f"{len(out['speed']['rows'])} cases")
    models = {"teacher": teacher, "student": student} | ({} if dense is None else {"dense": dense})
    out["memory"] = {name: measure_memory(model) for name, model in models.items()}
    return {
        "about": about(student) | {"run": config.name, "seed": config.seed, "n_problems": len(problems), "evaluation_seconds": time.perf_counter() - started},
        "problems": config.data.has_problems,
        "runs": {name: r.to_dict() for name, r in results.items()},
        "curve": curve,
        "shifts": shifted,
        **out,
        "skipped": skipped,
    }


def held_out_texts(config: RunConfig) -> dict[str, list[str]]:
    """Text that no weight was trained on, by name: the test split of each corpus, what is held out of the user's text (the gate is calibrated on it) and of
    the teacher's own, and the files named for evaluation."""
    d, e = config.data, config.evaluation
    texts = {name: load_corpus(name, "test") for name in d.corpora}
    written = [path for path in d.text if Path(path) == config.self_text_folder]
    for name, paths in (("held-out text", [path for path in d.text if path not in written]), ("text the teacher wrote", written)):
        if paths and (held_out := load_documents(paths, "valid")):
            texts[name] = held_out
    names = [Path(path).name for path in (*e.text, *e.wikitext)]
    for path, undo in (*((path, False) for path in e.text), *((path, True) for path in e.wikitext)):
        name = Path(path).name if names.count(Path(path).name) == 1 else str(path)
        texts[name + " (spacing undone)" * undo] = [read_text(path, undo)]
    return texts


def sentences(problems: Sequence[Problem], auto: Result) -> list[Answer]:
    """What the gate heat map shows: in each language one answer with reasoning and one without, short ones, of different tasks."""
    chosen: list[Answer] = []
    for lang in LANGS:
        for thought in (True, False):
            tasks = {a.problem.task for a in chosen}
            candidates = [a for a in auto.answers if a.problem.lang == lang and a.generation.thought == thought]
            candidates = [a for a in candidates if a.problem.task not in tasks] or candidates
            if candidates:
                chosen.append(min(candidates, key=lambda a: (not a.correct, abs(len(a.generation.use_slow) - 90))))
    return chosen
