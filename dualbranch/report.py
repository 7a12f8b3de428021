"""`report.md` of a run, with its figures: every number read from the run's own files, goals beside what was measured.

`write_report(folder)` reads `config.yaml`, `metrics.jsonl` and `evaluation.json` (made by `evaluate.run_evaluation`). A part whose
data is missing becomes one line saying so.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualbranch import plots
from dualbranch.distill.config import RunConfig
from dualbranch.recall import recall_rows
from dualbranch.schema import load_yaml
from dualbranch.storage import write_text

Runs = Mapping[str, Mapping[str, Any]]

LEVELS = ("easy", "medium", "hard")
#: Runs of the headline table and the bars, best known first.
MAIN_RUNS = ("teacher think", "teacher direct", "student think", "student auto", "student fast", "dense think", "dense direct")
BAR_RUNS = ("teacher think", "student think", "student auto", "student fast", "dense think")
TRAINED_STAGES = ("teacher", "student", "dense", "gate")


def write_report(run_folder: str | os.PathLike) -> Path:
    """Writes `report.md` and `plots/*.png` into `run_folder` and returns the report's path. Raises ValueError without `evaluation.json`."""
    folder = Path(run_folder)
    evaluation_file = folder / "evaluation.json"
    if not evaluation_file.exists():
        raise ValueError(f"{folder} holds no evaluation.json; finish the run first (python train.py CONFIG --resume)")
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8"))
    config = load_yaml(folder / "config.yaml", RunConfig) if (folder / "config.yaml").exists() else None
    stages = read_metrics(folder / "metrics.jsonl")
    parts = [
        headline(evaluation),
        *((accuracy(evaluation, folder), compute(evaluation, folder), thinking(evaluation), shifts(evaluation)) if has_problems(evaluation) else ()),
        text(evaluation, folder),
        routing(evaluation, folder),
        heat_maps(evaluation, folder) if has_problems(evaluation) else "",
        speed(evaluation),
        training(stages, folder, config),
        examples(evaluation),
        conditions(evaluation, config),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(part.strip() for part in parts if part) + "\n")
    return path


# ---- small helpers


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def with_interval(s: Mapping[str, Any]) -> str:
    """Accuracy with its 95 % interval, in per cent."""
    return f"{100 * s['accuracy']:.1f} ({100 * s['low']:.0f}-{100 * s['high']:.0f})"


def mflop(flops: float) -> str:
    """Three significant digits or more."""
    value = flops / 1e6
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def bytes_text(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.2f} GiB"


def inline(text: str, limit: int = 300) -> str:
    """Text of a model inside a table cell or a line: one line, nothing that Markdown would act on."""
    text = " ".join(text.split())
    return escape(text if len(text) <= limit else text[:limit] + " …")


def escape(text: str) -> str:
    """`text` with nothing in it that Markdown or HTML would act on."""
    for char in "\\|`*_[]$~#":
        text = text.replace(char, "\\" + char)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def has_problems(e: Mapping[str, Any]) -> bool:
    """Whether problems were part of the run; a run on text alone has no section about them."""
    return e.get("problems", True)


def missing(what: str, why: str) -> str:
    return f"*{what}: not in this run ({why}).*"


