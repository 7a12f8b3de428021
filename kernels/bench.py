"""Times the Triton kernels on a CUDA device, after checking there that they are right.

    python -m kernels.bench [--lengths 8192 65536] [--quick] [--dtype bfloat16] [--out FILE]

1. Parity (`bench_parity.py`): values and gradients of every op against the reference. An op that fails is reported and not timed.
2. Ceilings of the device: copy bandwidth (bytes read plus bytes written) and a bf16 matrix product.
3. Every entry of `bench_entries.py`: median of many runs with quartiles, caches flushed before each run, tensors and plan made before.
   "graph" entries replay a CUDA graph, because launching several small kernels from Python takes longer than they run.
Prints a table, then one JSON line; --out writes both, and after every entry, so that an interrupted run leaves what it had. Exits 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import kernels
from kernels import SparseSpec, bench_parity
from kernels.bench_entries import Config, Entry, decode, distinct_share, flex, make, prefill

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
HEADS = [(8, 4, 64), (8, 2, 64), (8, 2, 128)]  # (H, Hk, D); the last at WIDE_LENGTHS only
WIDE_LENGTHS = (8192, 65536)
FLEX_LENGTHS = (8192, 65536)
DECODE_BATCHES = (1, 16)
MAX_BATCHED_KEYS = 1 << 20
WARMUP_MS, MEASURE_MS = 10, 40


@dataclass
class Row:
    phase: str
    name: str
    inputs: str
    batch: int
    n_keys: int
    H: int
    Hk: int
    D: int
    ms: float | None = None
    low_ms: float | None = None  # quartiles
    high_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    of_ceiling: float | None = None  # the larger of the two shares of the ceilings
    graph: bool = False
    note: str = ""


def bench_ms(call: Callable[[], object], graph: bool) -> tuple[tuple[float, float, float], bool]:
    """(median, lower quartile, upper quartile) in ms, and whether a CUDA graph was replayed. A call that can't be captured runs eagerly."""
    from triton.testing import do_bench

    for _ in range(2):  # compiles, fills the plan's caches
        call()
    torch.cuda.synchronize()
    run = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                call()
            run = captured.replay
        except RuntimeError as error:
            graph = False
            print(f"  (no CUDA graph: {' '.join(str(error).split())[:120]})", flush=True)
            torch.cuda.synchronize()
    median, low, high = do_bench(run, warmup=WARMUP_MS, rep=MEASURE_MS, quantiles=[0.5, 0.25, 0.75])
    return (median, low, high), graph


def ceilings() -> dict[str, float]:
    """GB/s of a large copy, reads and writes both counted, and TFLOP/s of a large bf16 product."""
    x = torch.empty(1 << 29, dtype=torch.int8, device="cuda").fill_(1)
    y = torch.empty_like(x)
    (copy_ms, _, _), _ = bench_ms(lambda: y.copy_(x), graph=False)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (matmul_ms, _, _), _ = bench_ms(lambda: a @ b, graph=False)
    return {"copy_gbps": 2 * x.numel() / copy_ms / 1e6, "matmul_tflops": 2 * 8192**3 / matmul_ms / 1e9}


def measure(entry: Entry, c: Config, limits: dict[str, float], failed: list[str]) -> Row:
    row = Row(entry.phase, entry.name, entry.inputs, entry.batch, c.n, c.H, c.Hk, c.D)
    if entry.needs and any(op.startswith(entry.needs) for op in failed):
        row.note = "not timed: parity failed"
        return row
    try:
        (row.ms, row.low_ms, row.high_ms), row.graph = bench_ms(entry.call, entry.graph)
    except Exception as error:  # one failing entry (a baseline without a kernel for this GPU, memory) must not end the run
        row.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return row
    row.tflops, row.gbps = entry.flops / row.ms / 1e9, entry.bytes / row.ms / 1e6
    row.of_ceiling = max(row.tflops / limits["matmul_tflops"], row.gbps / limits["copy_gbps"])
    return row


