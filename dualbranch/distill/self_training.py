"""Self-training: the teacher solves new problems, a verifier keeps the solutions that are right, and the student learns from those. `teacher.n_solutions`.

As in STaR (Zelikman et al. 2022), without its hints: what is kept is in the teacher's own words, and right. Each round of problems is a `.jsonl` file of
conversations in the run's folder `solutions/`, written whole and a function of the seed and its number: a run cut short goes on with the next round.
From there they are `data.solutions`. Problems come from the training split alone.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from dualbranch.chat import render_prompt
from dualbranch.checkpoint import write_text
from dualbranch.data.problem import Problem, verify
from dualbranch.distill import dist
from dualbranch.distill.config import RunConfig
from dualbranch.distill.self_text import fast_copy
from dualbranch.distill.stages import Log, source
from dualbranch.generate import generate_batch
from dualbranch.model import DualBranchModel
from dualbranch.modes import resolve
from dualbranch.sampling import SamplingParams
from dualbranch.tokenizer import TokenizerBase

#: Problems of a round, all sampled at once.
ROUND = 128
#: How solutions are sampled: varied, and still mostly right.
TEMPERATURE, TOP_P = 0.8, 0.95


def with_solutions(config: RunConfig, folder: Path, teacher: DualBranchModel, tok: TokenizerBase, log: Log) -> RunConfig:
    """`config` with the teacher's verified solutions as its `data.solutions`, sampled into `folder` where that is not done yet. Collective.

    Raises ValueError where the teacher solved nothing.
    """
    n = config.teacher.n_solutions
    if not n:
        return config
    target = folder / "solutions"
    rounds = [range(i, min(n, i + ROUND)) for i in range(0, n, ROUND)]
    if dist.rank() == 0:
        todo = [i for i in range(len(rounds)) if not (target / f"{i:05d}.jsonl").exists()]
        solver = fast_copy(teacher) if todo else None
        for i in todo:
            problems = [new_problem(config, tok, j) for j in rounds[i]]
            kept = solve(solver, tok, problems, config.data.seq_len, config.seed * 1_000_003 + i, config.teacher.verify)
            write_text(target / f"{i:05d}.jsonl", "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in kept))
            log({"stage": "solutions", "step": i, "n_problems": len(problems), "kept": len(kept), "right": sum(c["right"] for c in kept)})
        if not any((target / f"{i:05d}.jsonl").stat().st_size for i in range(len(rounds))):
            raise ValueError(f"the teacher solved none of {n} problems; train it for longer (teacher.steps), or set teacher.n_solutions: 0")
    dist.barrier()
    return replace(config, data=replace(config.data, solutions=(str(target),)))


def new_problem(config: RunConfig, tok: TokenizerBase, i: int) -> Problem:
    """The i-th problem to be solved, at the levels that training ends with."""
    return source(config, tok, purpose=6).problem(random.Random(f"solutions:{config.seed}:{i}"))


def solve(model: DualBranchModel, tok: TokenizerBase, problems: list[Problem], max_tokens: int, seed: int, verified: bool = True) -> list[dict]:
    """Conversations, one per problem solved with reasoning on route slow; only those with a right answer, unless `verified` is False."""
    prompts = [render_prompt(tok, [{"role": "user", "content": p.prompt}]) for p in problems]
    params = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed)
    found = []
    for problem, reply in zip(problems, generate_batch(model, tok, prompts, resolve("think"), params), strict=True):
        right = verify(problem, reply.answer)
        if right or not verified:
            answer = {"role": "assistant", "reasoning": reply.reasoning, "content": reply.answer, "ids": reply.ids}
            found.append({"messages": [{"role": "user", "content": problem.prompt}, answer], "key": problem.key, "right": right})
    return found
