"""What `peers.py` writes: medians with their spread, each beside the roofline it could reach, as tables, JSON, Markdown and a plot.

Roofline: a piece of work takes at least its bytes over the machine's read bandwidth and at least its FLOPs over the peak of its matrix products in
fp32 or, where it has units for it, bf16 (Williams et al. 2009), so `of_roofline` is the longer of the two over the measured seconds. Bytes of a
decoded token: the weights its route reads and the keys and values it attends to, in the engine's own types; of a prompt: the weights once. FLOPs as
in `dualbranch/accounting.py`, whatever the engine's arithmetic: integer dot products and a model that fits a cache may pass 100 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers_engines import Engine
from rich.console import Console
from rich.table import Table

from dualbranch import plots
from dualbranch.accounting import fast_keys, head_flops, token_flops, total_params
from dualbranch.config import DualBranchConfig
from dualbranch.measure import spread
from dualbranch.storage import write_text

# ---- arithmetic


def weight_bytes_read(c: DualBranchConfig, slow_share: float, held: Mapping[str, int]) -> float:
    """Bytes of weights that a token reads of those `held` (`Adapter.weight_bytes`): not the other branch's, nor an embedding table that isn't the head."""
    table = 0 if c.tie_embeddings else c.vocab_size * c.d_model / total_params(c) * held["all"]
    return held["all"] - table - (1 - slow_share) * held.get("slow", 0) - slow_share * held.get("fast", 0)


def kv_bytes_read(c: DualBranchConfig, slow_share: float, n_cached: int, element_bytes: int) -> float:
    """Bytes of keys, values and (fast branch, fp32) pooled keys that a token reads which sees `n_cached` earlier ones and itself."""
    n, row = n_cached + 1, c.n_kv_heads * c.head_dim
    total = 0.0
    for i in range(c.n_layers):
        sliding = i in c.sliding_layers
        slow = min(n, c.sliding_window) if sliding else n
        fast = min(n, c.fast_window) if sliding else fast_keys(c, n)
        pooled = 0 if sliding or n <= c.sparse.dense_len else n // c.sparse.block_size
        share = slow_share if i in c.dual_layers else 1.0
        total += 2 * row * element_bytes * (share * slow + (1 - share) * fast) + 4 * row * (1 - share) * pooled
    return total


def prompt_flops(c: DualBranchConfig, slow_share: float, n: int) -> float:
    """FLOPs of a prompt of `n` tokens, up to the logits of its last."""
    return sum(token_flops(c, slow_share, i) for i in range(n)) - (n - 1) * head_flops(c)


def of_roofline(seconds: float, n_bytes: float, flops: float, machine: Mapping[str, Mapping[str, float]]) -> float:
    """The least time the work could take on `machine`, over the time it took."""
    return max(n_bytes / machine["read_bytes_per_s"]["median"], flops / machine["flops_per_s"]["median"]) / seconds


def perplexity(windows: Sequence[Mapping[str, float]]) -> float:
    return math.exp(sum(w["nll"] for w in windows) / sum(w["n_predicted"] for w in windows))


def summary(engine: Engine, c: DualBranchConfig, turns: Sequence[Sequence[dict]], windows: Sequence[dict], machine: Mapping, notes: Sequence[str]) -> dict:
    """All of one engine: `turns` hold what its processes wrote (`peers_engines.main`), `windows` the same of the quality task, without the first line."""
    turns = [t for t in turns if len(t) > 1]
    starts = [t[0] for t in turns]
    out = {
        "engine": engine.name, "library": engine.library, "precision": engine.precision, "route": engine.route, "budget": engine.budget,
        "details": starts[0]["details"] if starts else "", "notes": list(notes), "perplexity": perplexity(windows) if windows else None,
        "decode_error": windows[0]["decode_error"] if windows else None,
        "first_token": [], "decode": [],
    }  # fmt: skip
    if not turns:
        return out
    weights = starts[0]["weight_bytes"]
    out["weight_bytes"] = weights["all"]
    out |= {key: spread([s[key] for s in starts]) for key in ("import_s", "load_s", "warmup_s", "load_peak_rss_bytes")}
    out["peak_rss_bytes"] = spread([t[-1]["peak_rss_bytes"] for t in turns])
    records = [r for t in turns for r in t[1:]]
    for n in sorted({r["tokens"] for r in records}):
        same = [r for r in records if r["tokens"] == n]
        share = same[0]["prompt_slow_share"]
        seconds, n_bytes, flops = spread([r["first_token_s"] for r in same]), weight_bytes_read(c, share, weights), prompt_flops(c, share, n)
        row = {"tokens": n, "repeats": len(same), "seconds": seconds, "slow_share": share, "bytes": n_bytes, "flops": flops}
        out["first_token"].append(row | {"of_roofline": of_roofline(seconds["median"], n_bytes, flops, machine)})
        same = [r for r in same if "step_s" in r]
        if same:
            share = same[0]["step_slow_share"]
            n_bytes = weight_bytes_read(c, share, weights) + kv_bytes_read(c, share, n, starts[0]["kv_element_bytes"])
            speed, flops = spread([1 / r["step_s"] for r in same]), token_flops(c, share, n)
            row = {"tokens": n, "repeats": len(same), "tokens_per_s": speed, "slow_share": share, "bytes": n_bytes, "flops": flops}
            out["decode"].append(row | {"of_roofline": of_roofline(1 / speed["median"], n_bytes, flops, machine)})
    return out


# ---- tables

#: title, header, rows
TableText = tuple[str, list[str], list[list[str]]]


def number(x: Mapping[str, float], scale: float = 1.0) -> str:
    """Median and quartiles, with digits as its size asks for."""
    digits = 0 if abs(x["median"] * scale) >= 100 else 1 if abs(x["median"] * scale) >= 10 else 2
    median, low, high = (f"{x[key] * scale:,.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})" if low != high else median


def tables(result: Mapping[str, Any]) -> list[TableText]:
    """Of the engines as they are, of first tokens, of decoding."""
    engines = [e for e in result["engines"] if e["first_token"]]
    quality = {e["engine"]: "" if e["perplexity"] is None else f"{e['perplexity']:.2f}" for e in engines}
    rows = []
    for e in engines:
        seconds = [number(e[key]) for key in ("import_s", "load_s", "warmup_s")]
        memory = [f"{e['weight_bytes'] / 1e6:,.0f}", *(number(e[key], 1e-6) for key in ("load_peak_rss_bytes", "peak_rss_bytes"))]
        rows.append([e["engine"], *seconds, *memory, quality[e["engine"]]])
    header = ["engine", "import (s)", "load (s)", "warm-up (s)", "weights (MB)", "peak memory, loading (MB)", "peak memory (MB)", "perplexity"]
    found = [("Engines: median (quartiles)", header, rows)]
    for title, key, value in (
        ("Time to the first token, ms: median (quartiles), share of the roofline", "first_token", lambda r: number(r["seconds"], 1e3)),
        ("Decoding, tokens/s: median (quartiles), share of the roofline", "decode", lambda r: number(r["tokens_per_s"])),
    ):
        lengths = sorted({r["tokens"] for e in engines for r in e[key]})
        rows = []
        for e in engines:
            by = {r["tokens"]: r for r in e[key]}
            cells = [f"{value(by[n])}, {100 * by[n]['of_roofline']:.0f} %" if n in by else "" for n in lengths]
            rows.append([e["engine"], *cells, quality[e["engine"]]])
        found.append((title, ["engine", *(f"{n:,}" for n in lengths), "perplexity"], rows))
    return found


def show(result: Mapping[str, Any], console: Console) -> None:
    for title, header, rows in tables(result):
        console.print(f"\n{title}", highlight=False)
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in remarks(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What was not reached, and what was not measured at all."""
    return [f"{e['engine']}: {note}" for e in result["engines"] for note in e["notes"]] + [f"{n}: not measured: {why}" for n, why in result["skipped"].items()]


