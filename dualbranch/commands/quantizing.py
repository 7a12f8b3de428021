"""`dualbranch quantize MODEL --precision P --out FOLDER`: a checkpoint with fewer bits per weight (`precision.py`)."""

from __future__ import annotations

import argparse

from dualbranch.checkpoint import load, save_checkpoint
from dualbranch.cli import add_model
from dualbranch.storage import new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    what = "bf16, int8, int8-dynamic or int4, or by part: slow=int8,fast=int4,head=int8 (default: %(default)s)"
    parser.add_argument("--precision", default="int8", metavar="P", help=what)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint goes; may not exist yet, or be empty")


def run(args: argparse.Namespace) -> int:
    from dualbranch.accounting import total_params
    from dualbranch.precision import parse_precision, quantize

    out = new_folder(args.out)
    if set(parse_precision(args.precision).values()) == {"fp32"}:
        raise ValueError("precision fp32 is what a model has; give bf16, int8, int8-dynamic or int4")
    found = load(args.model, dtype="float32", accept_terms=args.accept_gemma_terms)
    save_checkpoint(out, quantize(found.model, args.precision, found.tokenizer), found.tokenizer, found.extra)
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {args.precision}, {size / 1e6:,.1f} MB of weights; in fp32 they take {4e-6 * total_params(found.model.config):,.1f} MB")
    return 0
