"""`dualbranch import MODEL --out FOLDER`: a public model as a dense checkpoint of ours, logits unchanged in float32.

Smaller types round the weights, and of Gemma the norms even where its own files are as small: there they are `w`, here `1 + w`.
"""

from __future__ import annotations

import argparse

from dualbranch.checkpoint import load, save_checkpoint
from dualbranch.cli import add_model
from dualbranch.convert import families
from dualbranch.storage import new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint goes; may not exist yet, or be empty")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights on disk (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    folder = new_folder(args.out)
    found = load(args.model, dtype=args.dtype, accept_terms=args.accept_gemma_terms, dense=True)
    save_checkpoint(folder, found.model, found.tokenizer, found.extra, args.dtype)
    c = found.model.config
    print(f"{folder}: {sum(p.numel() for p in found.model.parameters()):,} parameters, {c.n_layers} layers of width {c.d_model}, {c.vocab_size:,} tokens")
    if args.dtype != "float32" and "hf_config" in found.extra and families.family_of(found.extra["hf_config"]).shifted_norms:
        print(f"norms are 1 + w, rounded to {args.dtype}: logits are near the original's, which adds the 1 in float32; --dtype float32 keeps them")
    return 0