def read_records(path: Path) -> Iterator[dict]:
    """What a run logged; a line cut short is skipped."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def read_metrics(path: Path) -> dict[str, list[dict]]:
    """Records with a loss, by stage."""
    stages: dict[str, list[dict]] = {}
    for record in read_records(path):
        if record.get("stage") in TRAINED_STAGES and isinstance(record.get("loss"), (int, float)):
            stages.setdefault(record["stage"], []).append(record)
    return {name: stages[name] for name in TRAINED_STAGES if name in stages}


# ---- goals


@dataclass(frozen=True)
class Goal:
    """`measured` in words; `reached` None where the run has no such measurement."""

    name: str
    target: str
    measured: str
    reached: bool | None


def goals(e: Mapping[str, Any]) -> list[Goal]:
    """What the project set out to reach, against this run. A difference is judged by its point estimate; intervals are in the tables."""
    runs: Runs = e.get("runs", {})
    found: list[Goal] = []

    def goal(name: str, target: str, needs: Sequence[Any], judge: Callable[[], tuple[str, bool]]) -> None:
        measured, reached = judge() if all(n is not None for n in needs) else ("not measured", None)
        found.append(Goal(name, target, measured, reached))

    for name, measured in e.get("text", {}).items():
        found += text_goals(name, measured["routes"])
    if not has_problems(e):
        return found + gate_goals(e)
    teacher, direct, think, auto = (runs.get(n) for n in ("teacher think", "teacher direct", "student think", "student auto"))
    goal("Teacher with reasoning", ">= 95 % correct", [teacher], lambda: (percent(teacher["accuracy"]), teacher["accuracy"] >= 0.95))

    def reasoning_pays() -> tuple[str, bool]:
        a, b = (r["by"]["level"].get("hard", r)["accuracy"] for r in (teacher, direct))
        return f"{100 * (a - b):+.1f} points", a - b >= 0.15

    goal("Teacher on hard problems, with against without reasoning", ">= +15 points", [teacher, direct], reasoning_pays)

    def points(a: Mapping, b: Mapping, allowed: float) -> tuple[str, bool]:
        return f"{100 * (a['accuracy'] - b['accuracy']):+.1f} points", a["accuracy"] - b["accuracy"] >= -allowed - 1e-9

    goal("Student `think` against the teacher", "at most 1 point below", [teacher, think], lambda: points(think, teacher, 0.01))
    goal("`auto` against `think`, accuracy", "at most 2 points below", [auto, think], lambda: points(auto, think, 0.02))

    def ratio(key: str) -> Callable[[], tuple[str, bool]]:
        return lambda: (percent(auto[key] / think[key]), auto[key] / think[key] <= 0.45)

    goal("`auto` against `think`, FLOPs per answered problem", "<= 45 %", [auto, think], ratio("flops"))
    goal("`auto` against `think`, seconds per problem", "<= 45 %", [auto, think], ratio("seconds_per_problem"))
    study = e.get("routing")
    closed = study and study["gap_closed"]

    def gap() -> tuple[str, bool]:
        return f"{percent(closed, 0)} at {percent(study['headline'], 0)} slow tokens", closed >= 0.5

    goal("Gate: share of the random-to-oracle gap closed", ">= 50 %", [closed], gap)

    def beats_baselines() -> tuple[str, bool]:
        losses = [
            f"{name} at {percent(s['share'], 0)}"
            for s in study["shares"]
            for name in ("random", "random in replies", "constant", "position")
            if s["policies"]["gate"]["kl"] >= s["policies"][name]["kl"]
        ]
        return ("better at every share" if not losses else f"not better than {', '.join(losses)}"), not losses

    goal("Gate beats random, constant and position-only routing at equal cost", "at every share", [study], beats_baselines)
    cut = e.get("ablations")

    def both_needed() -> tuple[str, bool]:
        worst = {b: min(c["delta_nll"] for c in cut["cases"] if c["branch"] == b) for b in ("slow", "fast")}
        return ", ".join(f"without {b}: {d:+.3f} nats per token" for b, d in worst.items()), min(worst.values()) > 0

    goal("Each branch is needed (replaced by zero or its mean)", "loss rises", [cut], both_needed)
    leaks = [(r["leaked_share"], r["n"]) for r in runs.values() if r["leaked_share"] is not None]
    goal(
        "No reasoning in replies with thinking off", "0 replies", [leaks or None],
        lambda: (f"{sum(round(s * n) for s, n in leaks)} of {sum(n for _, n in leaks)}", not any(s for s, _ in leaks)),
    )  # fmt: skip
    return found


def headline(e: Mapping[str, Any]) -> str:
    found = goals(e)
    words = {True: [], False: [], None: []}
    for g in found:
        name = g.name[0].lower() + g.name[1:]
        words[g.reached].append(name if g.reached is None else f"{name} ({g.measured}{'' if g.reached else f'; goal {g.target}'})")
    text = [f"# Report of run `{e.get('about', {}).get('run', 'run')}`"]
    text.append(
        f"{len(words[True])} of {len(found)} goals were reached."
        + (f" **Reached:** {'; '.join(words[True])}." if words[True] else "")
        + (f" **Not reached:** {'; '.join(words[False])}." if words[False] else "")
        + (f" **Not measured:** {'; '.join(words[None])}." if words[None] else "")
    )
    verdict = {True: "yes", False: "**no**", None: "-"}
    text.append(table(("goal", "target", "measured", "reached"), ((g.name, g.target, g.measured, verdict[g.reached]) for g in found)))
    text += [missing(*s.split(": ", 1)) if ": " in s else f"*{s}*" for s in e.get("skipped", [])]
    return "\n\n".join(text)


def text_goals(name: str, routes: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """What conversion allows: perplexity over that of the slow route, for fast and for two budgets."""
    found = []
    for route, budget, allowed in (("fast", None, 1.45), ("auto", 0.5, 1.12), ("auto", 0.3, 1.25)):
        for r in routes:
            if (r["route"], r["budget"]) == (route, budget):
                what = "Fast route" if budget is None else f"`auto` at {percent(budget, 0)} slow tokens"
                measured, as_few = f"{r['of_slow']:.3f} x", r["slow_share"] <= (budget or 0.0) + 0.02
                if budget is not None:
                    measured += f" at {percent(r['slow_share'], 0)} slow"
                found.append(Goal(f"{what}, perplexity on {name}", f"<= {allowed:g} x slow", measured, r["of_slow"] <= allowed and as_few))
    return found


def gate_goals(e: Mapping[str, Any]) -> list[Goal]:
    """The gate of a converted model, at every share that was studied, and that both branches are used."""
    found = []
    for s in (e.get("routing") or {}).get("shares", ()):
        closed = s["gap_closed"]["gate"]
        if closed is not None:
            found.append(Goal(f"Gate: share of the random-to-oracle gap closed at {percent(s['share'], 0)} slow", ">= 70 %", percent(closed, 0), closed >= 0.7))
    if cut := e.get("ablations"):
        least = min(c["delta_nll"] for c in cut["cases"])
        found.append(Goal("Each branch is needed (replaced by zero or its mean)", ">= 0.1 nat", f"{least:+.3f} nats per token", least >= 0.1))
    return found


# ---- parts


def text(e: Mapping[str, Any], folder: Path) -> str:
    found = e.get("text")
    if not found:
        return ""
    parts = ["## Text"]
    for name, measured in found.items():
        slow = measured["routes"][0]
        rows = []
        for r in measured["routes"]:
            label = r["route"] if r["budget"] is None else f"auto, budget {r['budget']:g}"
            quality = f"{r['perplexity']:.3f}", f"{r['of_slow']:.3f}", f"{r['bits_per_byte']:.4f}", percent(r["slow_share"])
            rows.append((label, *quality, percent(r["second_looks"]), mflop(r["flops"]), percent(r["flops"] / slow["flops"], 0)))
        about = f"**{escape(name)}**: {measured['n_tokens']:,} tokens, {measured['n_bytes']:,} bytes, windows of {measured['window']:,} tokens."
        head = ("route", "perplexity", "of slow", "bits per byte", "slow tokens", "second looks", "MFLOP per token", "of slow")
        parts += [about, table(head, rows)]
    figure = plots.text_curves(folder / "plots" / "text.png", found)
    parts.insert(1, (
        "Text that no weight was trained on (on `held-out text`, the user's own, the gate's budgets were calibrated), teacher-forced, hard routing, each window"
        " on its own. MFLOP per token are means over all positions, logits included."
        " *Second looks*: tokens that the gate let go fast and that went slow because the fast branch was unsure; they pay for both."
    ))  # fmt: skip
    parts.append(f"![Perplexity against computation](plots/{figure})")
    if records := e.get("recall"):
        about = f"**Recall**: a password, asked for so many tokens after it was given, {records[0]['n']} times; right (nats per password)."
        parts += [about, table(*recall_rows(records))]
    return "\n\n".join(parts)


def accuracy(e: Mapping[str, Any], folder: Path) -> str:
    runs: Runs = {n: e["runs"][n] for n in MAIN_RUNS if n in e.get("runs", {})}
    if not runs:
        return "## Accuracy\n\n" + missing("Accuracy", "nothing was evaluated")
    think = runs.get("student think")
    first = next(iter(runs.values()))
    rows = []
    for name, r in runs.items():
        by_level = [r["by"]["level"].get(level) for level in LEVELS]
        levels = ["-" if s is None else percent(s["accuracy"]) for s in by_level]
        rows.append((name, with_interval(r), *levels, *spent(r, think), f"{r['tokens']:.1f}", f"{r['think_tokens']:.1f}", percent(r["slow_share"], 0)))
    head = ("model and mode", "correct, %", *LEVELS, *SPENT, "tokens", "reasoning", "slow tokens")
    bars = {n: runs[n] for n in BAR_RUNS if n in runs}
    figure = plots.accuracy_bars(folder / "plots" / "accuracy.png", bars)
    by_task = table(("task", *bars), ((task, *(percent(r["by"]["task"][task]["accuracy"]) for r in bars.values())) for task in first["by"]["task"]))
    by_lang = table(("language", *bars), ((lang, *(percent(r["by"]["lang"][lang]["accuracy"]) for r in bars.values())) for lang in first["by"]["lang"]))
    grids = [task_by_level(name, runs[name]) for name in ("student fast", "student auto") if name in runs]
    intro = (
        f"{first['n']} test problems, none of which was trained on, greedy. In brackets the 95 % interval (Wilson). MFLOP, milliseconds"
        f" (wall-clock, {first['batch_size']} at once), generated tokens and those of them in the reasoning are means per answered problem,"
        " prompt included; *thought* is the share of replies with reasoning."
    )
    return "\n\n".join(["## Accuracy", intro, table(head, rows), f"![Accuracy per task and mode](plots/{figure})", by_task, by_lang, *grids])


def task_by_level(name: str, run: Mapping[str, Any]) -> str:
    cells = run["by"]["task/level"]
    rows = []
    for task in run["by"]["task"]:
        found = [cells.get(f"{task}/{level}") for level in LEVELS]
        rows.append((task, *("-" if s is None else percent(s["accuracy"], 0) for s in found)))
    return f"*{name}* by task and level:\n\n{table(('task', *LEVELS), rows)}"


#: Columns of `spent`.
SPENT = ("MFLOP", "of think", "ms", "thought")


def spent(run: Mapping[str, Any], think: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What a run spends per problem: MFLOP, as a share of the student's `think`, milliseconds, share with reasoning."""
    of_think = percent(run["flops"] / think["flops"], 0) if think else "-"
    return mflop(run["flops"]), of_think, f"{1e3 * run['seconds_per_problem']:.1f}", percent(run["thought_share"], 0)


