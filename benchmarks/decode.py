"""Seconds and FLOPs of decoding, per mode: python benchmarks/decode.py [RUN] [--batch 1 128] [--context 100 400] [--cpu-time --threads 1]

Checked first, for each mode: tokens fed one by one to a ragged batch give the logits of one pass over each row alone. Then the modes
take turns within every repeat, all fed the same held-out text, `--steps` tokens to each row of a cache that holds about `--context` (rows
differ by up to 30 %); one warm-up repeat. `auto` at budget b: the gate runs, and the threshold is the one that sends exactly a share b of the
timed tokens slow. `ops`: operators dispatched by one step of the model. `loop`: choosing tokens and the bookkeeping around a step, not in it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dualbranch
from dualbranch.chat import render_example
from dualbranch.data.problem import LANGS, LEVELS, sample_problem
from dualbranch.data.tasks import TASKS
from dualbranch.generate import choose_tokens, start
from dualbranch.measure import about, spread
from dualbranch.model import DualBranchModel
from dualbranch.modes import resolve
from dualbranch.sampling import GREEDY

MODES = {"think": ("slow", None), "fast": ("fast", None), "auto 0.3": ("auto", 0.3), "auto 0.5": ("auto", 0.5)}


def text(loaded, n_rows: int, n_tokens: int) -> torch.Tensor:
    """`(n_rows, n_tokens)` ids: test problems with their reasoning, one after the other."""
    rng, rows = random.Random(0), []
    for _ in range(n_rows):
        ids: list[int] = []
        while len(ids) < n_tokens:
            problem = sample_problem(rng, rng.choice(list(TASKS)), rng.choice(LEVELS), rng.choice(LANGS), "test", None)
            ids += render_example(loaded.tokenizer, problem, thinking=True)[0]
        rows.append(ids[:n_tokens])
    return torch.tensor(rows)


class Run:
    """One mode over one batch: a filled cache, and `decode`, which feeds the next tokens and forgets them again."""

    def __init__(self, model: DualBranchModel, mode: str, tokens: torch.Tensor, lengths: torch.Tensor, n_steps: int) -> None:
        self.model, self.lengths, self.n_steps = model, lengths, n_steps
        self.route, budget = MODES[mode]
        where = torch.arange(n_steps) + lengths[:, None]
        self.columns = tokens.gather(1, where)  # (B, n_steps) what each row is fed
        self.threshold = None
        if budget is not None:
            g = model(tokens, "auto", threshold=0.5).g.gather(1, where)  # the gate reads the stem: its values do not depend on routes
            self.threshold = float(g.flatten().quantile(budget))
        self.cache = model.new_cache(len(tokens), tokens.shape[1])
        self.step(tokens[:, : int(lengths.max())], lengths=lengths)

    def step(self, tokens: torch.Tensor, **more) -> dualbranch.model.ModelOutput:
        return self.model(tokens, self.route, cache=self.cache, threshold=self.threshold, last_only=True, **more)

    def decode(self) -> list[dualbranch.model.ModelOutput]:
        out = [self.step(self.columns[:, i : i + 1]) for i in range(self.n_steps)]
        where = self.lengths[:, None] + torch.arange(self.n_steps)
        self.slow_share = self.cache.from_slow.gather(1, where).float().mean().item()
        self.cache.truncate(self.lengths)
        return out

    def flops(self) -> float:
        """Per token, at the middle of what is decoded."""
        return self.model.cost(self.slow_share, int(self.lengths.double().mean()) + self.n_steps // 2).flops


class Operators(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def make_lengths(n_rows: int, context: int) -> torch.Tensor:
    return torch.linspace(context, 0.7 * context, n_rows).long()


def check(model: DualBranchModel, tokens: torch.Tensor, context: int, n_steps: int) -> float:
    """Largest difference between logits of decoding a ragged batch and of one pass over each row alone; raises if it is more than rounding."""
    worst, lengths = 0.0, make_lengths(len(tokens), context)
    for mode in MODES:
        run = Run(model, mode, tokens, lengths, n_steps)
        logits = torch.cat([out.logits for out in run.decode()], 1)
        for b, n in enumerate(lengths.tolist()):
            alone = model(tokens[b : b + 1, : n + n_steps], run.route, threshold=run.threshold).logits[0, n:]
            worst = max(worst, (logits[b] - alone).abs().max().item())
    if worst > 1e-3:
        raise SystemExit(f"decoding differs from a pass over the whole by {worst:.1e}; nothing was timed")
    return worst


def loop_seconds(loaded, n_rows: int, clock) -> float:
    """Seconds per step spent on choosing tokens and on the controllers, for rows in the middle of an answer."""
    model, mode, seconds = loaded.model, resolve("think"), []
    sequences = start(model, loaded.tokenizer, [[loaded.tokenizer.bos_id]] * n_rows, mode, GREEDY)
    logits = torch.randn(n_rows, model.config.vocab_size)
    banned = sequences[0].controller.rules.banned
    for _ in range(20):
        began = clock()
        for s, token in zip(sequences, choose_tokens(logits, sequences, banned, GREEDY), strict=True):
            s.controller.advance(token)
        seconds.append(clock() - began)
    return statistics.median(seconds)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--context", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds, not wall time: for a busy machine, with --threads 1")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_time and args.threads != 1:
        raise ValueError("--cpu-time means something only with --threads 1")
    clock = time.process_time if args.cpu_time else time.perf_counter
    loaded = dualbranch.load(args.run)
    model = loaded.model
    tokens = text(loaded, max(args.batch), max(args.context) + args.steps)
    worst = max(check(model, tokens[:4], context, args.steps) for context in args.context)
    info = about(model)
    print(f"decoding equals one pass within {worst:.1e}; {info['device']}, {info['threads']} threads, {'CPU' if args.cpu_time else 'wall'} time")
    print("| batch | context | mode | slow | ms per step | of think | FLOPs of think | ops |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for batch in args.batch:
        for context in args.context:
            part = tokens[:batch, : context + args.steps]
            runs = {mode: Run(model, mode, part, make_lengths(batch, context), args.steps) for mode in MODES}
            seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
            for repeat in range(args.repeats + 1):
                for mode, run in runs.items():
                    began = clock()
                    run.decode()
                    if repeat:
                        seconds[mode].append((clock() - began) / args.steps)
            for mode, run in runs.items():
                with Operators() as operators:
                    run.step(run.columns[:, :1])
                ms, ratio = spread([1e3 * s for s in seconds[mode]]), spread([a / b for a, b in zip(seconds[mode], seconds["think"], strict=True)])
                row = {"batch": batch, "context": context, "mode": mode, "slow_share": run.slow_share, "ms_per_step": ms, "of_think": ratio}
                row |= {"flops_of_think": run.flops() / runs["think"].flops(), "ops": operators.n}
                rows.append(row)
                print(
                    f"| {batch} | {context} | {mode} | {run.slow_share:.2f} | {ms['median']:.2f} ({ms['low']:.2f} to {ms['high']:.2f}) "
                    f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) | {row['flops_of_think']:.2f} | {operators.n} |",
                    flush=True,
                )
    loops = {batch: 1e3 * loop_seconds(loaded, batch, clock) for batch in args.batch}
    print("loop: " + ", ".join(f"{ms:.2f} ms a step at batch {batch}" for batch, ms in loops.items()))
    print(json.dumps({"benchmark": "decode", "run": args.run, "cpu_time": args.cpu_time, "max_error": worst, "loop_ms": loops, "rows": rows, **info}))
    return rows


if __name__ == "__main__":
    main()
