"""`dualbranch prune MODEL --out FOLDER`: a smaller conventional model, cut by importance on calibration text and refitted (`convert/prune.py`)."""

from __future__ import annotations

import argparse
import json

from dualbranch.checkpoint import load, save_checkpoint
from dualbranch.cli import add_model
from dualbranch.storage import new_folder, write_text

#: The argument of each size that can be given.
SIZES = {"layers": "n_layers", "width": "d_model", "heads": "n_heads", "kv-heads": "n_kv_heads", "ff": "d_ff"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint goes; may not exist yet, or be empty")
    parser.add_argument("--share", type=float, default=0.35, metavar="S", help="of the parameters that may stay (default: %(default)s)")
    for name, field in SIZES.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", dest=field, help=f"{field} of the pruned model (default: chosen to meet the share)")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="calibration text (.txt, .jsonl, folders) instead of the Wikipedia articles")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="rows of calibration text (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of a row (default: %(default)s)")
    parser.add_argument("--no-refit", action="store_true", help="cut only; by default output matrices are refitted in closed form")


def run(args: argparse.Namespace) -> int:
    from dualbranch.convert.prune import prune
    from dualbranch.data.packing import pack
    from dualbranch.distill.sources import text_documents

    folder = new_folder(args.out)
    if args.rows < 1:
        raise ValueError(f"--rows is {args.rows}, needed at least 1")
    found = load(args.model, dtype="float32", accept_terms=args.accept_gemma_terms, dense=True)
    if args.seq_len > (longest := found.model.config.max_seq_len):
        raise ValueError(f"--seq-len is {args.seq_len}, and the model reads {longest} tokens; give {longest} at most")
    documents = text_documents(found.tokenizer, tuple(args.text), () if args.text else ("wikipedia",), "train", args.seq_len)
    rows = pack(documents, args.seq_len, found.model.config.sparse.block_size, found.tokenizer.pad_id).map(lambda x: x[: args.rows])
    n_tokens = int(rows.real.sum())
    sizes = {field: getattr(args, field) for field in SIZES.values()}
    model, report = prune(found.model, rows, args.share, **sizes, refit=not args.no_refit)
    report["calibration"] = {"tokens": n_tokens, "text": args.text or ["wikipedia"]}
    save_checkpoint(folder, model, found.tokenizer, {"pruned_from": args.model})
    write_text(folder / "pruning.json", json.dumps(report, indent=1) + "\n")
    for name in ("params", "flops", *SIZES.values()):
        before, after = report["before"][name], report["after"][name]
        print(f"{name:10} {before:>15,.0f} -> {after:>15,.0f}  ({after / before:.1%})")
    print(f"layers kept: {' '.join(map(str, report['layers']['kept']))}")
    print(f"{folder}: cut and refitted on {n_tokens:,} tokens, not trained yet; what each part is worth: pruning.json")
    return 0
