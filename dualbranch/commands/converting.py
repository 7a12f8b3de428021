"""`dualbranch convert MODEL`: the pipeline of `train.py` on a config made from the command line; `configs/smollm2-135m.yaml` says the same in YAML."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from dualbranch.cli import add_model

#: What a conversion says differently from the defaults of RunConfig (distill/config.py).
CONVERSION: dict[str, Any] = {
    "data": {"corpora": ["wikipedia"], "self_text": 131072, "text_share": 1.0, "seq_len": 512, "batch_rows": 2},
    "student": {
        "steps": 480, "routes": [0.7, 0.3, 0.0], "hard": 0.0, "align": 0.0, "refit_rows": 16,
        "optim": {"kind": "muon", "lr": 2e-3, "lr_other": 1e-3, "warmup": 0.03, "decay": 0.6},
    },
    "gate": {"rows": 160, "steps": 200, "lr": 3e-3, "calibration_rows": 48, "default_budget": 0.3},
    "evaluation": {"budgets": [0.1, 0.3, 0.5], "routing_rows": 8, "routing_shares": [0.3, 0.5], "text_tokens": 8192, "n_recall": 2, "dense_baseline": False},
    "save_every": 50,
    "precision": "auto",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--fast-heads", type=int, metavar="N", help="query heads of the fast branch (default: all of the model's)")
    parser.add_argument("--fast-ff", type=int, metavar="N", help="feed-forward neurons of the fast branch (default: a quarter of the model's)")
    parser.add_argument("--steps", type=int, metavar="N", help=f"healing steps (default: {CONVERSION['student']['steps']})")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="your own text (.txt, .jsonl, folders) instead of the Wikipedia articles")
    what = "give nothing a fast branch: distil MODEL into this smaller model instead (one of `dualbranch prune`), whole"
    parser.add_argument("--student", metavar="FOLDER", help=what)
    parser.add_argument("--out", metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of a run, e.g. --set data.batch_rows=4")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder; starts it if there is none")


def run(args: argparse.Namespace) -> int:
    from dualbranch.checkpoint import load
    from dualbranch.distill import dist, pipeline
    from dualbranch.distill.trainer import NonFiniteLoss

    if args.accept_gemma_terms:
        load(args.model, dtype="bfloat16", accept_terms=True, dense=True)  # fetched once, it needs no consent again
    try:
        folder = pipeline.run(config_of(args), args.resume)
    except NonFiniteLoss as error:
        raise ValueError(str(error)) from error
    finally:
        dist.finish()
    print(f"done: {folder}/report.md")
    return 0


def config_of(args: argparse.Namespace):
    """The RunConfig that the arguments ask for. Raises ValueError, and what loading the model raises."""
    from dualbranch.distill.config import RunConfig, branch_for, complete_from_teacher, config_of_checkpoint
    from dualbranch.schema import from_dict, override, to_dict

    name = Path(args.model).name.removesuffix(".gguf")
    out = Path(args.out) if args.out else Path("runs") / re.sub(r"[^\w.-]", "-", name)
    if args.student and (args.fast_heads or args.fast_ff):
        raise ValueError("--student is a model with sizes of its own; leave --fast-heads and --fast-ff out")
    if args.student and not config_of_checkpoint(args.student).is_dense:
        raise ValueError(f"--student {args.student} has two branches, and a smaller student one; give its slow one: dualbranch export --branch slow")
    model = {name: value for name, value in (("fast_n_heads", args.fast_heads), ("fast_d_ff", args.fast_ff)) if value is not None}
    values = CONVERSION | {"name": out.name, "out": str(out.parent), "teacher": {"checkpoint": args.model}, "model": model}
    if args.student:
        values["student"] = values["student"] | {"checkpoint": args.student, "init": "smaller", "freeze_slow": False, "routes": [0.0, 0.0, 1.0]}
    if args.text:
        values["data"] = values["data"] | {"corpora": [], "text": args.text}
    if args.steps is not None:
        values["student"] = values["student"] | {"steps": args.steps}
    student = override(values, args.set).get("student")
    if not isinstance(student, dict) or student.get("checkpoint") is None:  # else the sizes are that model's
        values["model"] = to_dict(branch_for(config_of_checkpoint(args.model))) | model
    return from_dict(RunConfig, complete_from_teacher(override(values, args.set)))
