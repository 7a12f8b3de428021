"""Self-training: the teacher solves new problems, a verifier keeps the solutions that are right, and the student learns from those. `teacher.n_solutions`.

As in STaR (Zelikman et al. 2022), without its hints: what is kept is in the teacher's own words, and right. Each round of problems is a `.jsonl` file of
conversations in the run's folder `solutions/`, written whole and a function of the seed and its number: a run cut short goes on with the next round.
From there they are `data.solutions`. Problems come from the training split alone, and are none that the teacher was trained on.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from dualbranch.chat import render_prompt
from dualbranch.data.problem import Problem, verify
from dualbranch.distill import dist
from dualbranch.distill.config import RunConfig
from dualbranch.distill.self_text import fast_copy, round_file, rounds_to_write, write_round
from dualbranch.distill.stages import Log, assessment, source
from dualbranch.generate import generate_batch
from dualbranch.model import DualBranchModel
from dualbranch.modes import resolve
from dualbranch.sampling import SamplingParams
from dualbranch.tokenizer import TokenizerBase

#: Problems of a round, all sampled at once.
ROUND = 128
#: Draws of a problem for each that is wanted; those that training has seen are left out.
DRAWS = 50
#: How solutions are sampled: varied, and still mostly right.
TEMPERATURE, TOP_P = 0.8, 0.95


def with_solutions(config: RunConfig, folder: Path, teacher: DualBranchModel, tok: TokenizerBase, log: Log) -> RunConfig:
    """`config` with the teacher's verified solutions as its `data.solutions`, sampled into `folder` where that is not done yet. Collective.

    Raises ValueError where the teacher solved nothing.
    """
    if not config.teacher.n_solutions:
        return config
    target = folder / "solutions"
    if dist.rank() == 0:
        problems = new_problems(config, tok, folder)
        rounds = [problems[i : i + ROUND] for i in range(0, len(problems), ROUND)]
        todo = rounds_to_write(target, len(rounds))
        solver = fast_copy(teacher) if todo else None
        for i in todo:
            kept = solve(solver, tok, rounds[i], config.data.seq_len, config.seed * 1_000_003 + i, config.teacher.verify)
            right = sum(c["right"] for c in kept)
            log({"stage": "solutions", "step": i, "n_problems": len(rounds[i]), "kept": len(kept), "right": right, "keep_rate": right / len(rounds[i])})
            write_round(target, i, kept)
        if not any(round_file(target, i).stat().st_size for i in range(len(rounds))):
            raise ValueError(f"the teacher solved none of {len(problems)} problems; train it for longer (teacher.steps), or set teacher.n_solutions: 0")
    dist.barrier()
    return replace(config, data=replace(config.data, solutions=(str(target),)))


def new_problems(config: RunConfig, tok: TokenizerBase, folder: Path) -> list[Problem]:
    """`n_solutions` problems of the training split, at the levels that training ends with: none twice, and none whose numbers the teacher of the run in
    `folder` was trained on.

    Fewer where the tasks hardly have more. Raises ValueError where the teacher has seen them all.
    """
    seen = set()
    if config.teacher.checkpoint is None:
        seen = source(config, tok).keys_seen(config.teacher.steps, config.teacher.first_decision, assessment(folder / "teacher"))
    data, rng, found = source(config, tok, purpose=6), random.Random(f"solutions:{config.seed}"), {}
    for _ in range(DRAWS * config.teacher.n_solutions):
        problem = data.problem(rng)
        if problem.key not in seen:
            found.setdefault(problem.prompt, problem)
        if len(found) == config.teacher.n_solutions:
            break
    if not found:
        raise ValueError("the teacher was trained on every problem there is at these levels; move data.levels_end, add data.tasks, or lower teacher.steps")
    return list(found.values())


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