# ---- files


def markdown(result: Mapping[str, Any], plot: str | None) -> str:
    s, machine = result["settings"], result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Peers on a CPU, {result['date'][:10]}",
        "",
        f"`{result['command']}`: {result['model']}{'' if result['dual'] is None else ', its dual-branch student ' + result['dual']}, batch 1.",
        "",
        *([f"All weights come from {result['weights']}: other precisions hold the values that file rounds to.", ""] if result["weights"] else []),
        f"{result['device']}, {s['threads']} threads; {packages}; commit {result['commit']}; {result['date']}.",
        f"Measured here on as many threads: reading memory {number(machine['read_bytes_per_s'], 1e-9)} GB/s,",
        f"the fastest matrix product (fp32, and bf16 where there are units for it) {number(machine['flops_per_s'], 1e-9)} GFLOP/s.",
        "",
        f"Every engine in a process of its own, in turn, {s['repeats']} rounds: every prompt once, and behind it {s['n_decode']} tokens, decoded twice and",
        "timed the second time. All are fed the same ids, nothing is sampled. First token: from ids to the logits of the last one. Load: from files to a model",
        "that takes a prompt; warm-up: the shortest prompt and its decoding, with all that is compiled at first use. Peak memory: of the whole process, the",
        f"longest prompt included. Perplexity: {s['quality_tokens']:,} tokens of the same text in windows of {s['window']}, by the routes that are timed,",
        "without second looks. Share of the roofline: as defined in `benchmarks/peers_report.py`.",
        "",
    ]
    for title, header, rows in tables(result):
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- {e['engine']}: {e['details']}" for e in result["engines"] if e["details"]]
    lines += [f"- {line}" for line in remarks(result)]
    return "\n".join([*lines, "", *([f"![decoding speed against perplexity]({plot})", ""] if plot else [])])


