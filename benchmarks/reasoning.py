"""Has a model learned to reason? Chicken-and-rabbit problems and two-digit additions, held out, English: with reasoning, without, within a budget.

    python benchmarks/reasoning.py runs/smollm2-reason/gate --n 200

Every line counts right answers, empty answers, reasoning markers where thinking is off and replies over their thinking budget. `phrasing`: templates that
training never shows, on held-out numbers too. Then the perplexity of plain text before and after (`--before`, `--wikitext`). A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time

import torch

from dualbranch import load
from dualbranch.data.problem import Problem, sample_problem
from dualbranch.evaluate import Result, evaluate
from dualbranch.modes import Mode, resolve
from dualbranch.sampling import SamplingParams
from dualbranch.text_eval import evaluate_texts, read_text
from kernels import has_bf16_units

TWO_DIGIT_SUM = re.compile(r"(?<!\d)\d\d \+ \d\d(?!\d)")
BUDGET = 64
#: Draws of a problem for each that is wanted.
DRAWS = 100


def chickens(rng: random.Random, shift: str | None) -> Problem:
    return sample_problem(rng, "chickens_rabbits", rng.choice(("easy", "medium")), "en", "test", shift)


def addition(rng: random.Random, shift: str | None) -> Problem:
    while True:
        problem = sample_problem(rng, "arithmetic", "easy", "en", "test", shift)
        if TWO_DIGIT_SUM.search(problem.prompt):
            return problem


TASKS = {"chicken-and-rabbit": chickens, "two-digit addition": addition}


def problems(name: str, shift: str | None, n: int) -> list[Problem]:
    """`n` problems of the test split, no prompt twice."""
    rng, found = random.Random(f"reasoning:{name}:{shift}"), {}
    for _ in range(DRAWS * n):
        problem = TASKS[name](rng, shift)
        found.setdefault(problem.prompt, problem)
        if len(found) == n:
            return list(found.values())
    raise SystemExit(f"--n is {n}, but after {DRAWS * n} draws there are only {len(found)} problems of {name} ({shift or 'no shift'}); lower it")


def modes(has_gate: bool) -> dict[str, Mode]:
    """Every way to answer that the model has."""
    ways = {"slow, reasoning": resolve("think"), "slow, direct": resolve("think", thinking="off"), "slow, budget": resolve("think", thinking_budget=BUDGET)}
    if has_gate:
        ways |= {"fast, reasoning": resolve("fast", thinking="on"), "fast, direct": resolve("fast"), "auto": resolve("auto"),
                 "auto, reasoning": resolve("auto", thinking="on")}  # fmt: skip
    return ways


def record(name: str, shift: str | None, way: str, r: Result, seconds: float) -> dict:
    replies = [a.generation for a in r.answers]
    over = None if r.mode.thinking_budget is None else sum(g.n_think > r.mode.thinking_budget for g in replies)
    s = r.overall
    leaked = None if r.leaked_share is None else round(r.leaked_share * s.n)
    counts = {"n": s.n, "right": sum(a.correct for a in r.answers), "empty": round(r.empty_share * s.n), "leaked": leaked, "over_budget": over}
    return {"task": name, "shift": shift, "way": way, **counts, "tokens": s.tokens, "slow_share": s.slow_share, "mflop": s.flops / 1e6, "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=200, help="problems of each kind")
    parser.add_argument("--ways", nargs="+", help="only these ways to answer")
    parser.add_argument("--shifts", nargs="+", default=["none", "phrasing"], choices=["none", "phrasing"])
    parser.add_argument("--before", help="the model that was taught: its perplexity is measured too")
    parser.add_argument("--wikitext", help="a WikiText file; without it no perplexity is measured")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of that file")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto", help="auto: bf16 where the machine has units for it")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16_units(torch.device("cpu")))
    dtype = torch.bfloat16 if bf16 else torch.float32
    loaded = load(args.model, dtype=dtype)
    found, all_modes = [], modes(loaded.model.gate is not None)
    if unknown := sorted(set(args.ways or ()) - set(all_modes)):
        raise ValueError(f"--ways names {unknown}; this model has {list(all_modes)}")
    for shift in (None if s == "none" else s for s in args.shifts):
        for name in TASKS:
            for way in args.ways or all_modes:
                started = time.perf_counter()
                r = evaluate(loaded.model, loaded.tokenizer, problems(name, shift, args.n), all_modes[way], SamplingParams(max_tokens=256), args.batch)
                found.append(record(name, shift, way, r, time.perf_counter() - started))
                print(" | ".join(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in found[-1].items()), flush=True)
    text = {}
    if args.wikitext:
        for which, path in (("after", args.model), ("before", args.before)):
            if path:
                m = loaded if which == "after" else load(path, dtype=dtype, dense=True)
                part = evaluate_texts(m.model, m.tokenizer, {"wikitext": [read_text(args.wikitext, wikitext=True)]}, (), 1024, args.max_tokens)["wikitext"]
                text[which] = {r["route"]: r["perplexity"] for r in part["routes"]}
                print(f"perplexity {which}: {text[which]}", flush=True)
    print(json.dumps({"model": args.model, "dtype": str(dtype), "torch": torch.__version__, "results": found, "perplexity": text}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