def compute(e: Mapping[str, Any], folder: Path) -> str:
    runs: Runs = e.get("runs", {})
    curve = [(c["budget"], runs[c["run"]]) for c in e.get("curve", []) if c["run"] in runs]
    title = "## Accuracy against computation"
    if not curve:
        return f"{title}\n\n" + missing("Budget curve", "the student has no calibrated gate")
    labels = {
        "teacher think": "teacher, thinking", "teacher direct": "teacher, direct", "student think": "student, think", "student fast": "student, fast",
        "student fast, thinking": "student, fast + thinking", "dense think": "dense student, thinking", "dense direct": "dense student, direct",
    }  # fmt: skip
    points = {label: runs[name] for name, label in labels.items() if name in runs}
    figure = plots.pareto(folder / "plots" / "pareto.png", [(f"{b:g}", r) for b, r in curve], points)
    think = runs.get("student think")

    def row(name: str, r: Mapping[str, Any]) -> tuple[str, ...]:
        return name, percent(r["slow_share"]), with_interval(r), *spent(r, think)

    head = ("slow tokens", "correct, %", *SPENT)
    rows = [row(f"{b:g}", r) for b, r in curve]
    extra = [row(n, runs[n]) for n in ("student fast, thinking", "student auto, thinking", "student auto, direct") if n in runs]
    other = table(("route and thinking set apart", *head), extra)
    intro = (
        "`auto` at several budgets (allowed share of slow tokens: those the gate sends slow, and those computed again because the fast branch was unsure)."
        " The budget is calibrated on held-out text of the training kind, so the share of slow tokens measured here may differ."
    )
    return "\n\n".join([title, intro, table(("budget", *head), rows), f"![Accuracy against FLOPs](plots/{figure})", *([other] if extra else ())])


