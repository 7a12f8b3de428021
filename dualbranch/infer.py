"""The command `python infer.py`: one reply to a prompt, or a conversation at a terminal. `main(argv)` returns the exit code.

The reply goes to stdout as it is generated (reasoning dimmed), everything else to stderr. Only parsing and printing live here;
replies come from `generate.py` and `conversation.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

import torch

from dualbranch.conversation import Conversation
from dualbranch.gate import check_budget
from dualbranch.generate import Event, Generation, prompt_ids, stream
from dualbranch.memory import keep_freed_memory, move_to_huge_pages
from dualbranch.modes import MODES, ROUTES, THINKING, Mode, default_mode, fitted, resolve
from dualbranch.sampling import SamplingParams
from kernels.backend import BACKENDS, set_backend

if TYPE_CHECKING:
    from dualbranch.checkpoint import LoadedModel

USAGE_ERROR, INTERRUPTED = 2, 130

RESET, DIM, FAST, SLOW = "\x1b[0m", "\x1b[2m", "\x1b[32m", "\x1b[35m"

HELP = """\
/mode NAME     fast, think or auto
/budget SHARE  share of tokens that may go slow in mode auto, 0 to 1; /budget alone: the model's default
/reset         forget the conversation
/help          this text
/quit          leave (as do Ctrl-D, and Ctrl-C twice; Ctrl-C once stops a reply)"""

#: Control characters that a model may spell from bytes and a terminal would obey; tab and newline stay.
UNSAFE = {i: "\ufffd" for i in (*range(9), *range(11, 32), *range(127, 160))}


class UsageError(ValueError):
    """Arguments that argparse refuses."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message} (see python infer.py --help)")


