"""The training loop every stage uses: schedule, gradient, metrics, progress, checkpoints, resume.

A stage gives a `loss_fn(step, micro_batch_rows) -> {name: sum}`; everything that must survive a kill is the model, the optimizer
and the step, because batches are functions of the step. Written state is always complete (training_state.save_state).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dualbranch.data.packing import Rows
from dualbranch.distill import dist
from dualbranch.distill.config import OptimConfig
from dualbranch.distill.optim import lr_factor, make_optimizers, set_lr
from dualbranch.memory import keep_freed_memory
from dualbranch.storage import write_text
from dualbranch.training_state import load_latest_state, save_state
from kernels import has_bf16_units


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; names the last good state."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state was written."""


@dataclass(frozen=True)
class Loop:
    """What a training loop needs besides the model. `batch(step)` gives the step's rows; `loss(rows, step)` sums whose total is
    divided by `rows.loss_weights.sum()` of the whole batch. `log` receives one dict per step. `precision`: see `RunConfig`."""

    name: str
    folder: Path
    n_steps: int
    optim: OptimConfig
    save_every: int
    batch: Callable[[int], Rows]
    loss: Callable[[Rows, int], dict[str, Tensor]]
    log: Callable[[dict], None]
    precision: str = "fp32"
    quiet: bool = False


def train(model: nn.Module, loop: Loop) -> float:
    """Runs `loop` from its newest valid state to its end; returns seconds spent in this call. Mutates `model`.

    Raises NonFiniteLoss, and Stopped on Ctrl-C (state written).
    """
    keep_freed_memory()
    optimizers = make_optimizers(model, loop.optim)
    trained = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    first = restore(model, optimizers, loop.folder)
    if isinstance(loop.log, MetricsLog):
        loop.log.rewind(loop.name, first)
    started = time.perf_counter()
    with stop_signal() as stopping, progress_bar(loop, first) as report:
        for step in range(first, loop.n_steps):
            t0 = time.perf_counter()
            rows = loop.batch(step)
            set_lr(optimizers, lr_factor(step, loop.n_steps, loop.optim))
            metrics = gradient_step(model, loop, rows, step)
            norm = dist.full(torch.nn.utils.clip_grad_norm_(trained, loop.optim.clip_norm))
            if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
                raise NonFiniteLoss(
                    f"stage {loop.name}: the loss is {metrics['loss']} and the gradient's norm {float(norm)} at step {step}; the last good state"
                    f" is in {loop.folder}/state. Start another run (--set name=NEW) with a lower optim.lr (now {loop.optim.lr})"
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - t0
            metrics |= {"stage": loop.name, "step": step, "grad_norm": float(norm), "tokens_per_s": rows.tokens.numel() / seconds}
            loop.log(metrics)
            report(step, metrics)
            last = step + 1 == loop.n_steps
            stop = dist.any_rank(stopping.is_set())
            if stop or (step + 1) % loop.save_every == 0 or last:
                persist(model, optimizers, loop.folder, step + 1)
            if stop and not last:
                raise Stopped(f"stopped in stage {loop.name} after step {step + 1} of {loop.n_steps}; the same command with --resume continues")
    return time.perf_counter() - started


def gradient_step(model: nn.Module, loop: Loop, rows: Rows, step: int) -> dict[str, float]:
    """Accumulates the gradient of the whole batch, whatever its split over micro-batches and ranks; returns the losses per token."""
    n, parts, world = len(rows), loop.optim.micro_batches, dist.world_size()
    if n % (parts * world):
        raise ValueError(f"data.batch_rows is {n}; it must be a multiple of micro_batches x processes = {parts} x {world}")
    weight = float(rows.loss_weights.sum().clamp(min=1.0))
    size, device = n // (parts * world), next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    for i in range(parts):
        begin = (i * world + dist.rank()) * size
        with mixed_precision(loop.precision, device):
            losses = loop.loss(rows.map(lambda x: x[begin : begin + size].to(device)), step)  # noqa: B023
        total = sum(losses.values()) / weight
        (total * world).backward()  # FSDP averages over ranks
        for name, value in (losses | {"loss": total * weight}).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    return {name: float(dist.total(value)) / weight for name, value in sums.items()}


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager:
    """Products inside in bf16 where `precision` asks for it: "bf16" always, "auto" where `device` has units for it. Weights and sums stay in fp32."""
    on = precision == "bf16" or (precision == "auto" and has_bf16_units(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def persist(model: nn.Module, optimizers: list[torch.optim.Optimizer], folder: Path, step: int) -> None:
    """Writes everything needed to continue after `step` steps. Collective."""
    names = {p: n for n, p in model.named_parameters()}
    weights = {n: dist.full(p.detach()).cpu() for n, p in model.named_parameters() if p.requires_grad}  # the others are as they were made
    states = {
        str(i): {names[p]: {k: dist.full(v).cpu() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in o.state.items()}
        for i, o in enumerate(optimizers)
    }
    if dist.rank() == 0:
        save_state(folder / "state", step, weights, states, {})
    dist.barrier()


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], folder: Path) -> int:
    """Loads the newest valid state under `folder`, if any; returns the step to go on with."""
    found = load_latest_state(folder / "state")
    if found is None:
        return 0
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in found.model_state.items():
            params[name].copy_(dist.like(value, params[name]))
    for i, optimizer in enumerate(optimizers):
        for name, state in found.optimizer_state.get(str(i), {}).items():
            p = params[name]
            optimizer.state[p] = {k: dist.like(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in state.items()}
    return found.step


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Set once Ctrl-C or SIGTERM arrives, so that a step is never cut in half; a second Ctrl-C interrupts at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handler(signum: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for s, h in old.items():
            signal.signal(s, h)


@contextmanager
def progress_bar(loop: Loop, first: int) -> Iterator[Callable[[int, dict], None]]:
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere a line now and then."""
    console = Console(stderr=True)
    if dist.rank() or loop.quiet:
        yield lambda step, metrics: None
        return
    if not console.is_terminal:
        t0, last = time.perf_counter(), [0.0]

        def line(step: int, m: dict) -> None:
            now = time.perf_counter()
            if now - last[0] > 15 or step + 1 == loop.n_steps:
                last[0] = now
                eta = (now - t0) / (step + 1 - first) * (loop.n_steps - step - 1)
                speed = f"{m['tokens_per_s']:,.0f} tokens/s  ETA {eta:.0f} s"
                console.print(f"{loop.name} {step + 1}/{loop.n_steps}  loss {m['loss']:.4f}  {speed}", highlight=False)

        yield line
        return
    figures = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s  ETA")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(loop.name, total=loop.n_steps, completed=first, loss=float("nan"), rate=0.0)
        yield lambda step, m: bar.update(task, completed=step + 1, loss=m["loss"], rate=m["tokens_per_s"])


class MetricsLog:
    """Appends one JSON object per line to `path`; on resume drops lines of steps that will be run again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the lines of `stage` at and after `step`, and a half-written last line."""
        if dist.rank() or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("stage") != stage or record.get("step", 0) < step:
                kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def __call__(self, record: dict) -> None:
        if dist.rank() == 0:
            with self.path.open("a") as f:
                f.write(json.dumps(record) + "\n")