def thinking(e: Mapping[str, Any]) -> str:
    decision = e.get("decision")
    if not decision:
        return ""
    auto = e.get("runs", {}).get("student auto", {})
    paid = f" ({auto['dropped']:.1f} tokens dropped and {auto['second_looks']:.1f} computed twice per problem, in the FLOPs)" if "dropped" in auto else ""
    keys = ("thought", "needed", "thought_if_needed", "thought_if_direct_right", "accuracy", "accuracy_thinking", "accuracy_direct", "either_right")
    rows = [(level, str(d["n"]), *(percent(d[k]) for k in keys)) for level, d in decision.items()]
    head = ("level", "n", "thought", "needed", "thought if needed", "thought if not", "auto", "always thinking", "never thinking", "perfect choice")
    intro = (
        "In `auto` a reply begins without reasoning where the model's own P(`<think>`) leaves a chance for it, and is dropped for reasoning at the first token"
        f" it is not sure of{paid}. *Needed*: only reasoning gets the problem right (same route, thinking on against off);"
        " *thought if not*: it reasoned although its direct answer was right. The last four columns are accuracies, the last one with perfect decisions."
    )
    return f"## Deciding to think\n\n{intro}\n\n{table(head, rows)}"


def shifts(e: Mapping[str, Any]) -> str:
    shifted = e.get("shifts")
    if not shifted:
        return "## Shifted problems\n\n" + missing("Shifted problems", "evaluation.n_shifted is 0")
    rows = []
    for shift, by_mode in shifted.items():
        found = [by_mode.get(m) for m in ("think", "auto")]
        correct = ["-" if r is None else with_interval(r) for r in found]
        rows.append((shift, str(by_mode["think"]["n"]), *correct, *("-" if r is None else mflop(r["flops"]) for r in found)))
    think = {shift: by_mode["think"]["by"]["task"] for shift, by_mode in shifted.items()}
    tasks = dict.fromkeys(t for by_task in think.values() for t in by_task)
    by_task = table(("task (`think`)", *think), ((t, *(percent(by[t]["accuracy"], 0) if t in by else "-" for by in think.values())) for t in tasks))
    intro = (
        "Changes that training never shows (docs/tasks.md): larger numbers, other names, held-out phrasings, numbers in words,"
        " and only problems without a solution."
    )
    return "\n\n".join(["## Shifted problems", intro, table(("shift", "n", "think, %", "auto, %", "think, MFLOP", "auto, MFLOP"), rows), by_task])


