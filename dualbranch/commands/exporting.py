"""`dualbranch export MODEL --out FOLDER`: a branch of a model, or all of it, in a format that others read (`convert/export.py`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dualbranch.checkpoint import load
from dualbranch.cli import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the export goes; may not exist yet, or be empty")
    parser.add_argument("--branch", default="slow", help="slow (the conventional decoder), fast (the smallest device model) or dual (default: %(default)s)")
    parser.add_argument("--to", default="safetensors", help="safetensors (a checkpoint of ours), hf or gguf (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, float16, bfloat16; of gguf also q8_0, q5_1, q5_0, q4_1, q4_0 (default: %(default)s)")
    parser.add_argument("--name", help="what the model card calls it (default: the folder's name)")
    parser.add_argument("--licence", help="what the model card says of its licence (default: that of the public model it is, where it is known)")
    parser.add_argument("--evaluation", metavar="FILE", help="JSON of what was measured (name -> number or text) for the model card")


def run(args: argparse.Namespace) -> int:
    from dualbranch.convert.export import export
    from dualbranch.convert.families import text_config
    from dualbranch.convert.names import PIP_MODELS

    evaluation = None
    if args.evaluation is not None:
        evaluation = json.loads(Path(args.evaluation).read_text(encoding="utf-8"))
        if not isinstance(evaluation, dict):
            raise ValueError(f"{args.evaluation}: a {type(evaluation).__name__}, needed a JSON object: what was measured -> number or text")
    found = load(args.model, dtype="float32", accept_terms=args.accept_gemma_terms)
    known = PIP_MODELS.get(args.model)
    sizes = export(
        found.model, found.tokenizer, args.out, args.branch, args.to, args.dtype,
        family=text_config(found.extra["hf_config"]).get("model_type") if "hf_config" in found.extra else None,
        name=args.name, licence=args.licence or (known.licence if known else None), made=f"From `{args.model}`.", evaluation=evaluation, extra=found.extra,
    )  # fmt: skip
    what = f"{sizes['branch']} branch as {sizes['to']}" + (f" of the family {sizes['family']}" if sizes["family"] else "")
    print(f"{sizes['folder']}: {what}, {sizes['dtype']}; {sizes['params']:,} parameters, {sizes['bytes'] / 1e6:,.1f} MB")
    return 0
