"""Tasks in child processes: what they leave, and what is said of those that fail."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from dualbranch.forks import _free_memory, at_once, run_in_forks


def write(path, text):
    path.write_text(text)


def refuse(reason):
    raise ValueError(reason)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert not multiprocessing.active_children()


@on_linux
def test_all_tasks_run_and_are_named_as_they_start(tmp_path):
    for n in (1, 2, 9):
        names = []
        run_in_forks({f"{n}.{i}": partial(write, tmp_path / f"{n}.{i}", str(i)) for i in range(5)}, n, names.append)
        assert names == [f"{n}.{i}" for i in range(5)]
        assert [(tmp_path / name).read_text() for name in names] == list("01234")


@on_linux
def test_several_run_at_once_and_in_other_processes(tmp_path):
    def meet(own, other):
        own.write_text(str(os.getpid()))
        began = time.monotonic()
        while not other.exists():
            if time.monotonic() > began + 30:
                raise ValueError("the other one did not begin")
            time.sleep(0.01)

    a, b = tmp_path / "a", tmp_path / "b"
    run_in_forks({"a": partial(meet, a, b), "b": partial(meet, b, a)}, 2, lambda name: None)
    assert len({a.read_text(), b.read_text(), str(os.getpid())}) == 3


@on_linux
@pytest.mark.parametrize("n", [1, 2])
def test_the_first_refusal_is_raised_and_the_rest_is_not_begun(tmp_path, n):
    tasks = {"bad": partial(refuse, "no space left"), "slow": partial(time.sleep, 600), "never": partial(write, tmp_path / "never", "")}
    tasks = {name: task for name, task in tasks.items() if n == 2 or name != "slow"}
    started = time.monotonic()
    with pytest.raises(ValueError, match="no space left"):
        run_in_forks(tasks, n, lambda name: None)
    assert time.monotonic() - started < 60 and not (tmp_path / "never").exists()


@on_linux
def test_a_process_that_is_killed_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match=r"big: the process was killed \(signal 9\); where memory is short"):
        run_in_forks({"big": lambda: os.kill(os.getpid(), signal.SIGKILL), "other": lambda: None}, 2, lambda name: None)


@on_linux
def test_another_error_is_a_fault_of_ours_and_no_value_error():
    with pytest.raises(RuntimeError, match="odd: the process ended by an error"):
        run_in_forks({"odd": lambda: {}["missing"], "other": lambda: None}, 2, lambda name: None)


@on_linux
def test_interrupted_it_ends_the_tasks_and_what_they_started(tmp_path):
    def start_another(own):
        child = subprocess.Popen(["sleep", "600"])
        own.write_text(str(child.pid))
        child.wait()

    def interrupt(name):
        if name == "last":
            while not all((tmp_path / other).exists() and (tmp_path / other).read_text() for other in "ab"):
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_forks({name: partial(start_another, tmp_path / name) for name in ("a", "b", "last")}, 3, interrupt)
    for name in "ab":
        state = Path(f"/proc/{(tmp_path / name).read_text()}/stat")
        for _ in range(500):
            if not state.exists() or state.read_text().split()[2] == "Z":
                break
            time.sleep(0.01)
        else:
            raise AssertionError("what a task started goes on")


def test_so_many_at_once_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    for gigabytes, expected in ((1, 1), (7, 2), (100, 8)):
        monkeypatch.setattr("dualbranch.forks._free_memory", lambda gigabytes=gigabytes: gigabytes * 2**30)
        assert at_once() == expected
    monkeypatch.setattr("sys.platform", "darwin")
    assert at_once() == 1


@on_linux
def test_free_memory_is_some_and_less_than_there_is():
    assert 2**20 < _free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
