"""`dualbranch export MODEL --out FOLDER`: a branch of a model, or all of it, in a format that others read (`convert/export.py`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from dualbranch.checkpoint import LoadedModel, final_student, load
from dualbranch.cli import add_model
from dualbranch.data.packing import Rows
from dualbranch.storage import parse_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the export goes; may not exist yet, or be empty")
    parser.add_argument("--branch", help="slow (the conventional decoder), fast (the smallest device model) or dual (default: slow; of a delta dual)")
    what = "safetensors (a checkpoint of ours), hf, gguf, or delta: what a converted model has beyond the one it was made from (default: %(default)s)"
    parser.add_argument("--to", default="safetensors", help=what)
    what = "float32 (default), float16, bfloat16; of gguf also q8_0, q5_1, q5_0, q4_1, q4_0; of a delta int4 (default), int8, bf16"
    parser.add_argument("--dtype", help=what)
    parser.add_argument("--name", help="what the model card calls it (default: the folder's name)")
    parser.add_argument("--licence", help="what the model card says of its licence (default: that of the public model it is, where it is known)")
    parser.add_argument("--evaluation", metavar="FILE", help="JSON of what was measured (name -> number or text) for the card (default: the run's evaluation)")


def run(args: argparse.Namespace) -> int:
    from dualbranch.convert.export import check_calibrated, export
    from dualbranch.convert.families import text_config
    from dualbranch.convert.names import PIP_MODELS

    evaluation = None
    if args.evaluation is not None:
        evaluation = parse_json(Path(args.evaluation), Path(args.evaluation).read_bytes())
        if not isinstance(evaluation, dict):
            raise ValueError(f"{args.evaluation}: a {type(evaluation).__name__}, needed a JSON object: what was measured -> number or text")
    found = load(args.model, dtype="float32", accept_terms=args.accept_gemma_terms)
    if evaluation is None and final_student(found.folder.parent) == found.folder:  # what the run evaluated
        evaluation = measured(found.folder.parent / "evaluation.json")
    known = PIP_MODELS.get(args.model)
    base, rows, default, made = None, None, ("slow", "float32"), f"From `{args.model}`."
    if args.to == "delta":
        check_calibrated(found.model)
        base, rows, made = base_of(found, with_rows=args.dtype in (None, "int4"))
        known, default = PIP_MODELS.get(base[0]), ("dual", "int4")
    sizes = export(
        found.model, found.tokenizer, args.out, args.branch or default[0], args.to, args.dtype or default[1],
        family=text_config(found.extra["hf_config"]).get("model_type") if "hf_config" in found.extra else None,
        name=args.name, licence=args.licence or (known.licence if known else None), made=made, evaluation=evaluation, extra=found.extra,
        base=base, rows=rows,
    )  # fmt: skip
    what = f"{sizes['branch']} branch as {sizes['to']}" + (f" of the family {sizes['family']}" if sizes["family"] else "")
    print(f"{sizes['folder']}: {what}, {sizes['dtype']}; {sizes['params']:,} parameters, {sizes['bytes'] / 1e6:,.1f} MB")
    return 0


def base_of(found: LoadedModel, with_rows: bool) -> tuple[tuple[str, LoadedModel], Rows | None, str]:
    """Of a run that converted a model, out of its config: that model with its name, the text that calibrated it (`with_rows`), and how it was made.

    Raises ValueError where there is no such run.
    """
    from dualbranch.data.corpora import CORPORA
    from dualbranch.distill import self_text, stages
    from dualbranch.distill.config import RunConfig
    from dualbranch.schema import load_yaml

    run = found.folder.parent
    config = load_yaml(run / "config.yaml", RunConfig) if (run / "config.yaml").is_file() else None
    if config is None or config.teacher.checkpoint is None:
        raise ValueError(f"{found.folder}: a delta is made of a run that converted a checkpoint (teacher.checkpoint in its config.yaml)")
    name, base = config.teacher.checkpoint, load(config.teacher.checkpoint, dtype="float32", dense=True)
    d, tokens = config.data, config.data.batch_rows * config.data.seq_len
    texts = [CORPORA[corpus].file.licence for corpus in d.corpora] + ["the user's own text"] * bool(d.text) + [f"text sampled from {name}"] * bool(d.self_text)
    made = (
        f"`{name}`, frozen, is the slow branch. The fast branch was cut out of it by importance, refitted in closed form, and distilled from it for"
        f" {config.student.steps:,} steps of {tokens:,} tokens on {'; '.join(texts) or 'generated problems'}."
    )
    if not with_rows:
        return (name, base), None, made
    config = self_text.with_self_text(config, run, base.model, base.tokenizer)
    return (name, base), stages.source(config, base.tokenizer, purpose=4).batch(0, n_rows=config.student.refit_rows), made


def measured(path: Path) -> dict[str, str] | None:
    """What a run's evaluation says about text and recall, for a model card; None where there is none. Raises ValueError where it isn't a run's."""
    if not path.is_file():
        return None
    evaluation, rows = parse_json(path, path.read_bytes()), {}
    try:
        for name, text in evaluation.get("text", {}).items():
            for r in text["routes"]:
                share = "" if r["budget"] is None else f" at {r['slow_share']:.0%} slow tokens"
                cost = f"{r['flops'] / text['routes'][0]['flops']:.0%} of the FLOPs"
                rows[f"{name}, {r['route']}{share}"] = f"perplexity {r['perplexity']:.2f}, {r['of_slow']:.3f} of slow, {cost}"
        for r in evaluation.get("recall", []):
            budget = "" if r["budget"] is None else f" {r['budget']:g}"
            rows[f"recall at {r['distance']} tokens, {r['route']}{budget}"] = f"{r['accuracy']:.0%} of {r['n']}"
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the evaluation of a run ({type(error).__name__}: {error}); move it away, or give --evaluation") from error
    return {f"{name} (as trained, fp32)": value for name, value in rows.items()} or None
