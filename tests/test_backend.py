"""Which implementation runs, and that it says so: `auto | reference | triton`, and what each refuses."""

import logging
from types import SimpleNamespace

import pytest
import torch

import kernels
from dualbranch.infer import main as infer
from kernels import AttentionPlan, PagedKV, SparseSpec, backend, paged_reference, reference

SPEC = SparseSpec(block_size=16, n_selected_blocks=2, window=20, n_sinks=3, dense_len=24)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process that has chosen nothing and said nothing, without Triton's interpreter."""
    monkeypatch.setattr(backend, "_state", {"name": "auto"})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pretend(monkeypatch, capability=(9, 0), has_triton=True):
    """A machine with such a GPU."""
    monkeypatch.setattr(backend, "_has_triton", lambda: has_triton)
    monkeypatch.setattr(backend, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def queries(device="cuda", dtype=torch.bfloat16, head_dim=64):
    """As much of a tensor (1, 20, 4, head_dim) as the choice looks at."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 20, 4, head_dim))


def test_auto_takes_triton_on_a_gpu_and_says_so_once(monkeypatch, caplog):
    pretend(monkeypatch)
    with caplog.at_level(logging.INFO, "kernels.backend"):
        assert [backend.get_backend(queries()) for _ in range(3)] == ["triton"] * 3
    assert [r.getMessage() for r in caplog.records] == ["attention backend: triton (the kernels run on this GPU)"]


@pytest.mark.parametrize(
    "machine, x, reason",
    [
        ({"has_triton": False}, {}, "pip install triton"),
        ({"capability": (7, 5)}, {}, "compute capability (7, 5)"),
        ({}, {"device": "cpu"}, "the tensors are on cpu"),
        ({}, {"dtype": torch.float64}, "not in float64"),
        ({}, {"head_dim": 40}, "got 40"),
        ({}, {"head_dim": 512}, "got 512"),
    ],
)
def test_where_triton_cannot_run_auto_says_why_once_and_triton_raises(monkeypatch, caplog, machine, x, reason):
    pretend(monkeypatch, **machine)
    x = queries(**x)
    with caplog.at_level(logging.INFO, "kernels.backend"):
        assert [backend.get_backend(x) for _ in range(3)] == ["blockwise"] * 3
    (record,) = caplog.records
    assert reason in record.getMessage()
    with pytest.raises(ValueError, match="cannot run") as raised:
        backend.set_backend("triton")
        backend.get_backend(x)
    assert reason in str(raised.value)


def test_without_a_gpu_auto_is_plain_pytorch_and_triton_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.get_backend() == backend.get_backend(queries("cpu")) == "blockwise"
    with pytest.raises(ValueError, match=r"no CUDA device.*TRITON_INTERPRET=1"):
        backend.set_backend("triton")
    assert backend.get_backend() == "blockwise", "a refused choice changes nothing"


def test_the_interpreter_runs_only_when_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    assert backend.get_backend(queries("cpu")) == "blockwise"
    backend.set_backend("triton")
    with caplog.at_level(logging.INFO, "kernels.backend"):
        assert backend.get_backend(queries("cpu")) == "triton"
    assert "interpreted" in caplog.text


def test_infer_refuses_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert infer(["--backend", "triton", "--prompt", "hello"]) == 2
    assert "pip install triton" in capsys.readouterr().err
    assert infer(["--backend", "cuda", "--prompt", "hello"]) == 2


def interpret(monkeypatch):
    """The Triton backend on this CPU; skips where it cannot be."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed (pip install triton, on Linux x86_64)")
    pytest.importorskip("kernels.triton_ops")
    backend.set_backend("triton")


def make(B, T, S, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, h, 16, generator=g) for n, h in ((T, 4), (S, 2), (S, 2)))
    return q, k, v, AttentionPlan(torch.arange(S - T, S).expand(B, -1), S)


