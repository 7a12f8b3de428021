"""Independent tasks in child processes, several at a time: for work that one process does on one core, and that leaves files. Knows nothing of models."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait

import torch

#: Bytes of memory for each process at once.
MEMORY = 3 * 2**30


def at_once() -> int:
    """How many processes this machine runs at once: one for each core and each 3 GiB of memory; where a process can't be forked safely, one."""
    if sys.platform != "linux":
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // MEMORY))


def run_in_forks(tasks: Mapping[str, Callable[[], None]], n: int, note: Callable[[str], None]) -> None:
    """Runs `tasks` by name, up to n at once, each in a fork of this process with one thread, which `note` is told of; with n = 1 in this process.

    Raises ValueError for the first task that raises one, and where a process ends otherwise; and ends the others then, or when this one is interrupted.
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
            for ours in wait(list(running)):
                name, process = running.pop(ours)
                try:
                    reason = ours.recv()
                except EOFError:  # it ended without a word
                    process.join()
                    how = f"by signal {-process.exitcode}; is there enough memory?" if process.exitcode < 0 else "by an error, see above"
                    reason = f"{name}: the process was ended {how}"
                if reason:
                    raise ValueError(reason)
                process.join()
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _child(task: Callable[[], None], result: Connection) -> None:
    """What a fork does: it says why the task failed, or that it did not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it too, and then it has nothing to say
    torch.set_num_threads(1)  # the threads of the parent are not here
    try:
        task()
    except ValueError as error:
        result.send(str(error) or type(error).__name__)
    else:
        result.send("")
