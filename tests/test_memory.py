"""The memory of freed tensors is used again; weights and caches lie in huge pages."""

import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer

from dualbranch import memory
from dualbranch.checkpoint import LoadedModel, load, save_checkpoint
from dualbranch.infer import prepare

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


BIG = torch.arange(700_000)  # more than a huge page


def asks_for_huge_pages(tensor):
    """Whether the mapping that holds it does: `hg` among its flags."""
    wanted = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            wanted = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif wanted and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


needs_huge_pages = pytest.mark.skipif(memory._huge_memory(memory.HUGE_PAGE) is None, reason="this system has no huge pages to ask for")


@needs_huge_pages
def test_tensors_move_to_huge_pages_as_they_are():
    plain, half, whole = torch.randn(1000, 700), torch.randn(3, 5).bfloat16(), BIG.clone()
    across, empty, linear = torch.randn(4, 6).T, torch.zeros(0, 3), torch.nn.Linear(3, 2)
    tensors = [plain, half, whole, across, empty, *linear.parameters()]
    before, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    with torch.inference_mode():
        memory.move_to_huge_pages(tensors)
    for t, old in zip(tensors, before, strict=True):
        assert t.dtype == old.dtype and t.stride() == old.stride() and torch.equal(t, old)
    moved = [t.data_ptr() != place for t, place in zip(tensors, places, strict=True)]
    assert moved == [True, True, True, False, False, True, True]
    assert plain.data_ptr() % memory.HUGE_PAGE == 0 and asks_for_huge_pages(plain) and across.data_ptr() not in memory._regions
    assert half.data_ptr() == plain.data_ptr() + -(-plain.nbytes // memory.LINE) * memory.LINE
    half.zero_()
    assert torch.equal(plain, before[0]) and torch.equal(whole, before[2])
    assert plain._version == 0 and half.untyped_storage().nbytes() == half.nbytes
    linear(torch.ones(3)).sum().backward()
    assert linear.weight.grad is not None


@needs_huge_pages
def test_what_lies_in_huge_pages_stays_unless_something_joins_it_and_goes_with_the_last_tensor():
    first, second, none = (place.view(torch.float32) for place in memory.in_huge_pages([memory.HUGE_PAGE, 80, 0]))
    assert not first.any() and none.numel() == 0
    places = [first.data_ptr(), second.data_ptr()]
    memory.move_to_huge_pages([first, second, none])
    assert [first.data_ptr(), second.data_ptr()] == places and all(place in memory._regions for place in places)
    first.fill_(3)
    memory.move_to_huge_pages([first, second, torch.ones(5)])
    assert first.data_ptr() != places[0] and bool((first == 3).all())
    assert not any(place in memory._regions for place in places)


@pytest.mark.parametrize("broken", ["no such wish", "too little"])
def test_without_huge_pages_everything_stays_where_it_is(monkeypatch, broken):
    x = BIG.clone()
    place = x.data_ptr()
    if broken == "no such wish":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        assert [t.numel() for t in memory.in_huge_pages([0, 3 * memory.HUGE_PAGE])] == [0, 3 * memory.HUGE_PAGE]
    else:
        x = x[:10]
    memory.move_to_huge_pages([x])
    memory.move_to_huge_pages([])
    assert x.data_ptr() == place and torch.equal(x, BIG[: len(x)])
    assert memory.in_huge_pages([]) == []


@needs_huge_pages
def test_weights_and_caches_lie_in_huge_pages(tmp_path):
    model = make_tiny_model(400, d_model=128, d_ff=2048)
    assert model.blocks[0].slow.ff.w_down.weight.data_ptr() not in memory._regions  # (NumPy may have asked for such pages where it lies)
    save_checkpoint(tmp_path / "m", model, make_tiny_tokenizer())
    loaded = load(tmp_path / "m").model
    weights = [*loaded.parameters()]
    assert all(t.data_ptr() in memory._regions for t in weights) and asks_for_huge_pages(weights[0])
    versions = [t._version for t in weights]
    with torch.no_grad():
        weights[0].add_(1)
    assert [t._version for t in weights[1:]] == versions[1:]
    cache = loaded.new_cache(4, 2000)
    assert all(asks_for_huge_pages(t) for kv in cache.heads for t in kv)
    tokens = torch.randint(10, 400, (4, 20))
    loaded(tokens, "slow", cache=cache).logits.sum().backward()
    assert weights[0].grad is not None
    loaded = LoadedModel(load(tmp_path / "m").model, make_tiny_tokenizer())
    prepare(loaded, "bf16", compiled=False)
    assert loaded.model.blocks[0].slow.ff.w_down.matrix.words.data_ptr() in memory._regions
