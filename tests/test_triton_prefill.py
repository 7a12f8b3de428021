"""Triton prefill kernels against the reference: pooled keys, selection, attention and its gradients.

On a machine with CUDA the kernels run compiled; elsewhere Triton's interpreter runs them, slowly, so shapes are tiny.
`HYPOTHESIS_PROFILE=many` draws 420 shapes per property.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")

import triton
import triton.language as tl
from conftest import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import assert_same, make, values_and_grads

from kernels import AttentionPlan, SparseSpec, blockwise, prefill_backward_triton, prefill_triton, reference, select_triton, sort_triton, triton_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = [(2, 2), (4, 2), (3, 1), (8, 2), (7, 1), (8, 1), (16, 1)]  # (H, Hk): groups of 1, 2, 3, 4, 7, 8, 16
SPEC = SparseSpec(block_size=8, n_selected_blocks=3, window=11, n_sinks=3, dense_len=24)
NAN = float("nan")


def inputs(*shape, **options):
    return [x.to(DEVICE) for x in make(*shape, **options)]


def plan_of(pos, n_keys, doc_start=None):
    return AttentionPlan(pos.to(DEVICE), n_keys, None if doc_start is None else doc_start.to(DEVICE))


def last_queries(T, S, B=1):
    return plan_of(torch.arange(S - T, S).expand(B, -1), S)


def coarse(x):
    """Rounded to quarters, so that sums of products are exact in fp32 whatever their order, and scores often tie."""
    return (x * 4).round() / 4


def poison(k, v, block_ids, plan, spec):
    """k, v with NaN in every slot that no query reads, per KV head."""
    unread = ~reference.sparse_mask(block_ids, plan, spec).any(1).transpose(1, 2).unsqueeze(-1)
    return k.masked_fill(unread, NAN), v.masked_fill(unread, NAN)


def assert_attends_as_reference(q, k, v, block_ids, plan, spec, tolerance=1e-4):
    mask = reference.sparse_mask(block_ids, plan, spec)
    theirs = values_and_grads(lambda *x: reference.attend(*x, mask), q, k, v)
    ours = values_and_grads(lambda *x: triton_ops.attend(*x, block_ids, plan, spec), q, *poison(k, v, block_ids, plan, spec))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert a.isfinite().all(), f"{name} holds NaN"
        assert_same(a, b, tolerance)


# --- pooled keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S,block_size", [(1, 1), (15, 16), (50, 16), (23, 3)])
def test_pooled_keys_match_reference(S, block_size):
    _, k, _ = inputs(2, 1, S, 2, 2, 24)
    ours, theirs = triton_ops.pool_keys(k, block_size), reference.pool_keys(k, block_size)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert ours.numel() == 0 or (ours - theirs).abs().max() < 1e-6


def test_a_block_pooled_alone_is_bit_equal_to_the_same_block_among_others():
    _, k, _ = inputs(1, 1, 60, 2, 2, 8)
    together = triton_ops.pool_keys(k, 5)
    assert torch.equal(triton_ops.pool_keys(k[:, 35:45], 5), together[:, 7:9])


# --- selection -----------------------------------------------------------------------------------------------------


@settings(max_examples=drawn(8), deadline=None)
@given(st.data())
def test_selection_matches_reference_ties_included(data):
    H, Hk = data.draw(st.sampled_from(GROUPS))
    bs, M = data.draw(st.sampled_from([1, 3, 8, 16])), data.draw(st.sampled_from([1, 2, 3, 5]))
    S, T = data.draw(st.one_of(st.integers(1, 40 * bs), st.integers(130 * bs, 300 * bs))), data.draw(st.integers(1, 40))
    spec = SparseSpec(bs, M, data.draw(st.integers(1, 30)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 50)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pos = torch.randint(-1, S, (1, T), generator=g)
    start = torch.where(pos >= S // 2, S // 2 // bs * bs, 0) if data.draw(st.booleans()) else None
    plan = plan_of(pos, S, start)
    q = coarse(inputs(1, T, 1, H, Hk, 8)[0])
    pooled = coarse(torch.randn(1, S // bs, Hk, 8, generator=g)).to(DEVICE)
    expected = reference.select_blocks(q, pooled, plan, spec)
    pooled[:, (plan.max_pos + 1) // bs :] = NAN
    assert torch.equal(triton_ops.select_blocks(q, pooled, plan, spec), expected)


@pytest.mark.parametrize("order", ["random", "rising", "equal"])
def test_selection_of_long_rows_cuts_its_buffer(order):
    """Of rising scores the best come last; equal ones tie with every floor, and fill the buffer at each step."""
    N, M = 300, 3
    config = select_triton.launch_config(8, M, True)
    assert 2 * config["CAP"] < N, "the row must not fit into the buffer"
    q, _, _ = inputs(1, 3, 1, 2, 1, 8)
    q = coarse(q).abs() + 0.25
    pooled = coarse(torch.randn(1, N, 1, 8, generator=torch.Generator().manual_seed(1)))
    if order == "rising":
        pooled = (torch.arange(N).view(1, N, 1, 1) // 2 / 4.0).expand(-1, -1, -1, 8)
    if order == "equal":
        pooled = torch.ones(1, N, 1, 8)
    plan, spec = plan_of(torch.tensor([[2 * N - 1, 2 * N - 30, 400]]), 2 * N), SparseSpec(2, M, 4, 2, 8)
    pooled = pooled.to(DEVICE)
    assert torch.equal(triton_ops.select_blocks(q, pooled, plan, spec), reference.select_blocks(q, pooled, plan, spec))


@pytest.mark.parametrize("scale", [1.0, 2.0**-44])
def test_selection_allows_for_what_bf16_is_wrong_by(scale):
    """The best block is rounded down in every dim, others, a little worse, up; a bound a fifth smaller would miss it."""
    N, M, D, half, little = 300, 3, 8, 2.0**-8, 2.0**-16
    q = torch.full((1, 1, 1, D), scale)
    pooled = torch.full((1, N, 1, D), 1 + half + little)
    pooled[..., 0] = 1.0
    pooled[0, 128:144] = 0.0
    pooled[0, 256:] = 0.0
    pooled[0, 140] = 1 + half - little
    plan, spec = plan_of(torch.tensor([[2 * N - 1]]), 2 * N), SparseSpec(2, M, 1, 0, 8)
    q, pooled = q.to(DEVICE), (scale * pooled).to(DEVICE)
    assert triton_ops.select_blocks(q, pooled, plan, spec).tolist() == [[[[0, 1, 140]]]] == reference.select_blocks(q, pooled, plan, spec).tolist()


def test_selection_by_a_query_of_zeros_among_huge_keys():
    q, pooled = torch.zeros(1, 1, 1, 8, device=DEVICE), torch.full((1, 300, 1, 8), 2.0**70, device=DEVICE)
    plan, spec = plan_of(torch.tensor([[599]]), 600), SparseSpec(2, 3, 1, 0, 8)
    assert triton_ops.select_blocks(q, pooled, plan, spec).tolist() == [[[[0, 1, 2]]]] == reference.select_blocks(q, pooled, plan, spec).tolist()


def test_selection_in_several_launches(monkeypatch):
    q, k, _ = inputs(1, 90, 90, 2, 1, 8)
    pooled = coarse(reference.pool_keys(k, 8))
    expected = reference.select_blocks(coarse(q), pooled, last_queries(90, 90), SPEC)
    monkeypatch.setattr(select_triton, "SCRATCH_BYTES", 1)
    assert torch.equal(triton_ops.select_blocks(coarse(q), pooled, last_queries(90, 90), SPEC), expected)


@triton.jit
def both_sorts(x, out, n: tl.constexpr, k: tl.constexpr):
    row, column = tl.arange(0, 2)[:, None], tl.arange(0, n)[None, :]
    tile = tl.load(x + row * n + column)
    at = out + row * k + tl.arange(0, k)[None, :]
    tl.store(at, sort_triton.smallest(tile, k, True))
    tl.store(at + 2 * k, sort_triton.smallest(tile, k, False))


def test_counting_sorts_as_the_built_in_sort_does():
    x = torch.randint(-(2**40), 2**40, (2, 16), device=DEVICE)
    for k in (4, 16):
        out = torch.empty(2, 2, k, dtype=torch.int64, device=DEVICE)
        both_sorts[(1,)](x, out, 16, k)
        assert torch.equal(out[0], x.sort(1).values[:, :k]) and torch.equal(out[0], out[1])


# --- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H,Hk", GROUPS)
def test_every_group_size_matches_reference_in_values_and_gradients(H, Hk):
    T, S = 9, 60
    q, k, v = inputs(1, T, S, H, Hk, 24)  # head_dim 24: padded and masked
    plan = last_queries(T, S)
    ids = reference.select_blocks(q, reference.pool_keys(k, 8), plan, SPEC)
    assert_attends_as_reference(q, k, v, ids, plan, SPEC)


@settings(max_examples=drawn(6), deadline=None)
@given(st.data())
def test_drawn_shapes_match_reference_in_values_and_gradients(data):
    H, Hk = data.draw(st.sampled_from(GROUPS))
    B, S, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 12))
    D, bs = data.draw(st.sampled_from([8, 16, 20])), data.draw(st.sampled_from([3, 8, 16]))
    spec = SparseSpec(bs, data.draw(st.integers(0, 5)), data.draw(st.integers(1, 30)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 50)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    way = data.draw(st.sampled_from(["run", "subset", "any"]))
    if way == "run":
        pos = (torch.randint(0, S, (B, 1), generator=g) + torch.arange(T)).clamp(max=S - 1)
    else:
        pos = torch.randint(-1, S, (B, T), generator=g)  # duplicates, padding, any order
        pos = pos.sort(1).values if way == "subset" else pos
    start = torch.where(pos >= S // 2, S // 2 // bs * bs, 0) if data.draw(st.booleans()) else None
    plan = plan_of(pos, S, start)
    q, k, v = inputs(B, T, S, H, Hk, D)
    ids = reference.select_blocks(q, reference.pool_keys(k, bs), plan, spec)
    assert_attends_as_reference(q, k, v, ids, plan, spec)


@settings(max_examples=drawn(4), deadline=None)
@given(st.data())
def test_dense_matches_reference_in_values_and_gradients(data):
    H, Hk = data.draw(st.sampled_from(GROUPS))
    S, T = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pos = torch.randint(-1, S, (1, T), generator=g)
    start = (pos // 2).clamp(min=0) if data.draw(st.booleans()) else None
    plan = plan_of(pos, S, start)
    q, k, v = inputs(1, T, S, H, Hk, 8)
    ours = values_and_grads(lambda *x: triton_ops.dense_attention(*x, plan), q, k, v)
    theirs = values_and_grads(lambda *x: reference.dense_attention(*x, plan), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-4)


@pytest.mark.parametrize("block_size", [24, 64])
def test_blocks_of_more_keys_than_a_program_holds_at_once(block_size):
    spec = SparseSpec(block_size=block_size, n_selected_blocks=1, window=16, n_sinks=3, dense_len=20)
    q, k, v = inputs(1, 12, 4 * block_size, 2, 1, 16)
    plan = last_queries(12, 4 * block_size)
    ids = reference.select_blocks(q, reference.pool_keys(k, block_size), plan, spec)
    assert (ids >= 0).any()
    assert_attends_as_reference(q, k, v, ids, plan, spec)


def test_sparse_attention_of_a_whole_row_matches_reference():
    """Several tiles of queries: dense ones, sparse ones, and one tile of both."""
    q, k, v = (coarse(x) for x in inputs(1, 77, 77, 4, 2, 8))
    plan = last_queries(77, 77)
    pooled = coarse(reference.pool_keys(k, 8))
    ours = values_and_grads(lambda *x: triton_ops.sparse_attention(*x, plan, SPEC, pooled), q, k, v)
    theirs = values_and_grads(lambda *x: reference.sparse_attention(*x, plan, SPEC, pooled), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-4)


@pytest.mark.parametrize("T", [1, 40])
def test_all_blocks_chosen_is_dense(T):
    q, k, v = inputs(1, T, 71, 2, 1, 8)  # 71: one key short of a block
    plan = last_queries(T, 71)
    assert_same(triton_ops.sparse_attention(q, k, v, plan, SparseSpec(8, 9, 8, 3, 0)), reference.dense_attention(q, k, v, plan))


@pytest.mark.parametrize("T", [1, 20])
def test_padding_rows_of_nan_give_zero_and_zero_gradient(T):
    q, k, v = inputs(3, T, 60, 4, 2, 8)
    pos = torch.randint(30, 50, (3, T), generator=torch.Generator().manual_seed(0))
    pos[0] = -1
    pos[1, T // 2 :] = -1
    plan = plan_of(pos, 60)
    k[0], v[0], k[:, 50:], v[:, 50:], q[0] = NAN, NAN, NAN, NAN, NAN
    out, *grads = values_and_grads(lambda *x: triton_ops.sparse_attention(*x, plan, SPEC), q, k, v)
    assert (out[0] == 0).all() and (out[1, T // 2 :] == 0).all() and (out[2] != 0).any()
    for grad in grads:
        assert grad.isfinite().all() and (grad[0] == 0).all()
    nothing = plan_of(torch.full((3, T), -1), 60)
    assert all((x == 0).all() for x in values_and_grads(lambda *x: triton_ops.sparse_attention(*x, nothing, SPEC), q, k, v))


def test_duplicate_and_unordered_block_ids_count_once():
    q, k, v = inputs(1, 5, 80, 2, 1, 8)
    plan = last_queries(5, 80)
    ids = torch.tensor([[5, 2, 5], [-1, -1, -1], [2, -1, 2], [6, 5, 4], [0, 0, 0]], device=DEVICE).view(1, 5, 1, 3)
    assert_attends_as_reference(q, k, v, ids, plan, SPEC)


def test_chunks_and_single_queries_give_the_rows_of_the_whole():
    q, k, v = (coarse(x) for x in inputs(1, 60, 60, 2, 1, 8))
    pooled = coarse(reference.pool_keys(k, 8))
    whole = triton_ops.sparse_attention(q, k, v, last_queries(60, 60), SPEC, pooled)
    for a, b in ((0, 30), (30, 31), (31, 60), (59, 60)):
        part = triton_ops.sparse_attention(q[:, a:b], k, v, plan_of(torch.arange(a, b)[None], 60), SPEC, pooled)
        assert_same(part, whole[:, a:b])


def test_two_runs_are_bit_equal():
    q, k, v = inputs(1, 40, 60, 4, 2, 8)
    plans = [last_queries(40, 60) for _ in range(2)]
    runs = [values_and_grads(lambda *x, plan=plan: triton_ops.sparse_attention(*x, plan, SPEC), q, k, v) for plan in plans]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_fp32(dtype):
    q, k, v = (x.to(dtype) for x in inputs(1, 12, 60, 4, 2, 16))
    plan = last_queries(12, 60)
    ids = reference.select_blocks(q, reference.pool_keys(k, 8), plan, SPEC)
    ours = values_and_grads(lambda *x: triton_ops.attend(*x, ids, plan, SPEC), q, k, v)
    theirs = values_and_grads(lambda *x: reference.attend(*x, reference.sparse_mask(ids, plan, SPEC)), q.float(), k.float(), v.float())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert_same(a.float(), b, 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_keys_that_are_a_slice_of_a_longer_cache():
    q, k, v = inputs(2, 7, 90, 4, 2, 8)
    plan = last_queries(7, 60, 2)
    ids = reference.select_blocks(q, reference.pool_keys(k[:, :60], 8), plan, SPEC)
    expected = reference.attend(q, k[:, :60], v[:, :60], reference.sparse_mask(ids, plan, SPEC))
    assert_same(triton_ops.attend(q.transpose(1, 2).contiguous().transpose(1, 2), k[:, :60], v[:, :60], ids, plan, SPEC), expected)


def test_a_group_larger_than_a_tile_has_rows_is_one_query_per_tile():
    q, k, v = (x.bfloat16() for x in inputs(1, 2, 40, 128, 1, 16))
    plan = last_queries(2, 40)
    assert_same(triton_ops.attend(q, k, v, None, plan, None).float(), reference.dense_attention(q.float(), k.float(), v.float(), plan), 2e-2)


def test_second_derivatives_are_refused():
    q, k, v = inputs(1, 2, 40, 2, 1, 8)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(triton_ops.attend(q, k, v, None, last_queries(2, 40), None).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dq.square().sum() + q.sum()).backward()


# --- ragged batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [reference, blockwise, triton_ops], ids=lambda x: x.__name__)
def test_a_ragged_batch_equals_its_sequences_alone(impl):
    lengths = [35, 1, 0, 26]
    cu_seqlens = torch.tensor([0, 35, 36, 36, 62], device=DEVICE)
    plan = AttentionPlan.from_cu_seqlens(cu_seqlens, 8)
    assert plan.n_keys == 40 + 8 + 0 + 32 and plan.q_pos.shape == (1, 62)
    q, k, v = (coarse(x) for x in inputs(1, 62, 62, 4, 2, 8))
    between = 0.0 if impl is blockwise else NAN
    packed_k, packed_v = (torch.full((1, plan.n_keys, 2, 8), between, device=DEVICE).index_copy(1, plan.q_pos[0], x) for x in (k, v))
    outs = {name: getattr(impl, name) for name in ("dense_attention", "sparse_attention")}
    for name, op in outs.items():
        rest = (SPEC,) if name == "sparse_attention" else ()
        together = op(q, packed_k, packed_v, plan, *rest)
        for i, n in enumerate(lengths):
            part = slice(int(cu_seqlens[i]), int(cu_seqlens[i]) + n)
            if n:
                assert_same(together[:, part], getattr(reference, name)(q[:, part], k[:, part], v[:, part], last_queries(n, n), *rest))


@pytest.mark.parametrize("bad", [torch.tensor([0.0, 3.0]), torch.tensor([1, 3]), torch.tensor([0, 3, 2]), torch.tensor([0]), torch.tensor([[0, 3]])])
def test_bad_cu_seqlens_are_refused(bad):
    with pytest.raises(ValueError, match="cu_seqlens"):
        AttentionPlan.from_cu_seqlens(bad, 8)


# --- ahead of time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["pool_triton", "select_triton", "prefill_triton", "prefill_backward_triton"])
def test_ahead_of_time_cases_name_every_argument(module):
    from kernels import pool_triton

    module = {"pool_triton": pool_triton, "select_triton": select_triton, "prefill_triton": prefill_triton}.get(module, prefill_backward_triton)
    labels = set()
    for kernel, signature, constexprs, options, label in module.aot_cases("sm_90"):
        names = kernel.arg_names
        assert sorted([*signature, *constexprs]) == sorted(names), label
        assert options["num_warps"] in (1, 2, 4, 8, 16) and label not in labels
        labels.add(label)
