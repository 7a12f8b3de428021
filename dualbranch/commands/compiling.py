"""`dualbranch compile MODEL [--precision P]`: machine code for decoding and prompts, made once per machine and model shape (`compiled.py`)."""

from __future__ import annotations

import argparse
import time

from rich.console import Console

from dualbranch.checkpoint import load
from dualbranch.cli import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    what = "as it will be run: int8, int8-dynamic, int4, bf16, fp32, or by part (default: as stored, int8 for what is in fp32)"
    parser.add_argument("--precision", metavar="P", help=what)
    parser.add_argument("--jobs", type=int, metavar="N", help="programs compiled at once (default: one for each core and each 3 GiB of free memory)")


def run(args: argparse.Namespace) -> int:
    from dualbranch.compiled import build
    from dualbranch.precision import normal_form, quantize

    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
    loaded, console = load(args.model, accept_terms=args.accept_gemma_terms), Console(stderr=True)
    model = loaded.model
    stored = model.precision
    precision = normal_form(args.precision or ("int8" if stored == "fp32" else stored))
    if precision != stored:
        quantize(model, precision, loaded.tokenizer)
    started = time.perf_counter()
    with console.status("compiling") as status:
        build(model, status.update if console.is_terminal else console.print, args.jobs)
    used = "infer.py uses it from now on" if precision in (stored, "int8") else f"infer.py --precision {precision} uses it"
    print(f"{args.model} at {precision}: compiled in {time.perf_counter() - started:.0f} s; {used}")
    return 0
