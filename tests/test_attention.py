"""Dense attention, the plan, argument checks, and the package itself."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import AttentionPlan, SparseSpec, blockwise, dense_attention, has_bf16_units, pool_keys, reference, sparse_attention

GQA = [(1, 1), (4, 2), (3, 1), (8, 2), (7, 1), (8, 1), (16, 1)]


def make(B, T, S, H, Hk, D, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=g).to(dtype)
    k, v = (torch.randn(B, S, Hk, D, generator=g).to(dtype) for _ in range(2))
    return q, k, v


def assert_same(ours, theirs, tolerance=2e-5):
    """Equal up to rounding: tolerance is relative to the largest value, or absolute below 1."""
    error, allowed = (ours - theirs).abs().max().item(), tolerance * max(1.0, theirs.abs().max().item())
    assert error <= allowed, f"largest difference {error:.2e}, allowed {allowed:.2e}"


def values_and_grads(f, *tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = f(*tensors)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return (out.detach(), *torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True))


@pytest.mark.parametrize("H,Hk", GQA)
def test_dense_on_a_whole_prefix_is_causal_sdpa(H, Hk):
    q, k, v = make(2, 37, 37, H, Hk, 16)
    plan = AttentionPlan(torch.arange(37).expand(2, -1), 37)
    assert plan.is_prefix
    kk, vv = (x.repeat_interleave(H // Hk, 2).transpose(1, 2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), kk, vv, is_causal=True).transpose(1, 2)
    assert_same(dense_attention(q, k, v, plan), expected)
    assert_same(reference.dense_attention(q, k, v, plan), expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_dense_matches_reference_in_values_and_gradients(data):
    H, Hk = data.draw(st.sampled_from(GQA))
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    T = data.draw(st.integers(1, S + 5))
    pos = torch.tensor(data.draw(st.lists(st.lists(st.integers(-1, S - 1), min_size=T, max_size=T), min_size=B, max_size=B)))
    start = (pos // 2).clamp(min=0) if data.draw(st.booleans()) else None
    plan = AttentionPlan(pos, S, start)
    q, k, v = make(B, T, S, H, Hk, 8)
    ours = values_and_grads(lambda *x: dense_attention(*x, plan), q, k, v)
    theirs = values_and_grads(lambda *x: reference.dense_attention(*x, plan), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-4)


def test_dense_in_chunks_of_queries_matches_reference(monkeypatch):
    monkeypatch.setattr("kernels.blockwise.dense.MASK_ELEMENTS", 64 * 200)
    q, k, v = make(2, 200, 200, 4, 2, 8)
    pos = torch.stack([torch.randperm(200), torch.arange(200).masked_fill(torch.arange(200) > 50, -1)])
    plan = AttentionPlan(pos, 200)
    assert_same(dense_attention(q, k, v, plan), reference.dense_attention(q, k, v, plan))


def test_dense_over_packed_documents_in_chunks_matches_reference_in_values_and_gradients():
    T = 2 * kernels.blockwise.dense.DOCUMENT_QUERIES + 17
    q, k, v = make(2, T, T, 4, 2, 16)
    starts = torch.tensor([[0, 48, 160, 240], [0, 16, 144, 288]])  # of four documents in each row
    doc_start = torch.stack([s[torch.searchsorted(s, torch.arange(T), right=True) - 1] for s in starts])
    plan = AttentionPlan(torch.arange(T).expand(2, -1), T, doc_start)
    ours, theirs = (values_and_grads(lambda *x, f=f: f(*x, plan), q, k, v) for f in (dense_attention, reference.dense_attention))
    assert len(plan.cached("chunks", list)) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("op", ["dense", "sparse"])
def test_padding_queries_give_zero_and_zero_gradient_even_on_empty_rows_of_nan(T, op):
    S, spec = 90, SparseSpec(8, 2, 8, 2, 16)
    q, k, v = make(3, T, S, 4, 2, 8)
    pos = torch.randint(20, 60, (3, T))
    pos[0] = -1
    pos[1, T // 2 + 1 :] = -1
    q[pos < 0], k[0], v[0], k[1:, 60:], v[1:, 60:] = float("nan"), float("nan"), float("nan"), float("nan"), float("nan")
    plan = AttentionPlan(pos, S)
    f = (lambda *x: dense_attention(*x, plan)) if op == "dense" else (lambda *x: sparse_attention(*x, plan, spec))
    out, gq, gk, gv = values_and_grads(f, q, k, v)
    assert (out[pos < 0] == 0).all() and out.isfinite().all()
    assert (gq[pos < 0] == 0).all()
    for g in (gq, gk, gv):
        assert g.isfinite().all()
    assert (gk[0] == 0).all() and (gv[1:, 60:] == 0).all()


@pytest.mark.parametrize("T", [1, 3, 30])
def test_keys_after_the_last_query_may_be_nan(T):
    q, k, v = make(2, T, 64, 4, 2, 8)
    pos = torch.stack([torch.arange(T), torch.arange(T) + 20])
    plan = AttentionPlan(pos, 64)
    clean = dense_attention(q, k, v, plan)
    for b in range(2):
        k[b, int(pos[b, -1]) + 1 :], v[b, int(pos[b, -1]) + 1 :] = float("nan"), float("nan")
    assert torch.equal(dense_attention(q, k, v, plan), clean)


@pytest.mark.parametrize("T", [1, 33])
def test_bf16_stays_close_to_fp32(T):
    q, k, v = make(1, T, 33, 4, 2, 16, dtype=torch.bfloat16)
    plan = AttentionPlan(torch.arange(33 - T, 33)[None], 33)
    out = dense_attention(q, k, v, plan)
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), reference.dense_attention(q.float(), k.float(), v.float(), plan), 2e-2)


def test_pooled_keys_are_means_and_do_not_depend_on_what_is_pooled_with_them():
    k = torch.randn(2, 83, 3, 16)
    pooled = pool_keys(k, 8)
    assert pooled.shape == (2, 10, 3, 16)
    assert_same(pooled[:, 4], k[:, 32:40].mean(1), 1e-6)
    for n in range(10):
        assert torch.equal(pool_keys(k[:, n * 8 : n * 8 + 8], 8)[:, 0], pooled[:, n]), f"block {n}"
    assert pool_keys(k[:, :7], 8).shape == (2, 0, 3, 16)


def test_bad_arguments_raise_value_error():
    q, k, v = make(1, 4, 40, 4, 2, 8)
    plan = AttentionPlan(torch.arange(36, 40)[None], 40)
    spec = SparseSpec(8, 2, 8, 2, 16)
    bad = [
        lambda: SparseSpec(block_size=0),
        lambda: SparseSpec(window=0),
        lambda: SparseSpec(n_sinks=-1),
        lambda: SparseSpec(dense_len=1.5),
        lambda: AttentionPlan(torch.arange(4), 4),
        lambda: AttentionPlan(torch.zeros(1, 4), 4),
        lambda: AttentionPlan(torch.tensor([[4]]), 4),
        lambda: AttentionPlan(torch.tensor([[-2]]), 4),
        lambda: AttentionPlan(torch.tensor([[3]]), 4, torch.tensor([[4]])),
        lambda: AttentionPlan(torch.tensor([[3]]), 4, torch.tensor([4])),
        lambda: dense_attention(q[:, :3], k, v, plan),
        lambda: dense_attention(q, k[:, :39], v[:, :39], plan),
        lambda: dense_attention(q, k, v[..., :4], plan),
        lambda: dense_attention(q[:, :, :3], k, v, plan),
        lambda: dense_attention(q, k.double(), v.double(), plan),
        lambda: dense_attention(q, k.to("meta"), v.to("meta"), plan),
        lambda: sparse_attention(q, k, v, plan, spec, pool_keys(k, 8).to("meta")),
        lambda: sparse_attention(q, k, v, plan, spec, pool_keys(k, 8)[:, :4]),
        lambda: sparse_attention(q, k, v, plan, spec, pool_keys(k, 8)[:, :, :1]),
        lambda: sparse_attention(q, k, v, AttentionPlan(plan.q_pos, 40, torch.full((1, 4), 4)), spec),
        lambda: pool_keys(k, 0),
        lambda: kernels.set_backend("cuda"),
    ]
    for i, call in enumerate(bad):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"case {i} was accepted")


def test_reference_backend_is_used_when_asked_for(monkeypatch):
    q, k, v = make(1, 4, 4, 4, 2, 8)
    plan = AttentionPlan(torch.arange(4)[None], 4)
    kernels.set_backend("reference")
    try:
        monkeypatch.setattr("kernels.blockwise.dense_attention", lambda *a: pytest.fail("blockwise ran"))
        assert torch.equal(dense_attention(q, k, v, plan), reference.dense_attention(q, k, v, plan))
    finally:
        kernels.set_backend("auto")
    assert kernels.get_backend() == "blockwise"


def test_import_kernels_does_not_import_triton():
    code = "import sys, torch; before = 'triton' in sys.modules; import kernels; assert before or 'triton' not in sys.modules; print(kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "0.0.0", done.stdout + done.stderr


@pytest.mark.skipif(not has_bf16_units(torch.device("cpu")), reason="this CPU has no units for bf16")
@pytest.mark.parametrize("T, H, Hk", [(1, 4, 2), (2, 4, 2), (255, 6, 2), (256, 3, 3), (300, 7, 1), (513, 4, 4)])
@pytest.mark.parametrize("where", ["prefix", "run", "scattered"])
@pytest.mark.parametrize("by_sdpa", [False, True])
def test_rising_queries_in_bf16_are_as_near_to_exact_as_rounding_lets_them(monkeypatch, T, H, Hk, where, by_sdpa):
    monkeypatch.setattr("kernels.blockwise.dense.has_bf16_sdpa", lambda: by_sdpa)
    monkeypatch.setattr("kernels.blockwise.dense.RISING_SCORES", 3 * 128 * T)  # so that long rows take several turns, the last with fewer heads
    generator = torch.Generator().manual_seed(T)
    at = {"prefix": torch.arange(T), "run": torch.arange(70, 70 + T), "scattered": torch.randperm(3 * T, generator=generator)[:T].sort().values}[where]
    S, positions = int(at[-1]) + 1, at.expand(2, T)
    q, k, v = (torch.randn(2, n, h, 32, generator=generator).bfloat16() for n, h in ((T, H), (S + 5, Hk), (S + 5, Hk)))
    k[:, S:], v[:, S:] = float("nan"), float("nan")  # what no query sees may hold anything
    exact = dense_attention(q.float(), k[:, :S].float(), v[:, :S].float(), AttentionPlan(positions, S))
    calls = []
    by_hand = blockwise.dense.rising_in_bf16
    monkeypatch.setattr(blockwise.dense, "rising_in_bf16", lambda *args: calls.append(1) or by_hand(*args))
    found = dense_attention(q, k, v, AttentionPlan(positions, S + 5))
    assert found.dtype == torch.bfloat16 and len(calls) == (T > 1)
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
    with torch.enable_grad():  # trained, it takes the differentiable way
        dense_attention(q.clone().requires_grad_(), k[:, :S], v[:, :S], AttentionPlan(positions, S)).sum().backward()
    assert len(calls) == (T > 1)


def test_only_rows_of_one_document_at_the_same_positions_in_order_rise():
    run, moved = torch.arange(3, 9).expand(2, 6), torch.stack([torch.arange(3, 9), torch.arange(4, 10)])
    assert AttentionPlan(run, 12).rises and AttentionPlan(torch.tensor([[1, 4, 9]]), 12).rises
    assert AttentionPlan(run - 3, 6).is_prefix and not AttentionPlan(run - 3, 7).is_prefix and not AttentionPlan(run, 9).is_prefix
    assert not AttentionPlan(moved, 12).rises and not AttentionPlan(run.flip(1), 12).rises
    assert not AttentionPlan(torch.tensor([[-1, 0, 1]]), 12).rises  # padding first
    assert not AttentionPlan(run, 12, torch.full_like(run, 2)).rises
