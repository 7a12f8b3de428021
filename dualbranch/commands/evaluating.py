"""`dualbranch eval MODEL --on text FILE | corpus NAME | recall | tasks`: what each route and budget gives, and what it costs."""

from __future__ import annotations

import argparse
import json
import sys

from dualbranch.checkpoint import LoadedModel, load
from dualbranch.cli import add_model
from dualbranch.memory import keep_freed_memory

#: Settings that only some kinds read, as they are where nothing is given; and which kind reads which.
DEFAULTS = {"wikitext": False, "last": 1.0, "window": None, "max_tokens": None, "split": "test", "n_problems": 24, "distances": None}
READ = {
    "text": ("wikitext", "last", "window", "max_tokens"),
    "corpus": ("window", "max_tokens", "split"),
    "recall": ("wikitext", "last", "split", "n_problems", "distances"),
    "tasks": ("max_tokens", "n_problems"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--on", nargs="+", required=True, metavar="WHAT", help="text FILE..., corpus NAME..., recall [CORPUS or FILE...], or tasks [NAME...]")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.3, 0.5], metavar="B", help="allowed shares of slow tokens (default: 0.1 0.3 0.5)")
    parser.add_argument("--wikitext", action="store_true", default=None, help="undo WikiText's token spacing ( @-@ , space before punctuation) first")
    parser.add_argument("--last", type=float, metavar="SHARE", help="only the last share of each file's lines, e.g. 0.2")
    parser.add_argument("--window", type=int, metavar="N", help="tokens of text read at once (default: 1024, or what the model's context holds)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of each text, spread evenly over it (default: all of it); of a reply (default: 448)")
    parser.add_argument("--split", choices=("train", "valid", "test"), help="of a corpus (default: test)")
    parser.add_argument("--n-problems", type=int, metavar="N", help="per task, or of recall per distance (default: 24)")
    what = "of recall: tokens between what is said and when it is asked for (default: 256 1024 2048 4096, those that fit the context)"
    parser.add_argument("--distances", type=int, nargs="+", metavar="N", help=what)
    parser.add_argument("--precision", metavar="P", help="round the weights first: bf16, int8, int4, or by part (default: as stored)")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")


def run(args: argparse.Namespace) -> int:
    kind, *names = args.on
    if kind not in READ or (kind in ("text", "corpus") and not names):
        raise ValueError(f"--on is {' '.join(args.on)!r}; needed text FILE..., corpus NAME..., recall [CORPUS or FILE...], or tasks [NAME...]")
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if unread := sorted(set(given) - set(READ[kind])):
        names = ", ".join("--" + name.replace("_", "-") for name in unread)
        raise ValueError(f"{names}: says nothing about {kind}; leave it out")
    if small := [name for name in ("window", "max_tokens", "n_problems") if given.get(name, 1) < 1]:
        raise ValueError(f"--{small[0].replace('_', '-')} is {given[small[0]]}; it must be at least 1")
    vars(args).update(DEFAULTS | given)
    found = on_tasks(args, names) if kind == "tasks" else on_recall(args, names) if kind == "recall" else on_text(args, kind, names)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def load_rounded(args: argparse.Namespace) -> LoadedModel:
    """The model, at the precision asked for."""
    from dualbranch.precision import normal_form, quantize

    loaded = load(args.model, accept_terms=args.accept_gemma_terms)
    if args.precision is not None and normal_form(args.precision) != loaded.model.precision:
        quantize(loaded.model, args.precision, loaded.tokenizer)
    keep_freed_memory()
    return loaded


def on_text(args: argparse.Namespace, kind: str, names: list[str]) -> dict:
    """Prints one line per text, route and budget; returns what `evaluate_texts` does."""
    from dualbranch.data.corpora import load_corpus
    from dualbranch.gate import check_budget
    from dualbranch.text_eval import evaluate_texts, read_text

    budgets = sorted({check_budget(b) for b in args.budgets})
    texts = {name: [read_text(name, args.wikitext, args.last)] if kind == "text" else load_corpus(name, args.split) for name in names}
    loaded = load_rounded(args)
    context = loaded.model.config.max_seq_len
    if args.window is not None and args.window > context:
        raise ValueError(f"--window is {args.window}; the model's context is {context} tokens")

    def note(name: str, records: list[dict]) -> None:
        print(f"{name}" + (", WikiText's token spacing undone" if args.wikitext else ""), file=out)
        for r in records:
            label = r["route"] if r["budget"] is None else f"auto {r['budget']:g}"
            print(
                f"  {label:10} perplexity {r['perplexity']:9.3f} ({r['of_slow']:.3f} of slow)  {r['bits_per_byte']:.4f} bits per byte"
                f"  {r['slow_share']:6.1%} slow  {r['flops'] / 1e6:,.1f} MFLOP per token", file=out,
            )  # fmt: skip

    out = sys.stderr if args.json else sys.stdout
    return evaluate_texts(loaded.model, loaded.tokenizer, texts, budgets, args.window or min(1024, context), args.max_tokens, note)


def on_recall(args: argparse.Namespace, names: list[str]) -> list[dict]:
    """Prints one line per route and budget; returns the records of `recall`."""
    from dualbranch.data.corpora import CORPORA, load_corpus
    from dualbranch.gate import check_budget
    from dualbranch.recall import distances_within, recall, recall_rows
    from dualbranch.text_eval import read_text

    budgets = sorted({check_budget(b) for b in args.budgets})
    texts = []
    for name in names or ["wikipedia"]:
        texts += load_corpus(name, args.split) if name in CORPORA else [read_text(name, args.wikitext, args.last)]
    loaded = load_rounded(args)
    distances = args.distances or distances_within(loaded.model.config.max_seq_len)
    if not distances:
        raise ValueError(f"the model's context of {loaded.model.config.max_seq_len} tokens is too short for a distance of 256; give --distances")
    records = recall(loaded.model, loaded.tokenizer, texts, budgets, distances, args.n_problems)
    head, rows = recall_rows(records)
    print(f"right (nats per password), {args.n_problems} questions per distance", file=sys.stderr if args.json else sys.stdout)
    for row in (head, *rows):
        print("  " + "".join(f"{cell:16}" for cell in row).rstrip(), file=sys.stderr if args.json else sys.stdout)
    return records


def on_tasks(args: argparse.Namespace, names: list[str]) -> dict:
    """Prints accuracy by mode; returns the results as dicts."""
    from dualbranch.data.tasks import TASKS
    from dualbranch.distill.config import EvaluationConfig, RunConfig
    from dualbranch.evaluate import draw_problems, evaluate
    from dualbranch.modes import resolve
    from dualbranch.sampling import SamplingParams

    if unknown := sorted(set(names) - set(TASKS)):
        raise ValueError(f"unknown tasks {unknown}; there are {', '.join(TASKS)}")
    loaded = load_rounded(args)
    model, tok = loaded.model, loaded.tokenizer
    problems = draw_problems(RunConfig(evaluation=EvaluationConfig(n_problems=args.n_problems)), names)
    thinking = ("on", "off") if tok.thinks else ("off",)
    base, preset = ("fast", "fast") if model.config.fast_only else ("slow", "think")
    modes = {f"{base}, thinking {t}": resolve(preset, thinking=t) for t in thinking}
    if model.gate is not None and model.calibration is not None:
        modes |= {f"fast, thinking {t}": resolve("fast", thinking=t) for t in thinking}
        modes |= {f"auto {b:g}": resolve("auto", thinking="auto" if tok.thinks else "off", budget=b) for b in args.budgets}
    found = {}
    for name, mode in modes.items():
        r = evaluate(model, tok, problems, mode, SamplingParams(max_tokens=args.max_tokens or 448))
        found[name] = r.to_dict()
        text = f"{r.overall.accuracy:6.1%} of {r.overall.n} right  {r.overall.flops / 1e6:,.0f} MFLOP per problem  {r.overall.slow_share:.0%} slow"
        print(f"  {name:18} {text}", file=sys.stderr if args.json else sys.stdout)
    return found
