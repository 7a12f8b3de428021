"""Is a converted model's gate worth its name, and are both branches needed? On a text, at exact shares of slow tokens.

    python benchmarks/routing.py runs/smollm2-135m/gate --text ../shared/data/wikitext2-valid.txt --wikitext --last 0.2

Policies: random, the gate, and an oracle that sends the tokens of largest KL(slow || fast) slow (no bound: it ignores what a slow token's keys do for
later ones). "closed": how far of the way from random to the oracle, in nats. Then each branch of every dual block replaced by zero and by its mean, under the
gate at the model's default budget. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

from dualbranch import load
from dualbranch.data.packing import Rows, pack
from dualbranch.routing_study import ablations, routing_study
from dualbranch.text_eval import cut_windows, read_text


def rows_of(found, text: str, window: int, max_tokens: int) -> Rows:
    """Windows of the text, each a document of its own."""
    windows = cut_windows(found.tokenizer, [text], window, max_tokens).tokens
    examples = [(ids.tolist(), [0.0] + [1.0] * (len(ids) - 1)) for ids in windows]
    return pack(examples, window, found.model.config.sparse.block_size, found.tokenizer.pad_id)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dual-branch model with a calibrated gate")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--wikitext", action="store_true", help="undo WikiText's token spacing")
    parser.add_argument("--last", type=float, default=1.0, metavar="S", help="only the last share of the lines")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args(argv)
    try:
        text = read_text(args.text, args.wikitext, args.last)
    except ValueError as error:
        parser.error(str(error))
    found = load(args.model, dtype=args.dtype)
    if found.model.calibration is None or found.model.config.is_dense:
        parser.error(f"{args.model} has no calibrated gate; give the folder `gate` of a run")
    if not all(0 < share < 1 for share in args.shares):
        parser.error(f"--shares are {args.shares}; each must lie between 0 and 1")
    rows = rows_of(found, text, args.window, args.max_tokens)
    study = routing_study(found.model, rows, rows, args.shares, headline=args.shares[0])  # no other rows: what it says of position is left out
    print(f"{study['n_tokens']} tokens; perplexity slow {math.exp(study['slow']['nll']):.2f}, fast {math.exp(study['fast']['nll']):.2f}")
    for at in study["shares"]:
        del at["policies"]["position"], at["gap_closed"]["position"]
        nll = {name: p["nll"] for name, p in at["policies"].items()}
        ratio = {name: math.exp(x - study["slow"]["nll"]) for name, x in nll.items()}
        gap = nll["random"] - nll["oracle"]
        at["closed_nats"] = (nll["random"] - nll["gate"]) / gap if gap > 0 else None
        listed = ", ".join(f"{name} {ratio[name]:.3f}" for name in ("random", "gate", "oracle"))
        print(f"{at['share']:.0%} slow: times slow's perplexity: {listed}; closed " + (f"{at['closed_nats']:.0%}" if gap > 0 else "unknown"))
    cut = ablations(found.model, rows)
    losses = ", ".join(f"{c['branch']} -> {c['replaced_by']} {c['delta_nll']:+.3f} nats" for c in cut["cases"])
    print(f"gate at {cut['budget']:.0%} ({cut['slow_share']:.0%} slow): {losses}")
    result = {"benchmark": "routing", "model": args.model, "text": args.text, "torch": torch.__version__, "study": study, "ablations": cut}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