def build_parser() -> argparse.ArgumentParser:
    d = SamplingParams()
    p = _Parser(
        prog="python infer.py",
        description="Talk to a trained model. With --prompt, or text on stdin, it replies once; at a terminal it holds a conversation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="modes:\n  fast   fast branch for every token, no reasoning\n  think  slow branch for every token, reasoning first\n"
        "  auto   the gate decides per token, the model decides whether to reason",
    )
    p.add_argument("--mode", choices=list(MODES), help="preset of --route and --thinking (default: auto; of a fast branch alone fast)")
    what = "a run or checkpoint, a Hugging Face folder, a .gguf file, or the name of a public model (default: the newest run under runs/)"
    p.add_argument("--model", metavar="PATH_OR_NAME", help=what)
    p.add_argument("--accept-gemma-terms", action="store_true", help="accept https://ai.google.dev/gemma/terms, needed once to fetch gemma3-270m")
    p.add_argument("--prompt", metavar="TEXT", help="reply to this and exit; - reads stdin")
    p.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, ... (default: cuda where there is one)")
    what = "weights: fp32, bf16, int8, int8-dynamic, int4, or by part: slow=int8,fast=int4 (default: as stored; int8 where `dualbranch compile` was run)"
    p.add_argument("--precision", metavar="P", help=what)
    p.add_argument("--no-compile", action="store_true", help="decode without the code that `dualbranch compile` made")
    p.add_argument("--backend", choices=BACKENDS, default="auto", help="what computes attention; auto: Triton on a GPU, else plain PyTorch (default: auto)")
    knobs = p.add_argument_group("knobs of a mode")
    knobs.add_argument("--route", choices=ROUTES, help="which branch computes")
    knobs.add_argument("--thinking", choices=THINKING, help="whether a reasoning block comes first")
    knobs.add_argument("--thinking-budget", type=int, metavar="N", help="most tokens of reasoning")
    knobs.add_argument("--speculate", action="store_true", help="route slow, one prompt: the fast branch drafts, the slow one verifies; the same replies")
    knobs.add_argument("--budget", type=float, metavar="SHARE", help="route auto: share of tokens that may go slow, 0 to 1")
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=d.temperature, metavar="X", help="0 is greedy (default: %(default)s)")
    sampling.add_argument("--top-k", type=int, default=d.top_k, metavar="K", help="keep the K most probable tokens (default: off)")
    sampling.add_argument("--top-p", type=float, default=d.top_p, metavar="P", help="keep the most probable tokens up to this mass (default: off)")
    sampling.add_argument("--min-p", type=float, default=d.min_p, metavar="P", help="drop tokens below P times the most probable (default: off)")
    sampling.add_argument("--seed", type=int, default=d.seed, metavar="N", help="same seed, same reply (default: %(default)s)")
    sampling.add_argument("--max-tokens", type=int, default=d.max_tokens, metavar="N", help="of the whole reply, reasoning included (default: %(default)s)")
    output = p.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a stream")
    output.add_argument("--show-gate", action="store_true", help="colour each token by the branch that computed it (with --json: list it)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv` (None: the process's arguments) and returns its exit code. Reads stdin, writes stdout and stderr."""
    return guarded(lambda: run(build_parser().parse_args(argv)))


def guarded(command: Callable[[], int]) -> int:
    """The exit code of `command`; where it fails by what the user can mend, one line on stderr and code 2, after Ctrl-C 130. Opens standard streams that are
    closed, so that each can be read or written."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  (for as long as the process runs)
        with contextlib.suppress(AttributeError, OSError):  # other kinds of streams; one that was read from
            # Neither a character that a terminal can't show nor bytes that are no text should end the process: the latter are refused as a prompt.
            getattr(sys, name).reconfigure(errors="surrogateescape" if name == "stdin" else "replace")
    try:
        try:
            code = command()
        except SystemExit as stop:  # --help, or usage
            code = int(stop.code or 0)
        sys.stdout.flush()  # a full disk and a closed pipe show here at the latest
        return code
    except (ValueError, OSError) as error:
        _give_up_unwritten()
        if isinstance(error, BrokenPipeError):  # `python infer.py | head`
            return 0
        print(one_line(error), file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt as stopped:
        _give_up_unwritten()
        print(f"\n{stopped}" if str(stopped) else "", file=sys.stderr)
        return INTERRUPTED


def _give_up_unwritten() -> None:
    """Drops what stdout can't write: Python would try again, and complain, when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: Exception) -> str:
    return f"error: {' '.join(str(error).split())}"


def run(args: argparse.Namespace) -> int:
    """What `main` does, without its handling of errors."""
    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.min_p, args.seed, args.max_tokens)
    mode = resolve(args.mode or "auto", args.route, args.thinking, args.budget, args.thinking_budget)
    text = args.prompt
    if text == "-" or (text is None and not sys.stdin.isatty()):
        text = sys.stdin.read()
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty; give --prompt TEXT, or pipe text in")
    if text is None and args.json:
        raise ValueError("--json needs a prompt; give --prompt TEXT, or pipe text in")
    if text is None and args.speculate:
        raise ValueError("--speculate needs a prompt; give --prompt TEXT, or pipe text in")
    set_backend(args.backend)
    loaded, name = load_model(args.model, args.device, args.accept_gemma_terms)
    prepare(loaded, args.precision, not args.no_compile)
    keep_freed_memory()
    if loaded.model.config.fast_only and args.budget is not None:
        raise ValueError(f"budget = {args.budget:g} has no effect: {name} has its fast branch alone; leave it out")
    if args.mode is args.route is None:
        mode = resolve(default_mode(loaded.model.config.fast_only), None, args.thinking, args.budget, args.thinking_budget)
    asked, mode = mode, fitted(mode, loaded.tokenizer, asked=args.thinking == "on")
    if loaded.model.config.is_dense and mode.route != "slow":
        what = f"mode {mode.name}" + ("" if mode.budget is None else f" with budget {mode.budget}")
        print(f"{name} has one branch, a dense model's: {what} computes every token in it (`dualbranch convert` makes a dual-branch model)", file=sys.stderr)
    if mode.thinking != asked.thinking == "on":
        print(f"{name} has no thinking mode: mode {mode.name} means route {mode.route}, and answers come without reasoning", file=sys.stderr)
    if text is None:
        out = Printer(sys.stdout, args.show_gate)
        return converse(Session(Conversation(loaded, args.system), mode, args.budget, args.thinking_budget), name, params, out)
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    ids = prompt_ids(loaded.tokenizer, messages)
    if args.json:
        print(json.dumps(as_json(loaded, name, ids, mode, params, args.show_gate, args.speculate), ensure_ascii=False))
        return 0
    out = Printer(sys.stdout, args.show_gate)
    with contextlib.closing(stream(loaded.model, loaded.tokenizer, ids, mode, params, speculate=args.speculate)) as events:
        generation, timing = out.reply(events)
    print(closing_line(generation, timing), file=sys.stderr)
    return 0


def load_model(path_or_name: str | None, device: str | None, accept_terms: bool = False) -> tuple[LoadedModel, str]:
    """The model and the name to show for it. Raises ValueError, also when no model is named and there is no run."""
    from dualbranch import checkpoint

    if path_or_name is None:
        path_or_name = checkpoint.newest_run()
        if path_or_name is None:
            raise ValueError("no trained model under runs/; train one with `make demo` or `python train.py configs/small.yaml`, or give --model")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # how torch says that it knows no such device, or has none
        raise ValueError(f"--device {device} can't be used here ({str(error).splitlines()[0]}); give cpu, or leave it out") from error
    loaded = checkpoint.load(path_or_name, device=device, accept_terms=accept_terms)
    return loaded, str(path_or_name)


