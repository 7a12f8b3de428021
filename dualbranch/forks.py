"""Independent tasks in child processes, several at a time: for work that one process does on one core, and that leaves files. Knows nothing of models."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

#: Bytes of free memory for each process at once.
MEMORY = 3 * 2**30


def at_once() -> int:
    """How many processes this machine runs at once: one for each core and each 3 GiB of free memory; where a process can't be forked safely, one."""
    if sys.platform != "linux":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), _free_memory() // MEMORY))


def _free_memory() -> int:
    """Bytes, of the system or, where that is less, of the container (cgroup v2)."""
    with open("/proc/meminfo") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such files, or "max"
        return free


def run_in_forks(tasks: Mapping[str, Callable[[], None]], n: int, note: Callable[[str], None]) -> None:
    """Runs `tasks` by name, up to n at once, each in a fork of this process with one thread, which `note` is told of; with n = 1 in this process.

    Raises ValueError for the first task that raises one or whose process is killed, and RuntimeError where a process ends by another error (it has printed
    which); and ends the others, with what they started, then, or when this one is interrupted.
    """
    waiting, running = list(tasks), {}
    if n == 1:
        for name in waiting:
            note(name)
            tasks[name]()
        return
    forks = multiprocessing.get_context("fork")
    try:
        while waiting or running:
            while waiting and len(running) < n:
                name = waiting.pop(0)
                note(name)
                ours, theirs = forks.Pipe(duplex=False)
                process = forks.Process(target=_child, args=(tasks[name], theirs), daemon=True)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    process.start()
                theirs.close()
                running[ours] = (name, process)
                _own_group(process.pid)
            for ours in wait(list(running)):
                name, process = running[ours]
                try:
                    reason = ours.recv()
                except EOFError:  # it ended without a word
                    process.join()
                    if process.exitcode >= 0:
                        raise RuntimeError(f"{name}: the process ended by an error, see above") from None
                    reason = f"{name}: the process was killed (signal {-process.exitcode}); where memory is short, run fewer at once (--jobs 1)"
                if reason:
                    raise ValueError(reason)
                process.join()
                del running[ours]
    finally:
        for _, process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.join()


def _own_group(pid: int) -> None:
    """Makes a process (0: this one) the head of a group of its own: Ctrl-C reaches its parent alone, which ends it and all that it started."""
    with suppress(OSError):  # it has ended
        os.setpgid(pid, pid)


def _child(task: Callable[[], None], result: Connection) -> None:
    """What a fork does: it says why the task failed, or that it did not."""
    _own_group(0)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not a progress display's, whose thread is not here
    torch.set_num_threads(1)  # neither are those of products
    try:
        task()
    except ValueError as error:
        result.send(str(error) or type(error).__name__)
    else:
        result.send("")