def assert_close(ours, theirs):
    error = (ours.float() - theirs.float()).abs().max().item()
    assert error < 1e-4, f"largest difference {error:.2e}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled: python -m kernels.bench checks them")
@pytest.mark.parametrize("T", [1, 5, 40])
def test_public_ops_on_triton_equal_the_reference(monkeypatch, T):
    interpret(monkeypatch)
    q, k, v, plan = make(2, T, 96)
    pooled = kernels.pool_keys(k, 16)
    assert_close(pooled, reference.pool_keys(k, 16))
    assert torch.equal(kernels.select_blocks(q, pooled, plan, SPEC), reference.select_blocks(q, pooled, plan, SPEC))
    assert_close(kernels.dense_attention(q, k, v, plan), reference.dense_attention(q, k, v, plan))
    assert_close(kernels.sparse_attention(q, k, v, plan, SPEC), reference.sparse_attention(q, k, v, plan, SPEC))
    assert_close(kernels.sparse_attention(q, k, v, plan, SPEC, pooled), reference.sparse_attention(q, k, v, plan, SPEC))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled: python -m kernels.bench checks them")
def test_few_queries_decode_unless_they_want_gradients(monkeypatch):
    interpret(monkeypatch)
    from kernels import decode_triton, triton_ops

    def refuse(*args):
        raise AssertionError("the other kernels ran")

    q, k, v, plan = make(1, 3, 64)
    with monkeypatch.context() as m:
        for name in ("dense_attention", "sparse_attention"):
            m.setattr(triton_ops, name, refuse)
        kernels.dense_attention(q, k, v, plan), kernels.sparse_attention(q, k, v, plan, SPEC)
    for name in ("dense_decode", "sparse_decode"):
        monkeypatch.setattr(decode_triton, name, refuse)
    q.requires_grad_()
    for out in (kernels.dense_attention(q, k, v, plan), kernels.sparse_attention(q, k, v, plan, SPEC)):
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def paged(k, v, page_size=32):
    """k, v (B, S, Hk, D) in pages that lie in reverse order."""
    B, S, Hk, D = k.shape
    n = B * S // page_size
    table = torch.arange(n - 1, -1, -1, dtype=torch.int32).view(B, -1)
    pages = [x.reshape(n, page_size, Hk, D).flip(0).contiguous() for x in (k, v)]
    return PagedKV(*pages, table, reference.pool_keys(pages[0], SPEC.block_size).view(n, -1, Hk, D))


@pytest.mark.parametrize("name", ["auto", "reference", "triton"])
def test_paged_ops_equal_the_same_keys_in_a_row(monkeypatch, name):
    if name == "triton":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled: python -m kernels.bench checks them")
        interpret(monkeypatch)
    backend.set_backend(name)
    q, k, v, plan = make(2, 3, 96)
    kv = paged(k, v)
    assert_close(kernels.paged_dense_attention(q, kv, plan), reference.dense_attention(q, k, v, plan))
    assert_close(kernels.paged_sparse_attention(q, kv, plan, SPEC), reference.sparse_attention(q, k, v, plan, SPEC))
    assert_close(kernels.paged_sparse_attention(q, kv, plan, SPEC), paged_reference.paged_sparse_attention(q, kv, plan, SPEC))


def test_paged_ops_check_their_arguments():
    q, k, v, plan = make(2, 3, 96)
    kv = paged(k, v)
    bad = [
        lambda: kernels.paged_dense_attention(q[:, :2], kv, plan),
        lambda: kernels.paged_dense_attention(q.double(), kv, plan),
        lambda: kernels.paged_dense_attention(q, kv, AttentionPlan(plan.q_pos, 97)),
        lambda: kernels.paged_sparse_attention(q, kv, plan, SparseSpec(block_size=8)),
        lambda: kernels.paged_dense_attention(q.clone().requires_grad_(), kv, plan),
    ]
    for i, call in enumerate(bad):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"case {i} was accepted")