def prepare(loaded: LoadedModel, precision: str | None, compiled: bool) -> None:
    """Packs the weights at `precision`, and decodes with compiled code where there is some, on a GPU by CUDA graphs. With precision None: as the
    weights are, or in int8 if code was compiled for that alone. Mutates the model."""
    from dualbranch.compiled import is_built
    from dualbranch.precision import normal_form, quantize

    model = loaded.model
    on_cpu = compiled and model.device.type == "cpu"
    if precision is None and on_cpu and not is_built(model, model.precision) and model.precision == "fp32" and is_built(model, "int8"):
        precision = "int8"
        print("weights rounded to int8 (--precision fp32 keeps them)", file=sys.stderr)
    if precision is not None and normal_form(precision) != model.precision:
        quantize(model, precision, loaded.tokenizer)
        move_to_huge_pages([*model.parameters(), *model.buffers()])  # and nothing keeps the memory that a checkpoint was read into
    if (compiled and model.device.type == "cuda") or (on_cpu and is_built(model, model.precision)):
        model.compile_decode()
    elif on_cpu and model.precision != "fp32":
        print(f"decoding packed weights is slow without compiled code; make it with: dualbranch compile MODEL --precision {model.precision}", file=sys.stderr)


# ---- printing


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token and in all, and tokens generated. `held`: an answer that was only tried came all at once, when it stood."""

    first: float
    total: float
    n_tokens: int
    held: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first, over the time after the first; of an answer that was held back, all over all."""
        if self.held:
            return self.n_tokens / self.total
        return (self.n_tokens - 1) / (self.total - self.first) if self.total > self.first else 0.0


class _Timer:
    """Counts and times the events that pass through it."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events, self.begin, self.first, self.n_tokens = events, time.perf_counter(), None, 0
        self.held = False

    def __iter__(self):
        for event in self.events:
            if self.first is None:
                self.first = time.perf_counter() - self.begin
            self.n_tokens += 1
            if event.generation is not None:
                self.held = event.generation.confidence is not None and not event.generation.thought
            yield event

    def timing(self) -> Timing:
        return Timing(self.first, time.perf_counter() - self.begin, self.n_tokens, self.held)


class Printer:
    """Writes replies to a terminal, or plainly to a pipe, where tags mark the reasoning that can't be dimmed."""

    def __init__(self, out: TextIO, show_gate: bool = False) -> None:
        self.out, self.show_gate = out, show_gate
        self.colour = use_colour(out)
        if show_gate and not self.colour:
            print("--show-gate needs a terminal with colours (FORCE_COLOR=1 insists); --json lists every token's branch instead", file=sys.stderr)

    def reply(self, events: Iterable[Event]) -> tuple[Generation, Timing]:
        """Prints the reply as it comes; returns it with its timing. Its iterator must run to the end."""
        timer, phase, generation = _Timer(events), None, None
        try:
            for event in timer:
                if event.phase != phase and (phase is not None or event.phase == "think"):
                    self._boundary(event.phase)
                phase = event.phase
                if event.piece:
                    self._write(self._style(event), event.piece)
                generation = event.generation
        finally:  # leave the terminal as it was, also when stopped
            self.out.write((RESET if self.colour else "") + "\n")
            self.out.flush()
        return generation, timer.timing()

    def _boundary(self, phase: str) -> None:
        """Between prompt, reasoning and answer."""
        if self.colour:
            self.out.write("" if phase == "think" else f"{RESET}\n")
        else:
            self.out.write("<think>" if phase == "think" else "</think>\n")

    def _style(self, event: Event) -> str:
        style = DIM if event.phase == "think" else ""
        return style + ((SLOW if event.use_slow else FAST) if self.show_gate else "")

    def _write(self, style: str, text: str) -> None:
        if self.colour or self.out.isatty():
            text = text.translate(UNSAFE)
        if self.colour and style:
            text = f"{style}{text}{RESET}"
        self.out.write(text)
        self.out.flush()


