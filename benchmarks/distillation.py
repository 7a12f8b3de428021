"""What a converted model should learn from: its teacher's distribution, the text's own words, or only the teacher's likeliest words.

Students of one start are healed on the same batches, each by another loss: KL to the teacher, plain cross-entropy, KL to what the teacher cache keeps (k words
and the mass of all others). Then all-fast perplexity on held-out text. And the cosine of the gradient of the truncated loss to that of the whole one, before
and after healing, for several k.

    python benchmarks/distillation.py [--config configs/smollm2-135m.yaml] [--steps 40] [--set data.text=[FILE] ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dualbranch.checkpoint import load
from dualbranch.data.corpora import load_corpus
from dualbranch.data.packing import Rows
from dualbranch.distill import stages
from dualbranch.distill.config import RunConfig, load_run
from dualbranch.distill.losses import distill_loss, token_loss, truncated_distill_loss, truncated_targets
from dualbranch.distill.pipeline import initial_student
from dualbranch.distill.trainer import mixed_precision
from dualbranch.model import DualBranchModel
from dualbranch.text_eval import cut_windows, read_text, text_quality
from dualbranch.tokenizer import TokenizerBase

#: Words that the teacher cache could keep per token.
KEPT = (8, 32, 128, 512)
#: By name, what a student's losses are.
LOSSES = {
    "KL": ["student.soft=1.0", "student.hard=0.0"],
    "cross-entropy": ["student.soft=0.0", "student.hard=1.0"],
    "KL of 128 words": ["student.soft=1.0", "student.hard=0.0", "student.cache_logits=128"],
}


def gradient(student: DualBranchModel, teacher: DualBranchModel, rows: Rows, kept: int | None, precision: str) -> Tensor:
    """Of the fast branches' parameters, flat, for `rows` run all-fast; `kept`: words of the teacher's distribution, None = all."""
    params = [p for name, p in student.named_parameters() if ".fast." in name]
    none, scored = torch.zeros_like(rows.tokens, dtype=torch.bool), rows.loss_weights > 0

    def loss(hidden: Tensor, goal: Tensor, weights: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = teacher.logits(goal)
        if kept is None:
            return {"soft": distill_loss(logits, student.logits(hidden), weights)}
        return {"soft": truncated_distill_loss(*truncated_targets(logits, kept), student.logits(hidden), weights)}

    with mixed_precision(precision, student.device):
        with torch.no_grad():
            goal = teacher(rows.tokens, doc_start=rows.doc_start, logits_at=none).hidden[scored]
        hidden = student(rows.tokens, "fast", doc_start=rows.doc_start, logits_at=none).hidden[scored]
        total = token_loss(loss, student.config.vocab_size, hidden, (goal, rows.loss_weights[scored]))["soft"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, params)]).double()  # tens of millions of products are summed


def cosines(student: DualBranchModel, teacher: DualBranchModel, rows: Rows, precision: str) -> dict[int, float]:
    """`{kept: cosine}` of the truncated loss's gradient to the whole one's."""
    whole = gradient(student, teacher, rows, None, precision)
    return {k: float(torch.cosine_similarity(gradient(student, teacher, rows, k, precision), whole, dim=0)) for k in KEPT}


def held_out(tok: TokenizerBase, args: argparse.Namespace) -> list[str]:
    return [read_text(args.text, args.wikitext, args.last)] if args.text else load_corpus("wikipedia", "test")


def healed(config: RunConfig, tok: TokenizerBase, teacher: DualBranchModel, start: DualBranchModel) -> DualBranchModel:
    """A copy of `start`, trained as `config` says."""
    with tempfile.TemporaryDirectory() as folder:
        return stages.train_student(config, tok, teacher, copy.deepcopy(start), Path(folder), lambda record: None, "student")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/smollm2-135m.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the run, as in train.py")
    parser.add_argument("--text", help="held-out text to measure on; without it the test articles of the wikipedia corpus")
    parser.add_argument("--wikitext", action="store_true", help="undo WikiText's token spacing")
    parser.add_argument("--last", type=float, default=1.0, help="measure on the last share of the text alone")
    parser.add_argument("--tokens", type=int, default=4096, help="of held-out text, in windows of 1,024")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    common = ["data.self_text=0", f"student.steps={args.steps}", f"student.distinct_batches={args.steps}", *args.set]
    try:
        configs = {name: load_run(args.config, [*common, *settings]) for name, settings in LOSSES.items()}
        config = configs["KL"]
        if config.teacher.checkpoint is None:
            raise ValueError(f"{args.config} trains its own teacher; a config is needed that names one (teacher.checkpoint)")
        found = load(config.teacher.checkpoint, dtype=torch.float32, dense=True)
        texts = held_out(found.tokenizer, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    teacher, tok = found.model, found.tokenizer
    start = initial_student(config, config.model, teacher, tok)
    windows, rows = cut_windows(tok, texts, min(1024, teacher.config.max_seq_len), args.tokens), stages.source(config, tok, purpose=9).batch(0)
    slow, fast = text_quality(start, windows)
    record = {"steps": args.steps, "tokens": args.steps * config.data.batch_rows * config.data.seq_len, "slow": slow["perplexity"], "start": fast["perplexity"]}
    record |= {"cosine_start": cosines(start, teacher, rows, config.precision), "fast": {}}
    for name, config in configs.items():
        student = healed(config, tok, teacher, start)
        record["fast"][name] = text_quality(student, windows)[1]["perplexity"]
        if name == "KL":
            record["cosine_healed"] = cosines(student, teacher, rows, config.precision)
    table = Table(title=f"all-fast perplexity after {record['tokens']:,} tokens (slow {slow['perplexity']:.2f}, before {fast['perplexity']:.1f})")
    for column in ("loss", "perplexity", "of slow"):
        table.add_column(column)
    for name, value in record["fast"].items():
        table.add_row(name, f"{value:.2f}", f"{value / slow['perplexity']:.2f}x")
    console = Console()
    console.print(table)
    for when in ("start", "healed"):
        console.print(f"cosine of the gradient, {when}: " + ", ".join(f"{k} words {c:.4f}" for k, c in record[f"cosine_{when}"].items()), highlight=False)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
