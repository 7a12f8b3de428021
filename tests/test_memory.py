"""The memory of freed tensors is used again."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from dualbranch.memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
x = torch.zeros(2**21)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        y = x + 1
        z = y * 2
        del y, z
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    done = [subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True).stdout.split() for keep in (True, False)]
    (kept, few), (_, many) = done
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert int(few) < 200 and (int(few) < int(many) / 5 or int(many) < 400), done  # few there too where pages are huge


def test_a_library_without_mallopt_changes_nothing(monkeypatch):
    from dualbranch import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