def use_colour(out: TextIO) -> bool:
    """Whether to write ANSI codes: on a terminal, unless NO_COLOR or TERM=dumb; FORCE_COLOR insists."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (out.isatty() and os.environ.get("TERM") != "dumb")


def closing_line(g: Generation, t: Timing, show_reuse: bool = False) -> str:
    """What the reply took: tokens, speed, share of slow tokens (prompt included), FLOPs, and what became of drafts."""
    parts = [
        f"{len(g.ids)} tokens ({g.n_think} reasoning)",
        f"{t.tokens_per_second:.1f} tokens/s",
        f"first token {1000 * t.first:.0f} ms",
        f"{100 * g.slow_share:.0f}% slow",
        f"{si(g.flops)}FLOPs",
    ]
    if g.n_drafted:
        parts.append(f"{g.n_accepted} of {g.n_drafted} drafts accepted")
    if show_reuse:
        parts.append(f"{g.n_reused} of {g.n_prompt} prompt tokens reused")
    if g.finish_reason == "length":
        parts.append("cut at --max-tokens or the model's max_seq_len")
    return "[" + " · ".join(parts) + "]"


def si(x: float) -> str:
    """A number with its SI prefix, ready for a unit: 1.25e9 -> '1.25 G'."""
    for prefix in ("", "k", "M", "G", "T"):
        if x < 1000:
            return f"{x:.3g} {prefix}"
        x /= 1000
    return f"{x:.3g} P"


def as_json(loaded: LoadedModel, name: str, ids: list[int], mode: Mode, params: SamplingParams, show_gate: bool, speculate: bool = False) -> dict[str, Any]:
    """The reply and everything measured about it, as plain JSON."""
    timer = _Timer(stream(loaded.model, loaded.tokenizer, ids, mode, params, speculate=speculate))
    events = list(timer)
    g, t = events[-1].generation, timer.timing()
    result = {
        "model": name,
        "mode": {"name": mode.name, "route": mode.route, "thinking": mode.thinking, "budget": mode.budget, "thinking_budget": mode.thinking_budget},
        "answer": g.answer,
        "reasoning": g.reasoning,
        "tool_call": g.reply.tool_call,
        "thought": g.thought,
        "finish_reason": g.finish_reason,
        "n_prompt": g.n_prompt,
        "n_generated": len(g.ids),
        "n_think": g.n_think,
        "n_answer": g.n_answer,
        "slow_share": g.slow_share,
        "flops": g.flops,
        "n_drafted": g.n_drafted,
        "n_accepted": g.n_accepted,
        "seconds": t.total,
        "seconds_to_first_token": t.first,
        "tokens_per_second": t.tokens_per_second,
        "ids": g.ids,
    }
    if show_gate:
        result["tokens"] = [{"id": e.token, "piece": e.piece, "phase": e.phase, "use_slow": e.use_slow, "g": e.g} for e in events]
    return result


# ---- conversation


@dataclass
class Session:
    """What the commands of a conversation change. The two budgets are kept while a mode is on that doesn't use them."""

    conversation: Conversation
    mode: Mode
    budget: float | None
    thinking_budget: int | None

    @property
    def fast_only(self) -> bool:
        return self.conversation.model.config.fast_only

    def set_mode(self, mode: Mode) -> None:
        budget = self.budget if mode.route == "auto" else None
        thinking_budget = self.thinking_budget if mode.thinking != "off" else None
        self.mode = replace(mode, budget=budget, thinking_budget=thinking_budget)

    def obey(self, command: str, value: str) -> str:
        """Carries out a command other than /quit; returns what to tell the user. Raises ValueError if it is unknown or malformed."""
        if command == "/help":
            return HELP
        if command == "/reset":
            self.conversation.reset()
            return "the conversation is forgotten."
        if command == "/mode":
            mode = fitted(resolve(value), self.conversation.tokenizer)
            if self.fast_only and mode.route != "fast":
                raise ValueError(f"mode {mode.name} needs the slow branch, and the model has its fast branch alone: /mode fast")
            self.set_mode(mode)
            return f"mode {self.mode.name}: route {self.mode.route}, thinking {self.mode.thinking}."
        if command == "/budget":
            try:
                budget = float(value) if value else None
            except ValueError as error:
                raise ValueError(f"/budget takes a number in [0, 1], got {value!r}") from error
            if budget is not None:
                check_budget(budget)
            if self.fast_only:
                raise ValueError("a budget has no effect: the model has its fast branch alone")
            self.budget = budget
            self.set_mode(self.mode)
            text = "the model's default" if budget is None else f"{budget:g}"
            return f"budget: {text}." + ("" if self.mode.route == "auto" else f" It will count in mode auto; now the route is {self.mode.route}.")
        raise ValueError(f"unknown command {command}; /help lists them")


def converse(session: Session, name: str, params: SamplingParams, out: Printer) -> int:
    """Reads lines until the user leaves; returns the exit code. A mistake costs a message, never the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    print(f"{name}, mode {session.mode.name}. /help lists commands.", file=sys.stderr)
    interrupted = False
    while True:
        try:
            line = input(f"{session.mode.name}> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            if interrupted:
                print(file=sys.stderr)
                return INTERRUPTED
            interrupted = True
            print("\nCtrl-C again, or /quit, leaves.", file=sys.stderr)
            continue
        interrupted = False
        if line == "/quit":
            return 0
        try:
            if line.startswith("/"):
                command, _, value = line.partition(" ")
                print(session.obey(command, value.strip()), file=sys.stderr)
            elif line:
                with contextlib.closing(session.conversation.stream(line, session.mode, params)) as events:
                    generation, timing = out.reply(events)
                print(closing_line(generation, timing, show_reuse=True), file=sys.stderr)
        except ValueError as error:
            print(one_line(error), file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
            print("stopped.", file=sys.stderr)