def groups(args: argparse.Namespace) -> Iterator[tuple[Config, str, Callable[[], Iterator[Entry]]]]:
    """(config, title, entries), most wanted first: should time run out, the last are missing."""
    spec, dtype = SparseSpec(), getattr(torch, args.dtype)
    wanted = sorted(args.lengths, key=lambda n: (n not in WIDE_LENGTHS, n))
    for H, Hk, D in HEADS:
        for n in [n for n in wanted if n in WIDE_LENGTHS] if (H, Hk, D) == HEADS[-1] else wanted:
            c = Config(n, H, Hk, D, dtype, spec)
            title = f"n {n}, {H} heads x {D}, {Hk} KV heads"
            yield c, f"prefill, {title}", lambda c=c: prefill(c, "cuda")
            for batch in DECODE_BATCHES:
                if batch * n <= MAX_BATCHED_KEYS:
                    yield c, f"decode, batch {batch}, {title}", lambda c=c, batch=batch: decode(c, "cuda", batch)
            if n == 32768:
                yield c, f"verify 8 draft tokens, {title}", lambda c=c: decode(c, "cuda", 1, T=8)
            if n in FLEX_LENGTHS and (H, Hk, D) == HEADS[0] and not args.no_flex:
                yield c, f"FlexAttention, {title}", lambda c=c: flex(c, "cuda")


HEADER = "| what | inputs | batch | keys | heads | ms (quartiles) | TFLOP/s | GB/s | of ceiling | |\n|---|---|---|---|---|---|---|---|---|---|"


def table_row(r: Row) -> str:
    head = f"| {r.phase}: {r.name} | {r.inputs} | {r.batch} | {r.n_keys} | {r.H}/{r.Hk} x {r.D} "
    if r.ms is None:
        return f"{head}| | | | | {r.note} |"
    numbers = f"{r.ms:.4f} ({r.low_ms:.4f} to {r.high_ms:.4f}) | {r.tflops:.1f} | {r.gbps:.0f} | {100 * r.of_ceiling:.0f} %"
    return f"{head}| {numbers} | {'graph' if r.graph else 'eager'}{'; ' + r.note if r.note else ''} |"