def routing(e: Mapping[str, Any], folder: Path) -> str:
    study, cut = e.get("routing"), e.get("ablations")
    parts = ["## Does the gate earn its place?"]
    if study:
        order = ("random", "random in replies", "constant", "position", "gate", "oracle", "reply oracle")
        rows, texts = [], []
        for s in study["shares"]:
            p, share = s["policies"], percent(s["share"], 0)
            closed = [percent(s["gap_closed"][name], 0) for name in ("gate", "position", "constant")]
            rows.append((share, *(f"{p[name]['kl']:.4f}" for name in order), mflop(p["gate"]["flops_per_token"]), *closed))
            texts.append(f"{share} slow: gate {p['gate']['nll']:.4f}, random {p['random']['nll']:.4f}")
        figure = plots.routing(folder / "plots" / "routing.png", study["shares"])
        parts += [
            f"KL(all-slow || routed) in nats per trace and answer token ({study['n_scored']:,} scored, {study['n_tokens']:,} routed, prompts included),"
            " held-out rows, teacher-forced, hard routing. All policies send exactly the same share of tokens slow."
            f" All-fast: {study['fast']['kl']:.4f}. *Random* is the mean of three draws; *random in replies* knows which tokens are scored"
            " and nothing else; *constant* makes whole documents slow; *position* knows only the"
            " place in the document; *oracle* knows each token's KL(slow || fast), *reply oracle* spends it on scored tokens first."
            " *Gap closed* is the way from random to the better oracle.",
            table(("slow tokens", *order, "gate, MFLOP per token", "gap closed by the gate", "by position", "by constant"), rows),
            f"![Routing policies](plots/{figure})",
            f"Loss on the text itself (nats per token): all-slow {study['slow']['nll']:.4f}, all-fast {study['fast']['nll']:.4f}; {'; '.join(texts)}.",
        ]
    else:
        parts.append(missing("Routing study", "the student has no calibrated gate"))
    if cut:
        rows = [("intact", f"{cut['nll']:.4f}", "", f"{cut['kl']:.4f}", "")]
        for c in cut["cases"]:
            name = f"{c['branch']} branch -> {c['replaced_by']}"
            rows.append((name, f"{c['nll']:.4f}", f"{c['delta_nll']:+.4f}", f"{c['kl']:.4f}", f"{c['delta_kl']:+.4f}"))
        parts += [
            "What a branch adds to the residual stream replaced, in every dual block, by zero or by its mean over the tokens"
            f" (`auto` at its default budget {cut['budget']:g}, {percent(cut['slow_share'])} slow):",
            table(("", "NLL", "change", "KL to all-slow", "change"), rows),
        ]
    auto = e.get("runs", {}).get("student auto")
    if auto:
        tasks = auto["by"]["task"]
        shares = [percent(1 - s["slow_share"], 0) for s in tasks.values()]
        parts += ["Share of tokens computed fast, by task (`auto`, default budget):", table(("", *tasks), [("fast tokens", *shares)])]
    return "\n\n".join(parts)


