"""Tasks in child processes: what they leave, and what is said of those that fail."""

import os
import signal
import sys
import time
from functools import partial

import pytest

from dualbranch.forks import at_once, run_in_forks


def write(path, text):
    path.write_text(text)


def refuse(reason):
    raise ValueError(reason)


def test_all_tasks_run_and_are_named_as_they_start(tmp_path):
    for n in (1, 2, 9):
        names = []
        run_in_forks({f"{n}.{i}": partial(write, tmp_path / f"{n}.{i}", str(i)) for i in range(5)}, n, names.append)
        assert names == [f"{n}.{i}" for i in range(5)]
        assert [(tmp_path / name).read_text() for name in names] == list("01234")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_several_run_at_once_and_in_other_processes(tmp_path):
    def meet(own, other):
        own.write_text(str(os.getpid()))
        while not other.exists():
            time.sleep(0.01)

    a, b = tmp_path / "a", tmp_path / "b"
    run_in_forks({"a": partial(meet, a, b), "b": partial(meet, b, a)}, 2, lambda name: None)
    assert len({a.read_text(), b.read_text(), str(os.getpid())}) == 3


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_refusal_is_raised_and_the_rest_is_not_begun(tmp_path, n):
    tasks = {"bad": partial(refuse, "no space left"), "slow": partial(time.sleep, 600), "never": partial(write, tmp_path / "never", "")}
    tasks = {name: task for name, task in tasks.items() if n == 2 or name != "slow"}
    started = time.monotonic()
    with pytest.raises(ValueError, match="no space left"):
        run_in_forks(tasks, n, lambda name: None)
    assert time.monotonic() - started < 60 and not (tmp_path / "never").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_a_process_that_is_killed_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match="big: the process was ended by signal 9; is there enough memory"):
        run_in_forks({"big": lambda: os.kill(os.getpid(), signal.SIGKILL), "other": lambda: None}, 2, lambda name: None)


def test_so_many_at_once_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    for gigabytes, expected in ((1, 1), (7, 2), (100, 8)):
        monkeypatch.setattr("os.sysconf", lambda name, gigabytes=gigabytes: {"SC_PHYS_PAGES": gigabytes * 2**18, "SC_PAGE_SIZE": 4096}[name])
        assert at_once() == expected
    monkeypatch.setattr("sys.platform", "darwin")
    assert at_once() == 1
