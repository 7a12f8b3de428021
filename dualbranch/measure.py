"""Speed and memory on the machine at hand: prefill, first token, decode per route, and where a model's bytes are.

Models take turns within every repeat, so that a slow moment of the machine hits all of them; medians, with the quartiles beside
them. Everything is batch 1 on real tokens, so the gate routes what it would route. Called by `evaluate.py`.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from dualbranch.model import DualBranchModel


@dataclass(frozen=True)
class SpeedCase:
    """One model on one route ("slow" | "fast" | "auto", at its default budget)."""

    name: str
    model: DualBranchModel
    route: str


def speed_cases(teacher: DualBranchModel, student: DualBranchModel, dense: DualBranchModel | None = None) -> list[SpeedCase]:
    """Teacher, student on each route it has, dense baseline if there is one."""
    cases = [SpeedCase("teacher", teacher, "slow"), SpeedCase("student slow", student, "slow")]
    if student.gate is not None and student.calibration is not None:
        cases += [SpeedCase("student fast", student, "fast"), SpeedCase("student auto", student, "auto")]
    return cases if dense is None else [*cases, SpeedCase("dense", dense, "slow")]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock of `work()`, everything it started on `device` included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


@torch.inference_mode()
def measure_speed(cases: Sequence[SpeedCase], text: Tensor, prompt_lengths: Sequence[int] = (64, 256, 512), n_decode: int = 32, repeats: int = 5) -> dict:
    """Per case and prompt length: `first_token_ms` (prefill of one prompt up to its last logits), `prefill_tokens_per_s`, and
    `decode_tokens_per_s` of the next `n_decode` tokens, one by one.

    `text (n,)`: real tokens that all cases are fed, so each does the same work; of a short one half is decoded. Prompts too long for `text` or a model are
    left out.
    One warm-up repeat is thrown away.
    """
    n_there = min(len(text), *(c.model.config.max_seq_len for c in cases))
    n_decode = min(n_decode, max(1, n_there // 2))
    longest = n_there - n_decode
    lengths = [n for n in prompt_lengths if n <= longest] or [max(1, longest)]
    times: dict[tuple[str, int], list[tuple[float, float]]] = {(c.name, n): [] for c in cases for n in lengths}
    slow_share: dict[tuple[str, int], float] = {}
    for repeat in range(repeats + 1):
        for n in lengths:
            for case in cases:
                device = case.model.device
                tokens = text[None, : n + n_decode].to(device)
                cache = case.model.new_cache(1, n + n_decode)
                prefill = seconds_of(lambda: case.model(tokens[:, :n], case.route, cache=cache, last_only=True), device)  # noqa: B023

                def decode() -> None:
                    for t in range(n, n + n_decode):  # noqa: B023
                        case.model(tokens[:, t : t + 1], case.route, cache=cache, last_only=True)  # noqa: B023

                decoded = seconds_of(decode, device)
                if repeat:
                    times[case.name, n].append((prefill, decoded))
                slow_share[case.name, n] = float(cache.from_slow[0, : n + n_decode].double().mean())
    rows = []
    for (name, n), pairs in times.items():
        case = next(c for c in cases if c.name == name)
        cost = case.model.cost(slow_share[name, n], n)
        rows.append(
            {
                "case": name,
                "prompt_tokens": n,
                "first_token_ms": spread([1e3 * p for p, _ in pairs]),
                "prefill_tokens_per_s": spread([n / p for p, _ in pairs]),
                "decode_tokens_per_s": spread([n_decode / d for _, d in pairs]),
                "slow_share": slow_share[name, n],
                "flops_per_token": cost.flops,
                "params_read": cost.params_read,
            }
        )
    return {"batch_size": 1, "n_decode": n_decode, "repeats": repeats, "warmup": 1, "rows": rows}


def measure_memory(model: DualBranchModel) -> dict:
    """Bytes of weights by part, bytes each token adds to the cache, and what the process holds (`rss_bytes` now, `peak_rss_bytes` so far)."""
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        parts[part_of(model, name)] = parts.get(part_of(model, name), 0) + p.numel() * p.element_size()
    out = {
        "params": sum(p.numel() for p in model.parameters()),
        "param_bytes": sum(parts.values()),
        "param_bytes_by_part": parts,
        "params_read": {route: model.cost(route).params_read for route in ("slow", "fast")},
        "kv_bytes_per_token": model.cost("slow").kv_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024),
    }
    statm = Path("/proc/self/statm")
    if statm.exists():
        out["rss_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return out


def part_of(model: DualBranchModel, name: str) -> str:
    """Which part of the model a parameter belongs to: embedding, always-slow blocks, shared K/V and norms, slow, fast, gate."""
    words = name.split(".")
    if words[0] in ("embed", "head"):
        return "embedding and head"
    if words[0] == "gate":
        return "gate"
    if words[0] != "blocks":
        return "shared"
    if int(words[1]) not in model.config.dual_layers:
        return "stem and tail"
    return {"slow": "slow branch", "fast": "fast branch"}.get(words[2], "shared")


def about(model: DualBranchModel) -> dict:
    """Where and when numbers were made: hardware, versions, threads, date, commit."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores",
        "dtype": str(model.dtype).removeprefix("torch."),
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the source tree's commit, marked `+` if files have changed since; "unknown" outside a repository."""
    folder = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return "unknown" if not head else head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