def heat_maps(e: Mapping[str, Any], folder: Path) -> str:
    found, title = e.get("gate_examples"), "## What the gate sends slow"
    if not found:
        return f"{title}\n\n" + missing("Gate heat map", "the student has no calibrated gate, or nothing was answered")
    intro = "One conversation each, prompt and reply. Brighter: the gate asks more for the slow branch (1 - g). A red bar marks tokens computed slow."
    parts = [title, intro]
    font = plots.cjk_font()
    for i, example in enumerate(found):
        figure = plots.gate_map(folder / "plots" / f"gate-{i + 1}.png", example)
        slow = sum(t["use_slow"] for t in example["tokens"]) / len(example["tokens"])
        kind, verdict = f"{example['task']}, {example['level']}, {example['lang']}", "right" if example["correct"] else "wrong"
        parts.append(f"**{kind}:** {percent(slow, 0)} of {len(example['tokens'])} tokens slow, answer {verdict}\n\n![Gate: {kind}](plots/{figure})")
        if font is None and any(ord(c) >= 0x250 for t in example["tokens"] for c in t["piece"]):
            parts.append("(No Chinese font on this machine: such tokens show their index. The text, slow tokens in bold:)\n\n" + marked(example["tokens"]))
    return "\n\n".join(parts)


def marked(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Text as HTML with slow tokens in bold; reads everywhere Markdown does."""
    out, run, slow = [], "", None
    for t in [*tokens, None]:
        if t is None or t["use_slow"] != slow:
            if run:
                out.append(f"<b>{run}</b>" if slow else run)
            run, slow = "", t and t["use_slow"]
        if t is not None:
            run += escape(t["piece"].replace("\n", " "))
    return "".join(out)


def speed(e: Mapping[str, Any]) -> str:
    measured, memory = e.get("speed"), e.get("memory")
    parts = ["## Speed and memory"]
    if measured and measured.get("rows"):

        def value(s: Mapping[str, float], digits: int) -> str:
            return f"{s['median']:,.{digits}f} ({s['low']:,.{digits}f}-{s['high']:,.{digits}f})"

        rows = []
        for r in measured["rows"]:
            times = value(r["first_token_ms"], 1), value(r["prefill_tokens_per_s"], 0), value(r["decode_tokens_per_s"], 0)
            cost = percent(r["slow_share"], 0), mflop(r["flops_per_token"]), f"{r['params_read'] / 1e6:.2f}"
            rows.append((r["case"], str(r["prompt_tokens"]), *times, *cost))
        per_second = "prefill, tokens/s", "decode, tokens/s"
        head = ("model and route", "prompt tokens", "first token, ms", *per_second, "slow tokens", "MFLOP per token", "M parameters read")
        a = e.get("about", {})
        parts += [
            f"Batch {measured['batch_size']}, {measured['n_decode']} tokens decoded one by one after the prompt, {a.get('dtype', '?')},"
            f" {a.get('threads', '?')} threads on {a.get('device', '?')}. Median and quartiles of {measured['repeats']} repeats after"
            f" {measured['warmup']} warm-up; the models take turns within each repeat. The first token's time is the prefill of the prompt.",
            table(head, rows),
        ]
    else:
        parts.append(missing("Speed", "not measured"))
    if memory:
        names = dict.fromkeys(part for m in memory.values() for part in m["param_bytes_by_part"])
        rows = [(part, *(bytes_text(m["param_bytes_by_part"].get(part, 0)) for m in memory.values())) for part in names]
        rows.append(("all weights", *(bytes_text(m["param_bytes"]) for m in memory.values())))
        rows.append(("parameters", *(f"{m['params']:,}" for m in memory.values())))
        rows.append(("K/V cache per token", *(bytes_text(m["kv_bytes_per_token"]) for m in memory.values())))
        peak = max(m["peak_rss_bytes"] for m in memory.values())
        now = [m["rss_bytes"] for m in memory.values() if "rss_bytes" in m]
        held = f" (resident at the end: {bytes_text(now[-1])})" if now else ""
        parts += [table(("memory", *memory), rows), f"The whole evaluation process, all models loaded, peaked at {bytes_text(peak)} of resident memory{held}."]
    return "\n\n".join(parts)


def training(stages: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, config: RunConfig | None) -> str:
    if not stages:
        return "## Training\n\n" + missing("Losses", "metrics.jsonl has none")
    figure = plots.losses(folder / "plots" / "losses.png", stages)
    rows = []
    for name, records in stages.items():
        tail = [r["loss"] for r in records[-max(1, len(records) // 20) :]]
        rates = [r["tokens_per_s"] for r in records if "tokens_per_s" in r]
        rate = f"{statistics.median(rates):,.0f}" if rates else "-"
        rows.append((name, str(records[-1]["step"] + 1), f"{records[0]['loss']:.4f}", f"{statistics.fmean(tail):.4f}", rate))
    parts = ["## Training", table(("stage", "steps", "first loss", "mean of the last 5 %", "tokens/s (median)"), rows), f"![Losses per stage](plots/{figure})"]
    if "teacher" not in stages:
        source = f" from `{config.teacher.checkpoint}`" if config is not None and config.teacher.checkpoint else ""
        parts.append(f"*The teacher was loaded{source}, not trained in this run.*")
    if rounds := {r["step"]: r for r in read_records(folder / "metrics.jsonl") if r.get("stage") == "solutions"}:
        n, right, kept = (sum(r[name] for r in rounds.values()) for name in ("n_problems", "right", "kept"))
        parts.append(f"Self-training: sampled solutions of {n} new problems were right in {percent(right / n)}; the student learned from {kept}.")
    return "\n\n".join(parts)


def examples(e: Mapping[str, Any]) -> str:
    parts = []
    for name in ("student think", "student auto", "student fast"):
        for x in e.get("runs", {}).get(name, {}).get("examples", []):
            reasoning = f"; reasoning: {inline(x['reasoning'])}" if x["reasoning"] else ""
            verdict = "right" if x["correct"] else f"wrong, expected {inline(x['expected'])}"
            parts.append(f"- *{name}*, {inline(x['task'])}, {x['level']}: {inline(x['prompt'])} -> **{inline(x['answer'])}** ({verdict}{reasoning})")
    return "## Some replies\n\nHalf right and half wrong where there are both, not representative.\n\n" + "\n".join(parts) if parts else ""


def conditions(e: Mapping[str, Any], config: RunConfig | None) -> str:
    a = e.get("about", {})
    versions = f"torch {a.get('torch', '?')}, Python {a.get('python', '?')}, {a.get('platform', '?')}"
    lines = [
        f"- {a.get('date', 'date unknown')}, commit `{a.get('commit', 'unknown')}`, seed {a.get('seed', '?')}, run `{a.get('run', '?')}`",
        f"- {a.get('device', 'unknown hardware')}; {a.get('threads', '?')} threads; {a.get('dtype', '?')}; {versions}",
    ]
    if "evaluation_seconds" in a:
        lines.append(f"- evaluation took {a['evaluation_seconds']:.0f} s")
    if config is not None:
        lines.append(f"- at most {config.evaluation.max_tokens} tokens per reply, a reply cut there counts as it stands")
    lines.append("- FLOPs are counted: a multiply-add is 2, matrices and attention only (dualbranch/accounting.py), each token by its own route and position")
    lines.append("- all numbers from `config.yaml`, `metrics.jsonl` and `evaluation.json` beside this file")
    return "## Conditions\n\n" + "\n".join(lines)
