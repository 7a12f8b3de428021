"""Times the fast branch's sparse attention against dense SDPA, after checking that both compute what they promise.

    python benchmarks/attention.py [--lengths 1024 2048] [--quick] [--device cuda] [--compiled]

Prefill: one row, all queries. Decode: one query over a cache of that many keys, the mean of 16 layers that take turns, as those of a model do.
Baseline and ours run strictly in turn, in one process, the median of `--repeats` after one warm-up call. Extra memory: the sum of live tensors
allocated during the call, at its highest, the output included.

Two kinds of data, for how much neighbouring queries' choices overlap decides how fast blocks are read:
- random: independent normal queries and keys, the worst case: neighbours share nothing but chance;
- smooth: what we take for text. Per KV head a walk along the sequence (AR(1), unit variance, correlation exp(-n / 64) over n tokens) for keys and another
  for queries, half as much noise on both (on queries per head), and one direction u added to all queries and to the keys of one block in 64: heavy hitters.
`--compiled` (CPU): sparse prefill also through the two steps that `dualbranch compile` makes machine code of (`dualbranch/sparse_prompt.py`), which takes a
minute of compiling first. A model so compiled reads its prompts that way.

"distinct" says how many blocks 64 consecutive queries choose together, of n_selected_blocks each: the mean over tiles of sparse queries and KV heads.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import AttentionPlan, SparseSpec, dense_attention, get_backend, pool_keys, reference, select_blocks, sparse_attention

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
DATA = ["random", "smooth"]
LAYERS = 16  # that a decode step goes through: more than the CPU's caches hold


def make(T: int, n_keys: int, args: argparse.Namespace, data: str = "random") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q of the last T of n_keys positions, k and v; module docstring says of what kind. Of k and v each head's tokens lie together, as in the model's cache."""
    H, Hk, D = args.n_heads, args.n_kv_heads, args.head_dim
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, D, generator=g) for n, heads in ((T, H), (n_keys, Hk), (n_keys, Hk)))
    if data == "smooth":
        u = torch.randn(1, 1, Hk, D, generator=g)
        is_heavy = (torch.rand(1, -(-n_keys // 16), Hk, 1, generator=g) < 1 / 64).repeat_interleave(16, 1)[:, :n_keys]
        k = 0.5 * k + walk(n_keys, Hk, D, g) + is_heavy * u
        q = 0.5 * q + (walk(n_keys, Hk, D, g)[:, n_keys - T :] + u).repeat_interleave(H // Hk, 2)
    q, k, v = (x.to(args.device, args.dtype) for x in (q, k, v))
    return q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))


def walk(n: int, n_heads: int, head_dim: int, g: torch.Generator, tokens: float = 64.0) -> torch.Tensor:
    """(1, n, n_heads, head_dim) of unit variance, correlated by exp(-distance / tokens) along the sequence."""
    x, keep = torch.randn(1, n, n_heads, head_dim, generator=g), math.exp(-1 / tokens)
    x[:, 1:] *= math.sqrt(1 - keep * keep)
    for t in range(1, n):
        x[:, t] += keep * x[:, t - 1]
    return x


def count_distinct(q: torch.Tensor, k: torch.Tensor, plan: AttentionPlan, spec: SparseSpec, tile: int = 64) -> float:
    """Mean number of blocks that `tile` consecutive sparse queries choose together; nan if there are no such queries."""
    ids = select_blocks(q, pool_keys(k, spec.block_size), plan, spec)[0]
    counts = [len(x.unique()) for t in range(spec.dense_len, len(ids) - tile + 1, tile) for x in ids[t : t + tile].unbind(1)]
    return statistics.mean(counts) if counts else math.nan


def compiled_prompt(args: argparse.Namespace) -> Callable:
    """Sparse attention of a prompt by compiled steps, called as `sparse_attention`."""
    from dualbranch import compiled, sparse_prompt

    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name, step in sparse_prompt.plain_steps(SparseSpec()).items():
            path, example = Path(folder) / f"{name}.pt2", compiled.example_of_sparse(step, args.n_heads // args.n_kv_heads, args.head_dim, args.dtype)
            compiled.compile_step(step, *example, path, torch.get_num_threads())
            steps[name] = compiled.opened(path)
    prompt = sparse_prompt.SparsePrompt(SparseSpec(), **steps, dtype=args.dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, spec: SparseSpec, pooled: torch.Tensor | None = None) -> torch.Tensor:
        return prompt(q[0], k, v, pooled, plan)[None]

    return attend


def check(args: argparse.Namespace, compiled: Callable | None) -> float:
    """Largest difference to the reference over prefill and decode; raises if it is more than rounding."""
    spec, S, worst = SparseSpec(), 1500, 0.0  # dense, masked and sparse queries
    plan = AttentionPlan(torch.arange(S, device=args.device)[None], S)
    sparse, dense = (sparse_attention, reference.sparse_attention, (spec,)), (dense_attention, reference.dense_attention, ())
    for (op, ref, extra), data in itertools.product((sparse, dense), DATA):
        q, k, v = make(S, S, args, data)
        expected = ref(q.float(), k.float(), v.float(), plan, *extra)
        worst = max(worst, (op(q, k, v, plan, *extra).float() - expected).abs().max().item())
        if compiled and op is sparse_attention:
            worst = max(worst, (compiled(q, k, v, plan, *extra).float() - expected).abs().max().item())
        last = AttentionPlan(plan.q_pos[:, -1:], S)
        worst = max(worst, (op(q[:, -1:], k, v, last, *extra).float() - expected[:, -1:]).abs().max().item())
    allowed = 1e-4 if args.dtype == torch.float32 else 5e-2
    if worst > allowed:
        raise SystemExit(f"not equal to the reference: largest difference {worst:.2e}, allowed {allowed:.0e}; nothing was timed")
    return worst


def time_in_turn(calls: dict, repeats: int, device: str, clock=time.perf_counter) -> dict[str, tuple[float, float]]:
    """name -> (median, half of the middle half's width) in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append((clock() - start) * 1e3)
    spread = {n: (sorted(s)[(3 * len(s)) // 4] - sorted(s)[len(s) // 4]) / 2 for n, s in seconds.items()}
    return {n: (statistics.median(s), spread[n]) for n, s in seconds.items()}


def peak_extra_mib(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


@torch.inference_mode()
def measure_one(phase: str, n: int, data: str, args: argparse.Namespace, compiled: Callable | None) -> dict:
    """One table row: a whole prefill of n tokens, or one decode step over n keys: of LAYERS layers, each with a cache of its own, as a model has them."""
    spec = SparseSpec()
    T, n_layers = (n, 1) if phase == "prefill" else (1, LAYERS)
    q, k, v = make(T, n, args, data)
    plan = AttentionPlan(torch.arange(n - T, n, device=args.device)[None], n)
    pooled = pool_keys(k, spec.block_size) if phase == "decode" else None
    layers = [(k, v, pooled)] + [(k.clone(), v.clone(), pooled.clone()) for _ in range(n_layers - 1)]
    qt = q.transpose(1, 2)

    def sdpa(k: torch.Tensor, v: torch.Tensor, _: object) -> torch.Tensor:
        return F.scaled_dot_product_attention(qt, k.transpose(1, 2), v.transpose(1, 2), is_causal=T > 1, enable_gqa=args.n_heads != args.n_kv_heads)

    ops = {
        "sdpa": sdpa,
        "dense": lambda k, v, _: dense_attention(q, k, v, plan),
        "sparse": lambda k, v, pooled: sparse_attention(q, k, v, plan, spec, pooled),
    }
    if compiled and phase == "prefill":
        ops["compiled"] = lambda k, v, pooled: compiled(q, k, v, plan, spec, pooled)
    calls = {name: lambda op=op: [op(*layer) for layer in layers] for name, op in ops.items()}
    row = {"phase": phase, "n_keys": n, "data": data}
    if phase == "prefill":
        row["distinct"] = count_distinct(q, k, plan, spec)
    repeats = args.repeats * (10 if phase == "decode" else 1)
    for name, (median, spread) in time_in_turn(calls, repeats, args.device, time.process_time if args.cpu_time else time.perf_counter).items():
        row |= {f"{name}_ms": round(median / n_layers, 3), f"{name}_spread_ms": round(spread / n_layers, 3)}
        row[f"{name}_mib"] = round(peak_extra_mib(calls[name], args.device), 1)
    return row


def measure(args: argparse.Namespace, compiled: Callable | None) -> list[dict]:
    rows = []
    for n in args.lengths:
        for phase, data in (("prefill", "random"), ("prefill", "smooth"), ("decode", "random")):
            row = measure_one(phase, n, data, args, compiled)
            rows.append(row)
            best = "compiled" if "compiled_ms" in row else "sparse"
            faster = min(row["sdpa_ms"], row["dense_ms"]) / row[f"{best}_ms"]
            print(
                f"| {phase} | {data} | {n} | {row.get('distinct', math.nan):.0f} | {row['sdpa_ms']:.2f} | {row['dense_ms']:.2f} "
                f"| {row['sparse_ms']:.2f} ± {row['sparse_spread_ms']:.2f} | {row.get('compiled_ms', math.nan):.2f} "
                f"| {row['sdpa_ms'] / row[f'{best}_ms']:.2f}x | {faster:.2f}x | {row['sdpa_mib']:.1f} "
                f"| {row['sparse_mib']:.1f} | {row.get('compiled_mib', math.nan):.1f} |",
                flush=True,
            )
    return rows


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else "none"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="1K and 2K only, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n-heads", type=int, default=8)
    parser.add_argument("--n-kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, help="CPU threads; 1 is the fairest on a machine that is not idle")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds, not wall time: for a busy machine, with --threads 1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="sparse prefill by compiled steps too, on a CPU")
    args = parser.parse_args(argv)
    if args.compiled and args.device != "cpu":
        raise ValueError("--compiled means something only on --device cpu")
    if args.cpu_time and (args.threads != 1 or args.device != "cpu"):
        raise ValueError("--cpu-time means something only with --threads 1 on --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = getattr(torch, args.dtype)
    args.lengths = args.lengths or (LENGTHS[:2] if args.quick else LENGTHS)
    args.repeats = 1 if args.quick else args.repeats
    compiled = compiled_prompt(args) if args.compiled else None
    worst = check(args, compiled)
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    print(f"equal to the reference within {worst:.1e}; {device}, {args.dtype}, {'CPU' if args.cpu_time else 'wall'} time")
    print(f"{args.n_heads} heads x {args.head_dim}, {args.n_kv_heads} KV heads, batch 1, {SparseSpec()}")
    print("| phase | data | keys | distinct | SDPA ms | dense ms | sparse ms | compiled ms | of SDPA | of best dense | SDPA MiB | sparse MiB | compiled MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    rows = measure(args, compiled)
    info = {"torch": torch.__version__, "commit": commit(), "device": device, "backend": get_backend(), "dtype": str(args.dtype), "cpu_time": args.cpu_time}
    info |= {"n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads, "head_dim": args.head_dim, "spec": vars(SparseSpec()), "max_error": worst}
    print(json.dumps({"benchmark": "attention", **info, "rows": rows}))
    return rows


if __name__ == "__main__":
    main()