def speedups(rows: list[Row]) -> list[str]:
    """Sparse against the fastest dense of the same shape, ours included."""
    lines = ["| phase | inputs | batch | keys | heads | sparse | ms | fastest dense | ms | times faster |", "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r.ms is None or not r.name.startswith("sparse"):
            continue
        kind = "forward + backward" if "backward" in r.name else "forward" if r.phase == "prefill" else r.name.split()[-1]
        same = [x for x in rows if x.ms and (x.phase, x.batch, x.n_keys, x.H, x.Hk, x.D) == (r.phase, r.batch, r.n_keys, r.H, r.Hk, r.D)]
        # decode: dense over the same store, or SDPA, which needs contiguous keys
        dense = [x for x in same if x.name.startswith(("dense", "SDPA")) and (x.name.endswith(kind) or (r.phase != "prefill" and x.name.startswith("SDPA")))]
        dense = [x for x in dense if r.phase != "prefill" or ("backward" in x.name) == ("backward" in r.name)]
        if dense:
            best = min(dense, key=lambda x: x.ms)
            shape = f"{r.batch} | {r.n_keys} | {r.H}/{r.Hk} x {r.D}"
            lines.append(f"| {r.phase} | {r.inputs} | {shape} | {r.name} | {r.ms:.4f} | {best.name} | {best.ms:.4f} | {best.ms / r.ms:.2f} |")
    return lines


def overlap(args: argparse.Namespace) -> dict[str, float]:
    """How alike neighbours' choices are in the two kinds of input, at the longest length up to 16K."""
    n = max([n for n in args.lengths if n <= 16384], default=min(args.lengths))
    H, Hk, D = HEADS[0]
    c = Config(n, H, Hk, D, getattr(torch, args.dtype), SparseSpec())
    plan = kernels.AttentionPlan(torch.arange(n, device="cuda")[None], n)
    shares = {}
    for kind in ("random", "correlated"):
        q, k, _ = make(1, n, c, "cuda", kind)
        shares[kind] = distinct_share(kernels.select_blocks(q, kernels.pool_keys(k, c.spec.block_size), plan, c.spec))
    return shares


def environment() -> dict[str, str]:
    import triton

    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = done.stdout.strip() if done.returncode == 0 else os.environ.get("COMMIT", "unknown")
    gpu = torch.cuda.get_device_properties(0)
    device = {"device": gpu.name, "sms": gpu.multi_processor_count, "memory_gib": round(gpu.total_memory / 2**30, 1)}
    return {
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **device,
    }


def report(info: dict, rows: list[Row]) -> str:
    limits = info["ceilings"]
    lines = [
        f"{info['device']}, torch {info['torch']}, Triton {info['triton']}, CUDA {info['cuda']}, commit {info['commit']}, {info['date']}.",
        f"Measured ceilings: copy {limits['copy_gbps']:.0f} GB/s (read plus write), bf16 matrix product {limits['matmul_tflops']:.0f} TFLOP/s.",
        f"Rule: {info['spec']}. Dtype {info['dtype']}. Parity: {info['n_parity']} findings, {len(info['parity_failed'])} failed.",
        f"Distinct blocks per 32 neighbouring queries, of all chosen: {info['overlap']}.",
        "",
        HEADER,
        *map(table_row, rows),
        "",
        *speedups(rows),
        "",
        json.dumps({"benchmark": "kernels", **info, "rows": [asdict(r) for r in rows]}),
    ]
    return "\n".join(lines) + "\n"


def save(path: str | None, text: str) -> None:
    if path:
        partial = Path(f"{path}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def run_parity() -> list[bench_parity.Finding]:
    start, findings = time.perf_counter(), []
    for finding in bench_parity.check_all("cuda"):
        findings.append(finding)
        if not finding.ok:
            print(f"PARITY FAILED {finding.op}, {finding.shape}: error {finding.error:.2e}, allowed {finding.allowed:.2e}", flush=True)
    worst = max((f.error / f.allowed for f in findings if f.ok), default=0.0)
    n_failed = sum(not f.ok for f in findings)
    print(f"parity: {len(findings)} comparisons, {n_failed} failed, the others use at most {100 * worst:.0f} % of what is allowed", end="")
    print(f" ({time.perf_counter() - start:.0f} s)", flush=True)
    return findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", help=f"keys (default: {' '.join(map(str, LENGTHS))})")
    parser.add_argument("--quick", action="store_true", help="8K and 64K only, no FlexAttention")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: compiling it takes most of a minute")
    parser.add_argument("--seconds", type=float, default=170, help="start no new group of entries after this long (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the report there too")
    args = parser.parse_args(argv)
    args.no_flex |= args.quick
    args.lengths = args.lengths or (list(WIDE_LENGTHS) if args.quick else LENGTHS)
    if any(n < 64 or n % bench_parity.PAGE_SIZE for n in args.lengths):
        parser.error(f"--lengths must be multiples of {bench_parity.PAGE_SIZE} (whole pages), got {args.lengths}")
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to time. The proof without one: pytest tests/test_*triton*.py, python -m kernels.aot", file=sys.stderr)
        return 2
    kernels.set_backend("triton")
    start = time.perf_counter()
    findings = run_parity()
    failed = sorted({f.op for f in findings if not f.ok})
    info = {**environment(), "date": time.strftime("%Y-%m-%d"), "dtype": args.dtype, "spec": vars(SparseSpec())}
    info |= {"n_parity": len(findings), "parity_failed": failed, "overlap": {}, "left_out": []}
    limits = info["ceilings"] = ceilings()
    print(f"{info['device']}: copy {limits['copy_gbps']:.0f} GB/s, bf16 product {limits['matmul_tflops']:.0f} TFLOP/s", flush=True)
    if "selection" not in failed and "pooled keys" not in failed:
        info["overlap"] = {kind: round(share, 3) for kind, share in overlap(args).items()}
        print(f"distinct blocks per 32 neighbouring queries, of all chosen: {info['overlap']}", flush=True)
    rows: list[Row] = []
    for c, title, entries in groups(args):
        if time.perf_counter() - start > args.seconds:
            info["left_out"].append(title)
            continue
        print(f"[{time.perf_counter() - start:4.0f} s] {title}", flush=True)
        try:
            for entry in entries():
                rows.append(measure(entry, c, limits, failed))
                print(table_row(rows[-1]), flush=True)
        except Exception as error:  # making the inputs failed (memory, a compiler); the next group may work
            rows.append(Row(title, "inputs", "", 0, c.n, c.H, c.Hk, c.D, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"))
            print(table_row(rows[-1]), flush=True)
        save(args.out, report(info, rows))
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device is in error, nothing more can run: {' '.join(str(error).split())[:300]}", flush=True)
            break
    if info["left_out"]:
        print(f"left out after {args.seconds:.0f} s: {len(info['left_out'])} groups, from: {info['left_out'][0]}")
    print(report(info, rows))
    save(args.out, report(info, rows))
    return 1 if failed or any(r.note.startswith("failed") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