def write(result: Mapping[str, Any], out: str) -> None:
    """`out`.json, .md and (where a perplexity stands beside a speed) .png, each whole or not at all."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    plot = quality_plot(Path(f"{out}.png"), result)
    write_text(f"{out}.json", json.dumps(result, indent=1) + "\n")
    write_text(f"{out}.md", markdown(result, plot))


#: Markers by library (ours: by route), colours by precision; hollow: ours, uncompiled.
MARKERS = {"slow": "o", "fast": "v", "auto": "D", "llama.cpp": "s", "transformers": "^"}
COLORS = {
    "fp32": plots.BLACK, "bf16": plots.GREEN, "int8": plots.BLUE, "int8-dynamic": plots.PURPLE, "int4": plots.RED, "q8_0": plots.SKY, "q4_1": plots.ORANGE
}  # fmt: skip


def quality_plot(path: Path, result: Mapping[str, Any]) -> str | None:
    """Decoding speed against perplexity, one panel per context, a point per engine. Returns the file's name, None where there is nothing to draw."""
    drawn = [e for e in result["engines"] if e["perplexity"] is not None and e["decode"]]
    if not drawn:
        return None
    lengths = sorted({r["tokens"] for e in drawn for r in e["decode"]})
    plt = plots._pyplot()
    figure, axes = plt.subplots(1, len(lengths), figsize=(3.6 * len(lengths) + 1.6, 3.6), squeeze=False)
    lines = {}
    for ax, n in zip(axes[0], lengths, strict=True):
        for e in drawn:
            row = next((r for r in e["decode"] if r["tokens"] == n), None)
            if row is None:
                continue
            marker = MARKERS.get(e["route"] if e["library"] == "ours" else e["library"], "P")
            color, speed = COLORS.get(e["precision"], plots.YELLOW), row["tokens_per_s"]
            error = [[speed["median"] - speed["low"]], [speed["high"] - speed["median"]]]
            style = {"linestyle": "", "markersize": 6, "elinewidth": 0.8, "markerfacecolor": "none" if e["engine"].endswith("eager") else color}
            lines[e["engine"]] = ax.errorbar(e["perplexity"], speed["median"], yerr=error, color=color, marker=marker, **style)
        ax.set(xlabel="perplexity (less is better)", ylabel="decoded tokens per second", title=f"context {n:,}", ylim=(0, None))
    axes[0][-1].legend(lines.values(), lines.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return plots._save(plt, figure, path)
