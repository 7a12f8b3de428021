"""Decoding far into a long context: python benchmarks/long_context.py [RUN] [--precision int4] [--lengths 2048 8192 32768]

Seconds per token and bytes of the cache, by route. The rotary frequencies are stretched by YaRN where a length exceeds the model's own. Contexts of up to
`--read` tokens are really read (their prefill is timed); in longer ones keys and values are random numbers, which cost as much to read. What is decoded is
checked where the context is real: compiled, it is what one pass gives.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

import dualbranch
from dualbranch.cache import KVCache
from dualbranch.config import RopeScaling
from dualbranch.data.corpora import load_corpus
from dualbranch.measure import about, spread
from dualbranch.model import DualBranchModel
from dualbranch.precision import quantize
from dualbranch.text_eval import read_text
from kernels import pool_keys

#: Largest difference between logits of decoding and of one pass, in their standard deviations: packed weights are multiplied in bf16 in a pass.
DECODE_ERROR = 0.5


def stretched(model: DualBranchModel, length: int) -> DualBranchModel:
    """`model` for contexts of `length`, on the same weights."""
    c = model.config
    if length <= c.max_seq_len:
        return model
    scaling = RopeScaling(kind="yarn", factor=length / c.max_seq_len, original_max_seq_len=c.max_seq_len)
    longer = DualBranchModel.without_weights(replace(c, max_seq_len=length, rope_scaling=scaling))
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.calibration = model.calibration
    return longer


def fill(cache: KVCache, n: int) -> None:
    """Random keys and values of `n` tokens. Mutates the cache."""
    for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        k[:, :n].normal_()
        v[:, :n].normal_()
        if i in cache.pooled:
            whole = n // cache.config.sparse.block_size
            cache.pooled[i][:, :whole] = pool_keys(k[:, :n], cache.config.sparse.block_size)[:, :whole]
    cache.n_cached.fill_(n)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/smollm2-135m")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--routes", nargs="+", default=["slow", "fast", "auto"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--read", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", metavar="FILE", help="what is read and decoded (default: Wikipedia articles that come by pip)")
    parser.add_argument("--eager", action="store_true", help="don't compile the decode step")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    loaded = dualbranch.load(args.run)
    longest = -(-(max(args.lengths) + args.steps) // 1024) * 1024
    model = quantize(stretched(loaded.model, longest), args.precision, loaded.tokenizer)
    if not args.eager and not model.compile_decode(build=True):
        raise SystemExit("decoding can't be compiled here; run with --eager")
    ids: list[int] = []
    for text in load_corpus("wikipedia", "test") if args.text is None else [read_text(args.text)]:
        ids += loaded.tokenizer.encode(text)
    tokens, rows, info = torch.tensor([ids]), [], about(model)
    title = f"{args.run}, {args.precision}, {info['device']}, {args.threads} threads"
    table = Table("context", "route", "slow", "prefill, s", "ms per token", "cache, MB", title=title)
    for n in args.lengths:
        real = n <= min(args.read, tokens.shape[1] - args.steps)
        for route in args.routes:
            cache = model.new_cache(1, n + args.steps)
            began = time.perf_counter()
            if real:
                model(tokens[:, :n], route, cache=cache, last_only=True)
            else:
                fill(cache, n)
            prefill = time.perf_counter() - began
            nexts, seconds = tokens[0, :args.steps] if not real else tokens[0, n : n + args.steps], []
            for repeat in range(args.repeats + 1):
                cache.truncate(n)
                began = time.perf_counter()
                out = [model(token.view(1, 1), route, cache=cache).logits[0, 0] for token in nexts]
                if repeat:
                    seconds.append((time.perf_counter() - began) / args.steps)
            if real and route != "auto":
                whole = model(tokens[:, : n + args.steps], route).logits[0, n:]
                error = float((torch.stack(out) - whole).abs().max() / whole.std())
                if error > DECODE_ERROR:
                    raise SystemExit(f"{n} tokens, route {route}: decoded logits differ from those of one pass by {error:.2g} standard deviations")
            ms, share = spread([1e3 * s for s in seconds]), float(cache.from_slow[0, n : n + args.steps].double().mean())
            row = {"context": n, "route": route, "slow_share": share, "prefill_s": prefill if real else None}
            rows.append(row | {"ms_per_token": ms, "cache_bytes": cache.n_bytes()})
            cells = (f"{prefill:.2f}" if real else "-", f"{ms['median']:.2f} ({ms['low']:.2f} to {ms['high']:.2f})", f"{cache.n_bytes() / 1e6:.0f}")
            table.add_row(f"{n:,}", route, f"{share:.2f}", *cells)
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "long_context", "run": args.run, "precision": args.precision, "rows": rows, **info}))
    return rows


if __name__ == "__main__":
    main()
