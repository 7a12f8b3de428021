"""The report's figures, as PNG files. Matplotlib is imported here and nowhere else, when a figure is drawn.

Colours are Okabe and Ito's (2008), told apart by readers with any colour vision; every series also differs in marker or place.
Each function draws one figure of plain data and returns the file's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"
STAGE_TITLES = {"teacher": "Teacher", "student": "Student", "dense": "Dense baseline", "gate": "Gate"}
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei",
    "Droid Sans Fallback",
)  # fmt: skip


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "figure.dpi": 130, "savefig.bbox": "tight", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "legend.frameon": False,
    })  # fmt: skip
    return plt


def _save(plt: Any, figure: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path.name


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def losses(path: Path, stages: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Loss against step, one panel per stage: every step pale, its running mean dark. `stages[name]` are records with `step` and `loss`."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(stages), figsize=(3.4 * len(stages), 2.7), squeeze=False)
    for ax, (name, records) in zip(axes[0], stages.items(), strict=True):
        steps, values = [r["step"] for r in records], [r["loss"] for r in records]
        ax.plot(steps, values, color=SKY, linewidth=0.7, alpha=0.6)
        ax.plot(steps, smooth(values, max(1, len(values) // 40)), color=BLUE, linewidth=1.5)
        if min(values) > 0 and max(values) > 4 * min(values):
            ax.set_yscale("log")
        ax.set(title=STAGE_TITLES.get(name, name), xlabel="step")
        ax.set_ylabel("squared error of log KL (standardised)" if name == "gate" else "loss (nats per token)")
    figure.tight_layout()
    return _save(plt, figure, path)


def _interval(run: Mapping[str, Any]) -> list[list[float]]:
    """How far the 95 % interval reaches below and above the accuracy, in points, as error bars want it."""
    return [[100 * (run["accuracy"] - run["low"])], [100 * (run["high"] - run["accuracy"])]]


def accuracy_bars(path: Path, runs: Mapping[str, Mapping[str, Any]], by: str = "task") -> str:
    """Grouped bars: accuracy of every run in each group of `by`, with 95 % intervals. `runs[label]` is a `Result.to_dict()`."""
    plt = _pyplot()
    groups = list(next(iter(runs.values()))["by"][by])
    colors = [BLACK, BLUE, ORANGE, GREEN, PURPLE, RED]
    width = 0.8 / len(runs)
    figure, ax = plt.subplots(figsize=(max(6.0, 1.25 * len(groups) + 1), 3.2))
    for i, (label, run) in enumerate(runs.items()):
        summaries = [run["by"][by][g] for g in groups]
        x = [k - 0.4 + (i + 0.5) * width for k in range(len(groups))]
        height = [100 * s["accuracy"] for s in summaries]
        error = [[e[k][0] for e in map(_interval, summaries)] for k in (0, 1)]
        ax.bar(x, height, width * 0.92, yerr=error, color=colors[i % len(colors)], label=label, error_kw={"elinewidth": 0.7, "ecolor": "#666666"})
    ax.set_xticks(range(len(groups)), [g.replace("_", "\n") for g in groups])
    ax.set(ylabel="correct answers (%)", ylim=(0, 105))
    ax.grid(axis="x", visible=False)
    ax.legend(ncols=len(runs), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _save(plt, figure, path)


def pareto(path: Path, curve: Sequence[tuple[str, Mapping[str, Any]]], points: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy against FLOPs per answered problem: the `auto` curve over budgets (label, run), and other runs as labelled points."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(6.6, 4.2))
    if curve:
        curve = sorted(curve, key=lambda c: c[1]["flops"])
        x, y = [r["flops"] / 1e6 for _, r in curve], [100 * r["accuracy"] for _, r in curve]
        ax.plot(x, y, color=BLUE, marker="o", markersize=4, linewidth=1.5, label="student, auto (budget beside the point)", zorder=3)
        for label, run in curve:
            here = (run["flops"] / 1e6, 100 * run["accuracy"])
            ax.errorbar(*here, yerr=_interval(run), color=BLUE, elinewidth=0.6, alpha=0.5)
            ax.annotate(label, here, textcoords="offset points", xytext=(5, -10), fontsize=7, color=BLUE)
    styles = [("s", BLACK), ("D", "#777777"), ("^", RED), ("v", ORANGE), ("P", GREEN), ("X", PURPLE), ("<", SKY)]
    for (label, run), (marker, color) in zip(points.items(), styles, strict=False):
        here = (run["flops"] / 1e6, 100 * run["accuracy"])
        ax.errorbar(*here, yerr=_interval(run), color=color, marker=marker, markersize=6, linestyle="", elinewidth=0.6, label=label)
    ax.set_xlim(left=0)
    ax.set(xlabel="computation per answered problem, prompt included (MFLOP)", ylabel="correct answers (%)")
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(plt, figure, path)


def text_curves(path: Path, texts: Mapping[str, Mapping[str, Any]]) -> str:
    """Perplexity against computation per token, one panel per text (`evaluation["text"]`): auto as a line from fast to slow."""
    plt = _pyplot()
    font = cjk_font()
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts), 3.2), squeeze=False)
    for ax, (name, text) in zip(axes[0], texts.items(), strict=True):
        curve = sorted(text["routes"], key=lambda r: r["flops"])
        ax.plot([r["flops"] / 1e6 for r in curve], [r["perplexity"] for r in curve], color=BLUE, linewidth=1.2, zorder=2)
        for r in curve:
            color, marker = {"slow": (BLACK, "s"), "fast": (RED, "^")}.get(r["route"], (BLUE, "o"))
            here = (r["flops"] / 1e6, r["perplexity"])
            ax.plot(*here, color=color, marker=marker, markersize=5, zorder=3)
            label = r["route"] if r["budget"] is None else f"auto {r['budget']:g}"
            ax.annotate(label, here, textcoords="offset points", xytext=(5, 4), fontsize=7, color=color)
        ax.set(xlabel="computation per token (MFLOP)", ylabel="perplexity")
        ax.set_title(name.replace("$", r"\$"), family=font if font and not name.isascii() else None)  # a file's name may hold anything
    figure.tight_layout()
    return _save(plt, figure, path)


def routing(path: Path, shares: Sequence[Mapping[str, Any]]) -> str:
    """KL to the all-slow run against the share of slow tokens, per policy (`routing_study(...)["shares"]`)."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    styles = {
        "constant": (PURPLE, "D", ":"), "random": (BLACK, "s", "--"), "random in replies": (BLACK, "v", ":"),
        "position": (ORANGE, "^", "-."), "gate": (BLUE, "o", "-"),
        "oracle": (GREEN, "P", "-"), "reply oracle": (RED, "X", "-"),
    }  # fmt: skip
    for name, (color, marker, line) in styles.items():
        y = [s["policies"][name]["kl"] for s in shares]
        ax.plot([100 * s["policies"][name]["slow_share"] for s in shares], y, color=color, marker=marker, linestyle=line, markersize=4, label=name)
    ax.set(xlabel="slow tokens (%)", ylabel="KL(all-slow || routed), nats per token", ylim=(0, None))
    ax.legend()
    return _save(plt, figure, path)


