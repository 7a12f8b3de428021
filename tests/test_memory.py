"""The memory of freed tensors is used again."""

import mmap
import subprocess
import sys

import pytest
import torch

from dualbranch import memory

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
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False


def test_tensors_move_to_huge_pages_as_they_are():
    plain, half, whole = torch.randn(1000, 700), torch.randn(3, 5).bfloat16(), torch.arange(77)
    across, empty, linear = torch.randn(4, 6).T, torch.zeros(0, 3), torch.nn.Linear(3, 2)
    tensors = [plain, half, whole, across, empty, *linear.parameters()]
    before, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    memory.move_to_huge_pages(tensors)
    for t, old in zip(tensors, before, strict=True):
        assert t.dtype == old.dtype and t.stride() == old.stride() and torch.equal(t, old)
    moved = [t.data_ptr() != place for t, place in zip(tensors, places, strict=True)]
    assert moved[:4] == [True, True, True, False] and moved[5:] == [True, True]
    assert half.data_ptr() == plain.data_ptr() + -(-plain.nbytes // memory.LINE) * memory.LINE
    half.zero_()
    assert torch.equal(plain, before[0]) and torch.equal(whole, before[2])
    linear(torch.ones(3)).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_what_lies_in_huge_pages_stays_unless_something_joins_it_and_goes_with_the_last_tensor():
    first, second = (place.view(torch.float32) for place in memory.in_huge_pages([400, 80]))
    region, place = first.untyped_storage().data_ptr(), first.data_ptr()
    memory.move_to_huge_pages([first, second])
    assert first.data_ptr() == place and region in memory._regions
    first.fill_(3)
    memory.move_to_huge_pages([first, second, torch.ones(5)])
    assert first.data_ptr() != place and bool((first == 3).all())
    assert region not in memory._regions


def test_without_huge_pages_there_is_memory_all_the_same(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    x, y = torch.ones(3), torch.arange(5)
    memory.move_to_huge_pages([x, y])
    assert x.tolist() == [1, 1, 1] and y.tolist() == [0, 1, 2, 3, 4]
    assert memory.in_huge_pages([]) == [] and [t.numel() for t in memory.in_huge_pages([0, 3])] == [0, 3]
    memory.move_to_huge_pages([])
