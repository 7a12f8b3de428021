"""Several new tokens at once, compiled: python benchmarks/rows.py CHECKPOINT [--rows 1 2 8 32] [--new 2 8 16 32] [--context 256]

CHECKPOINT: compiled (`dualbranch compile`), packed (`dualbranch quantize`) or not. One token to each of so many rows, as a batch is decoded, and so many to
one row, as a short turn of a conversation is read, after `--context` random tokens. Each in two ways, which take turns within every repeat: one by one
through the compiled steps, layer by layer, and all in one pass, for which packed matrices are unpacked; `runner.few_tokens` says up to how many tokens
`dualbranch` takes the first way. Checked first: one by one, rows together give bit for bit the logits of each alone, and what one pass gives differs by
rounding (of keys and values to bf16, and of products where a CPU has units for bf16): `differ` is the largest difference, in standard deviations of logits.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from rich.console import Console
from rich.table import Table

import dualbranch
from dualbranch.measure import about, spread
from dualbranch.model import DualBranchModel

WAYS = ("one by one", "one pass")


class Step:
    """`tokens (B, T)` behind rows of a cache that hold the same prompts, again and again."""

    def __init__(self, model: DualBranchModel, route: str, prompts: torch.Tensor, tokens: torch.Tensor) -> None:
        self.model, self.route, self.tokens = model, route, tokens
        self.cache = model.new_cache(len(tokens), prompts.shape[1] + tokens.shape[1])
        for b, prompt in enumerate(prompts):
            model(prompt[None], route, cache=self.cache.rows(b, b + 1), last_only=True)
        self.n_cached = prompts.shape[1]

    def logits(self, way: str) -> torch.Tensor:
        """Of the last token of each row, `(B, V)`."""
        self.model.runner.few = self.model.runner.few_of_rows = self.tokens.numel() if way == WAYS[0] else 0
        self.cache.truncate(self.n_cached)
        return self.model(self.tokens, self.route, cache=self.cache, last_only=True).logits[:, 0]

    def seconds(self, way: str) -> float:
        start = time.perf_counter()
        self.logits(way)
        return time.perf_counter() - start

    def check(self) -> float:
        """How far the two ways differ. Raises SystemExit where rows together are not what each is alone, or the ways differ by more than rounding."""
        one_pass, together = self.logits(WAYS[1]), self.logits(WAYS[0])
        self.cache.truncate(self.n_cached)
        rows = [self.cache.rows(b, b + 1) for b in range(len(self.tokens))]
        alone = torch.cat([self.model(self.tokens[b : b + 1], self.route, cache=row, last_only=True).logits[:, 0] for b, row in enumerate(rows)])
        differ = float((together - one_pass).abs().max() / one_pass.std())
        if not torch.equal(together, alone) or differ > 0.25:
            raise SystemExit(f"{self.route}, {len(rows)} rows: not what each is alone, or {differ:.2f} standard deviations off one pass; nothing was timed")
        return differ


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--new", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--routes", nargs="+", default=["slow", "fast"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    if min([*args.rows, *args.new, args.context, args.repeats]) < 1:
        parser.error("--rows, --new, --context and --repeats must be at least 1")
    model = dualbranch.load(args.checkpoint).model
    if not model.compile_decode():
        parser.error(f"{args.checkpoint} was not compiled here: dualbranch compile")
    if args.context + max([1, *args.new]) > model.config.max_seq_len:
        parser.error(f"--context and --new must fit the model's {model.config.max_seq_len} tokens")
    dualbranch.keep_freed_memory()
    generator, results = torch.Generator().manual_seed(0), []
    for route in args.routes:
        for n_rows, n_new in [*((b, 1) for b in args.rows), *((1, t) for t in args.new)]:
            prompts, tokens = (torch.randint(model.config.vocab_size, (n_rows, n), generator=generator) for n in (args.context, n_new))
            step, times = Step(model, route, prompts, tokens), {way: [] for way in WAYS}
            differ = step.check()
            for repeat in range(args.repeats + 1):  # the first is for warming up
                for way in WAYS:
                    seconds = step.seconds(way)
                    times[way] += [seconds] if repeat else []
            ms = {way: {k: 1e3 * s for k, s in spread(times[way]).items()} for way in WAYS}
            of_one_pass = spread([a / b for a, b in zip(*times.values(), strict=True)])
            results.append({"route": route, "rows": n_rows, "new": n_new, "ms": ms, "of_one_pass": of_one_pass, "differ": differ})
    table = Table("route", "rows", "new tokens of each", *(f"{way}, ms (quartiles)" for way in WAYS), "of one pass", "tokens/s", "differ")
    for r in results:
        ms = [r["ms"][way] for way in WAYS]
        times = (f"{m['median']:.1f} ({m['low']:.1f} to {m['high']:.1f})" for m in ms)
        rate = f"{1e3 * r['rows'] * r['new'] / ms[0]['median']:.0f}"
        table.add_row(r["route"], str(r["rows"]), str(r["new"]), *times, f"{r['of_one_pass']['median']:.2f}", rate, f"{r['differ']:.3f}")
    Console(stderr=True, width=140).print(table)
    record = {"benchmark": "rows", "checkpoint": args.checkpoint, "context": args.context, **about(model), "results": results}
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
