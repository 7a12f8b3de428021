"""How close are a converted model's replies to those of the model it was made from? python benchmarks/replies.py RUN [--ways fast auto:0.3] [--show]

Greedy replies to 24 short questions, per way to answer: a mode, or auto at a budget. `agreement`: the share of a reply's tokens that the slow branch would
have chosen at that place, `surprise`: their mean cost to it in nats (of its own replies: what greedy text costs), `loops`: the share of 4-token runs that
stood in the reply before, `ended`: replies that end by themselves within `--max-tokens`. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from dualbranch import LoadedModel, load
from dualbranch.generate import Generation, generate_batch, prompt_ids
from dualbranch.modes import Mode, fitted, resolve
from dualbranch.sampling import SamplingParams

QUESTIONS = (
    "What is the capital of France?", "List three fruits.", "Who wrote Romeo and Juliet?", "What is photosynthesis?", "How many days are in a week?",
    "Explain in two sentences why the sky is blue.", "Write a short note thanking a colleague for help.", "Give me a tip for sleeping better.",
    "What is the largest ocean?", "Describe a sunset in one sentence.", "Name two programming languages and say what each is good for.",
    "How do I boil an egg?", "What is the opposite of hot?", "Suggest a name for a black cat.", "What does a doctor do?", "Why do leaves fall in autumn?",
    "Write a slogan for a bakery.", "What is the difference between a lake and a river?", "Who was the first person on the moon?",
    "Give three reasons to learn a language.", "What do bees make?", "Write one sentence about a dog and a ball.", "How can I save water at home?",
    "What is an adjective?",
)  # fmt: skip
WAYS = ("think", "auto:0.5", "auto:0.3", "fast")
RUN = 4


def mode_of(way: str, loaded: LoadedModel) -> Mode:
    """`"fast"`, or `"auto:0.3"`: auto at a budget."""
    name, _, budget = way.partition(":")
    return fitted(resolve(name, budget=float(budget) if budget else None), loaded.tokenizer)


def loops(ids: list[int]) -> float:
    """Share of the runs of RUN tokens that stood in `ids` before."""
    runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def judged(loaded: LoadedModel, prompt: list[int], reply: Generation) -> torch.Tensor:
    """`(2, n)` of a reply's n tokens: would the slow branch have chosen it, and what it costs that branch, nats."""
    ids = torch.tensor([prompt + reply.ids])
    logp = loaded.model(ids[:, :-1], "slow").logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    chosen = ids[0, len(prompt) :]
    return torch.stack([(logp.argmax(-1) == chosen).float(), -logp.gather(1, chosen[:, None])[:, 0]])


def measured(loaded: LoadedModel, way: str, mode: Mode, prompts: list[list[int]], max_tokens: int) -> tuple[dict, list[Generation]]:
    replies = generate_batch(loaded.model, loaded.tokenizer, prompts, mode, SamplingParams(max_tokens=max_tokens))
    agreement, surprise = torch.cat([judged(loaded, p, r) for p, r in zip(prompts, replies, strict=True)], 1).mean(1).tolist()
    new = [u for p, r in zip(prompts, replies, strict=True) for u in r.use_slow[len(p) :]]
    row = {
        "way": way, "agreement": agreement, "surprise": surprise, "loops": sum(loops(r.ids) for r in replies) / len(replies),
        "ended": sum(r.finish_reason == "stop" for r in replies) / len(replies), "tokens": sum(len(r.ids) for r in replies) / len(replies),
        "slow_share": sum(new) / max(len(new), 1),
    }  # fmt: skip
    return row, replies


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="modes, or auto:BUDGET")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--show", action="store_true", help="print the replies too")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        loaded = load(args.model)
        modes = {way: mode_of(way, loaded) for way in args.ways}
    except ValueError as error:
        parser.error(str(error))
    prompts = [prompt_ids(loaded.tokenizer, question) for question in QUESTIONS]
    console, rows = Console(), []
    for way, mode in modes.items():
        row, replies = measured(loaded, way, mode, prompts, args.max_tokens)
        rows.append(row)
        if args.show:
            for question, reply in zip(QUESTIONS, replies, strict=True):
                console.print(f"[{way}] {question} | {' / '.join(reply.answer.splitlines())}", markup=False, highlight=False)
    table = Table("way", "agreement", "surprise (nats)", "loops", "ended", "tokens", "slow tokens")
    for row in rows:
        table.add_row(row["way"], f"{row['agreement']:.1%}", f"{row['surprise']:.2f}", f"{row['loops']:.1%}", f"{row['ended']:.0%}", f"{row['tokens']:.0f}",
                      f"{row['slow_share']:.0%}")  # fmt: skip
    console.print(table)
    print(json.dumps({"model": args.model, "torch": torch.__version__, "max_tokens": args.max_tokens, "ways": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