def cjk_font() -> str | None:
    """A font with Chinese glyphs, or None; Matplotlib's own has none and would draw empty boxes."""
    from matplotlib import font_manager

    installed = {f.name for f in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def gate_map(path: Path, example: Mapping[str, Any], per_row: int = 88) -> str:
    """The need for the slow branch, 1 - g, token by token over one conversation; a bar under a token = computed slow.

    Each token's text stands in its cell; where no font has its characters, the cell holds the token's index instead.
    """
    plt = _pyplot()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    font = cjk_font()
    needs = [1 - t["g"] for t in example["tokens"]]
    cells = []  # (text, units wide, family)
    for i, t in enumerate(example["tokens"]):
        piece = "".join(c if c.isprintable() else "\u00b7" for c in t["piece"].replace("\n", "\\n"))
        plain = all(ord(c) < 0x250 for c in piece)
        text = piece if plain or font else f"[{i}]"
        units = sum(1 if ord(c) < 0x1100 else 2 for c in text)
        cells.append((text, max(1, units) + 0.6, None if plain or not font else font))
    rows: list[list[tuple[int, float]]] = [[]]  # (token, left edge)
    x = 0.0
    for i, (_, width, _) in enumerate(cells):
        if x + width > per_row:
            rows.append([])
            x = 0.0
        rows[-1].append((i, x))
        x += width
    figure, ax = plt.subplots(figsize=(9.5, 0.34 * len(rows) + 0.5))
    norm, cmap = Normalize(min(needs), max(needs) if max(needs) > min(needs) else min(needs) + 1e-6), plt.get_cmap("cividis")
    for r, row in enumerate(rows):
        for i, left in row:
            text, width, family = cells[i]
            shade = norm(needs[i])
            ax.add_patch(Rectangle((left, -r), width, 0.72, facecolor=cmap(shade), edgecolor="white", linewidth=0.5))
            if example["tokens"][i]["use_slow"]:
                ax.add_patch(Rectangle((left, -r - 0.12), width, 0.1, facecolor=RED, edgecolor="none"))
            style = {"family": family} if family else {"family": "DejaVu Sans Mono"}
            color = "black" if shade > 0.55 else "white"
            ax.text(left + width / 2, -r + 0.34, text.replace("$", r"\$"), ha="center", va="center", fontsize=7, color=color, **style)
    ax.set(xlim=(0, per_row), ylim=(-len(rows) + 0.75, 0.8))
    ax.axis("off")
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=ax, fraction=0.015, pad=0.01)
    bar.set_label("1 - g", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return _save(plt, figure, path)
