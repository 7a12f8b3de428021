"""The GPU benchmark without a GPU: its parity check finds a wrong kernel, its arithmetic is right, and it refuses to run where it can't."""

import importlib.util
from pathlib import Path

import pytest
import torch

import kernels
from kernels import AttentionPlan, SparseSpec, backend, bench, bench_entries, bench_parity, reference

SPEC = SparseSpec(block_size=4, n_selected_blocks=3, window=9, n_sinks=2, dense_len=12)
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton (pip install triton) and no GPU: kernels are interpreted"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_2(capsys):
    assert bench.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 8, 12, 13, 40, 200])
def test_counted_keys_are_at_least_the_rules_and_exact_where_nothing_overlaps(n):
    spec = SparseSpec(block_size=4, n_selected_blocks=3, window=9, n_sinks=0, dense_len=12)
    plan = AttentionPlan(torch.arange(n)[None], n)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, n, 1, 8, generator=g), torch.randn(1, n, 1, 8, generator=g)
    ids = reference.select_blocks(q, reference.pool_keys(k, 4), plan, spec)
    read = int(reference.sparse_mask(ids, plan, spec).sum())
    counted = bench_entries.keys_read(n, spec)
    assert read <= counted <= read + 3 * n, f"{counted} counted, {read} read; a block may straddle the window's start by 3 keys"
    assert bench_entries.blocks_scored(n, spec) == int(reference.selectable_blocks(plan, spec, n // 4).sum())


def test_distinct_share_is_one_without_overlap_and_small_with_it():
    alike = torch.arange(16).expand(1, 64, 2, 16)
    apart = torch.arange(64 * 16).view(1, 64, 1, 16)
    assert bench_entries.distinct_share(alike) == pytest.approx(1 / 32)
    assert bench_entries.distinct_share(apart) == 1
    assert bench_entries.distinct_share(torch.where(alike < 4, alike, -1)) == pytest.approx(1 / 32), "unused ids do not count"


def test_correlated_neighbours_choose_alike_and_random_ones_do_not():
    spec = SparseSpec(block_size=16, n_selected_blocks=4, window=32, n_sinks=4, dense_len=64)
    c = bench_entries.Config(2048, 2, 1, 32, torch.float32, spec)
    plan = AttentionPlan(torch.arange(c.n)[None], c.n)
    shares = {}
    for kind in ("random", "correlated"):
        q, k, _ = bench_entries.make(1, c.n, c, "cpu", kind)
        shares[kind] = bench_entries.distinct_share(kernels.select_blocks(q, kernels.pool_keys(k, 16), plan, spec))
    assert shares["correlated"] < 0.6 * shares["random"], shares


@needs_interpreter
def test_parity_check_passes_right_kernels_and_names_wrong_ones(monkeypatch):
    monkeypatch.setattr(backend, "_state", {"name": "auto"})
    kernels.set_backend("triton")
    small = bench_parity.Shape(1, 20, 64, 2, 1, 16, torch.float32)
    monkeypatch.setattr(bench_parity, "SPEC", SparseSpec(block_size=16, n_selected_blocks=1, window=8, n_sinks=2, dense_len=24))
    wrong = kernels.paged_dense_attention
    monkeypatch.setattr(kernels, "paged_dense_attention", lambda *a: wrong(*a) * 1.01)
    monkeypatch.setattr(kernels, "paged_sparse_attention", lambda *a: 1 / 0)
    findings = list(bench_parity.check_all("cpu", (small,), (bench_parity.Shape(1, 2, 64, 2, 1, 16, torch.float32),)))
    failed = {f.op for f in findings if not f.ok}
    assert failed == {f"{rule} decode {store}" for rule in ("dense", "sparse") for store in ("paged", "int8")}, [f for f in findings if not f.ok]
    assert {"pooled keys", "selection", "sparse prefill forward", "sparse prefill backward dq", "dense prefill backward dv"} <= {f.op for f in findings}


def test_an_entry_whose_parity_failed_is_not_timed_and_one_that_fails_is_reported(monkeypatch):
    c = bench_entries.Config(64, 2, 1, 16, torch.bfloat16, SPEC)
    limits = {"matmul_tflops": 800.0, "copy_gbps": 3000.0}
    refused = bench.measure(bench_entries.Entry("prefill", "sparse forward", lambda: None, 1, 1, "sparse prefill"), c, limits, ["sparse prefill backward dk"])
    assert refused.ms is None and "parity" in refused.note
    monkeypatch.setattr(bench, "bench_ms", lambda call, graph: (call(), ((0.5, 0.4, 0.6), graph))[1])
    broken = bench.measure(bench_entries.Entry("prefill", "baseline", lambda: 1 / 0, 1, 1), c, limits, [])
    assert broken.ms is None and "ZeroDivisionError" in broken.note
    timed = bench.measure(bench_entries.Entry("prefill", "sparse forward", lambda: None, 4e11, 3e8, "sparse prefill forward"), c, limits, ["selection"])
    assert (timed.tflops, timed.gbps, timed.of_ceiling) == pytest.approx((800, 600, 1.0))
    dense = bench.Row("prefill", "SDPA flash forward", "random", 1, 64, 2, 1, 16, ms=2.0, low_ms=2.0, high_ms=2.0)
    assert bench.speedups([timed, dense])[-1].endswith("| sparse forward | 0.5000 | SDPA flash forward | 2.0000 | 4.00 |")
    assert "failed" in bench.table_row(broken) and "0.5000 (0.4000 to 0.6000)" in bench.table_row(timed)


def test_the_roofline_is_the_one_in_the_docs(capsys):
    pytest.importorskip("triton")
    from kernels import roofline

    roofline.main()
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 18 and table in (Path(__file__).parents[1] / "docs/kernels.md").read_text(), "python -m kernels.roofline prints another"
