"""Triton decode, contiguous and paged, against the reference: on a GPU where there is one, otherwise through Triton's interpreter.

HYPOTHESIS_PROFILE=many draws 420 shapes in each of the two drawn tests (otherwise 6, or 60 on a GPU).
"""

import pytest
import torch
from conftest import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux x86_64)")

from kernels import AttentionPlan, SparseSpec, paged_reference, pool_keys, reference
from kernels import decode_triton as dt
from kernels.paged import PagedKV, PagedWriter, dequantize_pages, quantize_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on where there is no GPU
SPEC = SparseSpec(block_size=8, n_selected_blocks=2, window=11, n_sinks=3, dense_len=24)
NAN = float("nan")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value: 2 to 4 units in the last place
many_shapes = settings(
    max_examples=drawn(6 if DEVICE == "cpu" else 60), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Splits as on a device with room for this many programs: an interpreted program takes some 50 ms, and a split should hold several tiles."""
    monkeypatch.setattr(dt, "TARGET_PROGRAMS", 4)
    monkeypatch.setattr(dt, "launch_config", small_tiles(dt.launch_config))


def small_tiles(launch_config):
    """Tiles of 32 keys and 16 query rows, so that small tests have several of each."""

    def config(kernel, *args, **kwargs):
        sizes = launch_config(kernel, *args, **kwargs)
        return {name: min(size, {"BLOCK_S": 32, "BLOCK_R": 16, "BLOCK_N": 32 if kernel == "score" else size}.get(name, size)) for name, size in sizes.items()}

    return config


def make(B, T, S, H, Hk, D, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=g).to(DEVICE, dtype)
    k, v = (torch.randn(B, S, Hk, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    return q, k, v


def make_plan(q_pos, n_keys, doc_start=None):
    q_pos = torch.as_tensor(q_pos).to(DEVICE)
    return AttentionPlan(q_pos, n_keys, None if doc_start is None else torch.as_tensor(doc_start).to(DEVICE))


def assert_same(ours, theirs, tolerance=None):
    tolerance = tolerance or TOLERANCE[ours.dtype]
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, allowed = (ours.float() - theirs.float()).abs().max().item(), tolerance * max(1.0, theirs.float().abs().max().item())
    assert error <= allowed, f"largest difference {error:.2e}, allowed {allowed:.2e}"


def to_pages(k, v, page_size, block_size, n_used, seed=0, n_spare=3, dtype=None):
    """k, v (B, S, Hk, D) with S a multiple of page_size, as pages in random places; what lies at and after n_used[b] is NaN (int8: garbage).

    Pages wholly after n_used[b] do not exist; spare pages, unused slots and unfinished pooled keys are poisoned.
    """
    B, S, Hk, D = k.shape
    per_row = S // page_size
    g = torch.Generator().manual_seed(seed)
    n_pages = B * per_row + n_spare
    table = torch.randperm(n_pages, generator=g)[: B * per_row].view(B, per_row).to(torch.int32)
    table[torch.arange(per_row) * page_size >= torch.as_tensor(n_used)[:, None]] = -1
    pages = [torch.full((n_pages, page_size, Hk, D), NAN, device=DEVICE) for _ in range(2)]
    pooled = torch.full((n_pages, page_size // block_size, Hk, D), NAN, device=DEVICE)
    for b in range(B):
        for s in range(n_used[b]):
            for x, full in zip((k, v), pages, strict=True):
                full[table[b, s // page_size], s % page_size] = x[b, s].float()
            if (s + 1) % block_size == 0:
                n = s // block_size
                per_page = page_size // block_size
                pooled[table[b, n // per_page], n % per_page] = pool_keys(k[b : b + 1, n * block_size : s + 1], block_size)[0, 0]
    if dtype == torch.int8:
        scaled = [quantize_pages(x.nan_to_num(0)) for x in pages]
        poison = [torch.where(x.isnan(), 101, y).to(torch.int8) for x, (y, _) in zip(pages, scaled, strict=True)]
        scales = [torch.where(x.isnan().all(3).all(1), NAN, s) for x, (_, s) in zip(pages, scaled, strict=True)]
        return PagedKV(*poison, table.to(DEVICE), pooled, *scales)
    return PagedKV(*(x.to(k.dtype) for x in pages), table.to(DEVICE), pooled)


# --- contiguous ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H,Hk", [(1, 1), (4, 2), (3, 1), (4, 1), (7, 1), (8, 1), (16, 1), (40, 1)])  # 40: more heads than a tile has rows
def test_every_group_matches_the_reference(H, Hk):
    q, k, v = make(1, 2, 90, H, Hk, 16)
    plan = make_plan([[89, 61]], 90)
    pooled = pool_keys(k, 8)
    assert_same(dt.sparse_decode(q, k, v, plan, SPEC, pooled), reference.sparse_attention(q, k, v, plan, SPEC, pooled))
    assert_same(dt.dense_decode(q, k, v, plan), reference.dense_attention(q, k, v, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [32, 48])
def test_half_types_stay_close_to_the_reference(dtype, D):
    q, k, v = make(1, 1, 90, 4, 2, D, dtype=dtype)
    plan = make_plan([[88]], 90)
    pooled = pool_keys(k, 8)
    assert_same(dt.sparse_decode(q, k, v, plan, SPEC, pooled), reference.sparse_attention(q, k, v, plan, SPEC, pooled))
    assert_same(dt.dense_decode(q, k, v, plan), reference.dense_attention(q, k, v, plan))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_several_queries_at_ragged_positions_match_the_reference(T):
    q, k, v = make(3, T, 100, 4, 1, 16)
    pos = torch.stack([torch.arange(100 - T, 100), torch.arange(30, 30 + T), torch.full((T,), -1)])
    pos[1, -1] = 12  # a dense query among sparse ones
    plan = make_plan(pos, 100)
    pooled = pool_keys(k, 8)
    sparse = dt.sparse_decode(q, k, v, plan, SPEC, pooled)
    assert_same(sparse, reference.sparse_attention(q, k, v, plan, SPEC, pooled))
    assert_same(dt.dense_decode(q, k, v, plan), reference.dense_attention(q, k, v, plan))
    assert (sparse[2] == 0).all()


def test_a_single_key_and_block_edges():
    q, k, v = make(1, 1, 66, 2, 1, 16)
    spec = SparseSpec(8, 2, 8, 1, 0)
    for S in (1, 7, 8, 9, 16, 17, 64, 65, 66):
        plan = make_plan([[S - 1]], S)
        pooled = pool_keys(k[:, :S], 8)
        assert_same(dt.sparse_decode(q, k[:, :S], v[:, :S], plan, spec, pooled), reference.sparse_attention(q, k[:, :S], v[:, :S], plan, spec, pooled))
        assert_same(dt.dense_decode(q, k[:, :S], v[:, :S], plan), reference.dense_attention(q, k[:, :S], v[:, :S], plan))


def test_all_blocks_chosen_is_dense():
    q, k, v = make(1, 2, 90, 4, 2, 16)
    plan = make_plan([[89, 70]], 90)
    assert_same(dt.sparse_decode(q, k, v, plan, SparseSpec(8, 12, 8, 3, 0), pool_keys(k, 8)), dt.dense_decode(q, k, v, plan))


def test_a_key_in_sinks_and_block_and_window_counts_once():
    q, k, v = make(1, 1, 48, 2, 1, 16)
    plan = make_plan([[47]], 48)
    assert_same(dt.sparse_decode(q, k, v, plan, SparseSpec(16, 2, 20, 20, 40), pool_keys(k, 16)), dt.dense_decode(q, k, v, plan))


def test_queries_below_dense_len_are_dense():
    q, k, v = make(2, 1, 24, 2, 1, 16)
    plan = make_plan([[23], [4]], 24)
    assert torch.equal(dt.sparse_decode(q, k, v, plan, SPEC, pool_keys(k, 8)), dt.dense_decode(q, k, v, plan))


def test_documents_of_one_row_do_not_meet():
    """Queries of two documents, with NaN in a third that lies between them."""
    q, k, v = make(1, 3, 144, 2, 1, 16)
    k[:, 48:64], v[:, 48:64] = NAN, NAN
    plan = make_plan([[140, 47, 75]], 144, [[64, 0, 64]])
    pooled = pool_keys(k, 8)
    assert_same(dt.sparse_decode(q, k, v, plan, SPEC, pooled), reference.sparse_attention(q, k, v, plan, SPEC, pooled))
    assert_same(dt.dense_decode(q, k, v, plan), reference.dense_attention(q, k, v, plan))


@pytest.mark.parametrize("M,N", [(1, 7), (3, 40), (8, 8), (5, 130), (16, 300)])
@pytest.mark.parametrize("n_values", [3, 10_000])
def test_the_best_blocks_are_chosen_with_ties_to_the_lower_id(M, N, n_values):
    """Scores with many ties, zeros of both signs and unselectable blocks; more blocks than one tile holds."""
    g = torch.Generator().manual_seed(N)
    scores = (torch.randint(-n_values, n_values, (3, N), generator=g) / 7).to(DEVICE)
    scores = torch.where(scores == 0, scores * -1.0, scores)
    scores[0, 1::2], scores[1] = float("-inf"), float("-inf")
    scores[2, ::3] = 0.0
    ids = torch.empty(3, M, dtype=torch.int32, device=DEVICE)
    dt.choose_kernel[(3,)](scores, ids, N, M=M, BLOCK_M=16, BLOCK_N=128, ONE_TILE=N <= 128)
    for row, chosen in zip(scores.tolist(), ids.tolist(), strict=True):
        order = sorted((-x, n) for n, x in enumerate(row) if x > float("-inf"))
        best = sorted(n for _, n in order[:M])
        assert chosen == best + [-1] * (M - len(best))


def test_selection_follows_the_scores_of_its_own_group():
    """Planted: KV head 0's queries point at block 4, head 1's at block 6; swapping the groups would swap the blocks."""
    q, k, _ = make(1, 1, 100, 4, 2, 16)
    k *= 0.01
    k[0, 32:40, 0], k[0, 48:56, 1] = 3.0, 3.0
    q[:] = 1.0
    ids, M = dt._choose(q, pool_keys(k, 8), make_plan([[99]], 100), SparseSpec(8, 1, 8, 0, 0), None)
    assert M == 1 and ids.flatten().tolist() == [4, 6]


def test_decode_reads_only_sinks_window_and_chosen_blocks():
    """Every key that the rule does not name is NaN, for each KV head apart; so are pooled keys of unfinished blocks."""
    q, k, v = make(3, 1, 100, 4, 2, 16)
    plan = make_plan([[95], [60], [13]], 100)
    pooled = pool_keys(k, 8)
    expected = reference.sparse_attention(q, k, v, plan, SPEC, pooled)
    read = reference.sparse_mask(reference.select_blocks(q, pooled, plan, SPEC), plan, SPEC)[:, 0].transpose(1, 2)  # (B, S, Hk)
    assert read[:2].sum(1).max() <= SPEC.n_sinks + SPEC.window + SPEC.n_selected_blocks * SPEC.block_size
    poisoned = torch.full_like(pooled, NAN)
    for b, p in enumerate([95, 60, 13]):
        poisoned[b, : (p + 1) // 8] = pooled[b, : (p + 1) // 8]
    k, v = (x.masked_fill(~read.unsqueeze(-1), NAN) for x in (k, v))
    assert_same(dt.sparse_decode(q, k, v, plan, SPEC, poisoned), expected)


def test_slices_of_a_longer_cache_and_odd_strides_are_read_in_place_or_copied():
    q, k, v = make(2, 1, 60, 2, 1, 16)
    plan = make_plan([[49], [20]], 50)
    expected = dt.dense_decode(q, k[:, :50].contiguous(), v[:, :50].contiguous(), plan)
    assert torch.equal(dt.dense_decode(q, k[:, :50], v[:, :50], plan), expected)
    wide = [torch.cat([x, x[..., :3]], -1)[:, :50, :, :16] for x in (k, v)]  # vectors 19 apart: not on 16-byte boundaries
    assert torch.equal(dt.dense_decode(q, *wide, plan), expected)


def test_two_runs_are_bit_equal():
    q, k, v = make(1, 2, 150, 4, 1, 16)
    plan = make_plan([[149, 100]], 150)
    pooled = pool_keys(k, 8)
    assert torch.equal(dt.sparse_decode(q, k, v, plan, SPEC, pooled), dt.sparse_decode(q, k, v, plan, SPEC, pooled))
    assert torch.equal(dt.dense_decode(q, k, v, plan), dt.dense_decode(q, k, v, plan))


def test_head_dim_that_cannot_be_compiled_is_refused():
    q, k, v = make(1, 1, 8, 1, 1, 8)
    with pytest.raises(ValueError, match="multiple of 16, got 8"):
        dt.dense_decode(q, k, v, make_plan([[7]], 8))


def test_splits_cover_the_keys_and_none_is_empty():
    for n_keys in (0, 1, 31, 32, 33, 1000, 131_072):
        for n_programs in (1, 4, 300):
            n_splits, per_split = dt.split_keys(n_keys, n_programs, 32)
            assert n_splits * per_split >= n_keys > (n_splits - 1) * per_split - (n_keys == 0)
            assert n_splits == 1 or n_splits * n_programs <= dt.TARGET_PROGRAMS


# --- paged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [8, 24])
def test_pages_match_the_reference_and_the_same_keys_laid_end_to_end(page_size):
    q, k, v = make(2, 1, 96, 4, 2, 16)
    kv = to_pages(k, v, page_size, 8, [92, 41])
    plan = make_plan([[91], [40]], 96)
    sparse, dense = dt.paged_sparse_attention(q, kv, plan, SPEC), dt.paged_dense_attention(q, kv, plan)
    assert_same(sparse, paged_reference.paged_sparse_attention(q, kv, plan, SPEC))
    assert_same(dense, paged_reference.paged_dense_attention(q, kv, plan))
    assert torch.equal(sparse, dt.sparse_decode(q, k, v, plan, SPEC, pool_keys(k, 8)))
    assert torch.equal(dense, dt.dense_decode(q, k, v, plan))


def test_results_do_not_depend_on_where_pages_lie():
    q, k, v = make(2, 1, 96, 2, 1, 16)
    plan = make_plan([[95], [50]], 96)
    first = to_pages(k, v, 16, 8, [96, 51], seed=0)
    second = to_pages(k, v, 16, 8, [96, 51], seed=1, n_spare=9)
    assert not torch.equal(first.page_table, second.page_table)
    assert torch.equal(dt.paged_sparse_attention(q, first, plan, SPEC), dt.paged_sparse_attention(q, second, plan, SPEC))
    assert torch.equal(dt.paged_dense_attention(q, first, plan), dt.paged_dense_attention(q, second, plan))


def test_rows_may_share_pages():
    q, k, v = make(1, 1, 64, 2, 1, 16)
    q = torch.cat([q, q])
    kv = to_pages(k, v, 16, 8, [64])
    shared = PagedKV(kv.k_pages, kv.v_pages, kv.page_table.expand(2, -1), kv.pooled_pages)
    plan = make_plan([[63], [40]], 64)
    assert_same(dt.paged_sparse_attention(q, shared, plan, SPEC), paged_reference.paged_sparse_attention(q, shared, plan, SPEC))


def test_pages_that_are_not_chosen_are_not_read():
    q, k, v = make(1, 1, 96, 2, 1, 16)
    kv = to_pages(k, v, 8, 8, [96])
    plan = make_plan([[95]], 96)
    expected = paged_reference.paged_sparse_attention(q, kv, plan, SPEC)
    read = reference.sparse_mask(reference.select_blocks(q, pool_keys(k, 8), plan, SPEC), plan, SPEC)[0, 0, 0]  # (S,)
    unread = kv.page_table[0].long()[~read.view(-1, 8).any(1)]
    assert len(unread) >= 5
    kv.k_pages[unread], kv.v_pages[unread] = NAN, NAN
    assert_same(dt.paged_sparse_attention(q, kv, plan, SPEC), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_pages_match_the_int8_reference_and_stay_near_the_exact_answer(dtype):
    q, k, v = make(2, 1, 96, 4, 2, 16, dtype=dtype)
    plan = make_plan([[91], [40]], 96)
    kv = to_pages(k, v, 16, 8, [92, 41], dtype=torch.int8)
    sparse, dense = dt.paged_sparse_attention(q, kv, plan, SPEC), dt.paged_dense_attention(q, kv, plan)
    assert_same(sparse, paged_reference.paged_sparse_attention(q, kv, plan, SPEC))
    assert_same(dense, paged_reference.paged_dense_attention(q, kv, plan))
    exact = reference.dense_attention(q.float(), k.float(), v.float(), plan)
    step = max(kv.k_scale.nan_to_num(0).max().item(), kv.v_scale.nan_to_num(0).max().item())
    assert 0 < (dense.float() - exact).abs().max() < 3 * step, "each value is off by at most step / 2; scores by some multiple of it"


def test_parts_that_do_not_fit_are_refused():
    k, v = torch.zeros(4, 16, 2, 16), torch.zeros(4, 16, 2, 16)
    table, pooled, scale = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(4, 2, 2, 16), torch.zeros(4, 2)
    for parts, message in [
        ((k, v[:3], table), "k_pages and v_pages"),
        ((k, v, table.long()), "int32"),
        ((k, v, table, pooled[:, :0]), "pooled_pages"),
        ((k, v, table, torch.zeros(4, 3, 2, 16)), "multiple of block_size"),
        ((k, v, table, pooled, scale, scale), "int8 pages and no others"),
        ((k.to(torch.int8), v.to(torch.int8), table), "k_scale is missing"),
        ((k.to(torch.int8), v.to(torch.int8), table, pooled, scale[:3], scale), "k_scale must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            PagedKV(*parts)
    kv = PagedKV(k, v, table, pooled)
    assert (kv.page_size, kv.block_size, kv.n_keys, kv.is_int8) == (16, 8, 32, False)
    q = torch.zeros(1, 1, 4, 16)
    for spec, n_keys, message in [(SparseSpec(16), 32, "block_size = 16"), (SPEC, 40, "n_keys = 40")]:
        plan = AttentionPlan(torch.tensor([[5]]), n_keys)
        for ops in (dt, paged_reference):
            with pytest.raises(ValueError, match=message):
                ops.paged_sparse_attention(q, kv, plan, spec)


# --- writing -------------------------------------------------------------------------------------------------------


def test_token_by_token_decode_equals_prefill_across_block_and_page_edges():
    """Pages are written as tokens come; unwritten slots are NaN; each complete block is pooled exactly once."""
    S, page_size = 45, 16
    q, k, v = make(2, S, 48, 2, 1, 16)
    whole = make_plan(torch.arange(S).expand(2, -1), 48)
    prefill = {"sparse": reference.sparse_attention(q, k, v, whole, SPEC, pool_keys(k, 8)), "dense": reference.dense_attention(q, k, v, whole)}
    table = torch.tensor([[5, 0, 3], [2, 6, 1]], dtype=torch.int32, device=DEVICE)
    kv = PagedKV.empty(7, page_size, 1, 16, table, 8, torch.float32)
    for x in (kv.k_pages, kv.v_pages, kv.pooled_pages):
        x.fill_(NAN)
    n_pooled, t = 0, 0
    for n in [21, 1, 1, 1, 5, 2, 1, 1, 12]:
        writer = PagedWriter(table, torch.full((2,), t), torch.full((2,), n), n, page_size, 8)
        writer.write(kv, k[:, t : t + n], v[:, t : t + n])
        n_pooled += len(writer.completed)
        t += n
        if n <= 5:
            plan = make_plan(torch.arange(t - n, t).expand(2, -1), 48)
            assert_same(dt.paged_sparse_attention(q[:, t - n : t], kv, plan, SPEC), prefill["sparse"][:, t - n : t])
            assert_same(dt.paged_dense_attention(q[:, t - n : t], kv, plan), prefill["dense"][:, t - n : t])
    assert t == S and n_pooled == 2 * (S // 8)
    assert torch.equal(paged_reference.gather_pages(kv.k_pages, table)[:, :S], k[:, :S])
    assert torch.equal(paged_reference.gather_pages(kv.pooled_pages, table)[:, : S // 8], pool_keys(k, 8)[:, : S // 8])


def test_ragged_rows_write_only_their_own_tokens():
    _, k, v = make(3, 1, 6, 1, 2, 16)
    table = torch.tensor([[0, 1], [2, -1], [3, -1]], dtype=torch.int32, device=DEVICE)
    kv = PagedKV.empty(5, 8, 2, 16, table, 4, torch.float32)
    writer = PagedWriter(table, torch.tensor([5, 0, 2]), torch.tensor([6, 4, 0]), 6, 8, 4)
    writer.write(kv, k, v)
    keys = paged_reference.gather_pages(kv.k_pages, table)
    assert torch.equal(keys[0, 5:11], k[0]) and torch.equal(keys[1, :4], k[1, :4])
    assert (keys[0, :5] == 0).all() and (keys[0, 11:] == 0).all() and (keys[1, 4:8] == 0).all() and (kv.k_pages[3:] == 0).all()
    assert sorted(writer.completed.tolist()) == [1, 4]  # row 0's block 1; its block 2 lacks a token; row 1's block 0
    assert (kv.pooled_pages.abs().sum((2, 3)) > 0).nonzero().tolist() == [[0, 1], [2, 0]]


def test_writes_without_a_page_or_into_a_shared_page_are_refused():
    table = torch.tensor([[0, -1], [0, 2]], dtype=torch.int32, device=DEVICE)
    zero, one = torch.tensor([0, 0]), torch.tensor([1, 1])
    with pytest.raises(ValueError, match="row 0 has no page for position 8"):
        PagedWriter(table, torch.tensor([7, 8]), torch.tensor([2, 1]), 2, 8, 4)
    with pytest.raises(ValueError, match="copy a shared page"):
        PagedWriter(table, zero, one, 1, 8, 4)
    with pytest.raises(ValueError, match="needs room for 17 tokens"):
        PagedWriter(table, torch.tensor([0, 16]), one, 1, 8, 4)
    with pytest.raises(ValueError, match="multiple of block_size"):
        PagedWriter(table, zero, one, 1, 8, 3)


def test_int8_pages_may_be_written_token_by_token():
    """A growing page is rounded again whenever its scale grows: at most a few times half a step from the keys themselves."""
    _, k, v = make(2, 1, 24, 1, 2, 16)
    k[:, 5] *= 4
    table = torch.tensor([[1, 0, 4], [2, 3, 5]], dtype=torch.int32, device=DEVICE)
    kv = PagedKV.empty(6, 8, 2, 16, table, 4, torch.int8)
    kv.k_pages.fill_(77)  # garbage in a fresh page
    kv.k_scale.fill_(NAN)
    for t in range(24):
        PagedWriter(table, torch.full((2,), t), torch.full((2,), 1), 1, 8, 4).write(kv, k[:, t : t + 1], v[:, t : t + 1])
    stored = paged_reference.gather_pages(kv.k_pages, table, kv.k_scale)
    step = kv.k_scale[table.long()].repeat_interleave(8, 1).unsqueeze(-1)  # (B, S, Hk, 1)
    assert ((stored - k).abs() <= 2 * step).all()
    pooled = paged_reference.gather_pages(kv.pooled_pages, table)
    assert ((pooled - pool_keys(k, 4)).abs() <= 2 * step[:, ::4]).all()


def test_quantised_pages_are_within_half_a_step():
    x = torch.randn(5, 8, 2, 16, generator=torch.Generator().manual_seed(0))
    x[3], x[1, :, 1] = 0, 1e-30
    pages, scale = quantize_pages(x)
    assert pages.dtype == torch.int8 and ((dequantize_pages(pages, scale) - x).abs() <= scale[:, None, :, None] * 0.5001 + 1e-32).all()


# --- drawn ---------------------------------------------------------------------------------------------------------


def draw_case(data, paged):
    """Values are small multiples of 1/4, so that scores are exact and ties are many: a choice must agree to the last block."""
    H, Hk = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1), (7, 1), (16, 1)]))
    B, T, D = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 1, 2, 3, 5])), data.draw(st.sampled_from([16, 32]))
    bs = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    page_size = bs * data.draw(st.integers(1, 4))
    S = page_size * data.draw(st.integers(1, max(1, 120 // page_size))) if paged else data.draw(st.integers(1, 120))
    spec = SparseSpec(bs, data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 50)))
    pos = torch.tensor(data.draw(st.lists(st.lists(st.integers(-1, S - 1), min_size=T, max_size=T), min_size=B, max_size=B)))
    start = (pos // 3).clamp(min=0) // bs * bs if data.draw(st.booleans()) else None
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k = (torch.randint(-4, 5, shape, generator=g) / 4 for shape in ((B, T, H, D), (B, S, Hk, D)))
    v = torch.randn(B, S, Hk, D, generator=g)
    return *(x.to(DEVICE) for x in (q, k, v)), make_plan(pos, S, start), spec, page_size


@many_shapes
@given(st.data())
def test_decode_of_drawn_shapes_matches_the_reference_and_reads_nothing_else(data):
    q, k, v, plan, spec, _ = draw_case(data, paged=False)
    pooled = pool_keys(k, spec.block_size)
    ids, M = dt._choose(q, pooled, plan, spec, None)
    expected_ids = reference.select_blocks(q, pooled, plan, spec)
    assert torch.equal(ids.long(), expected_ids[..., :M]) if M else (expected_ids == -1).all()
    expected = reference.sparse_attention(q, k, v, plan, spec, pooled)
    read = reference.sparse_mask(expected_ids, plan, spec).any(1).transpose(1, 2).unsqueeze(-1)  # (B, S, Hk, 1)
    assert_same(dt.sparse_decode(q, *(x.masked_fill(~read, NAN) for x in (k, v)), plan, spec, pooled), expected)
    seen = reference.visible_keys(plan).any(1)[..., None, None]
    assert_same(dt.dense_decode(q, *(x.masked_fill(~seen, NAN) for x in (k, v)), plan), reference.dense_attention(q, k, v, plan))


@many_shapes
@given(st.data())
def test_pages_of_drawn_shapes_match_the_reference(data):
    q, k, v, plan, spec, page_size = draw_case(data, paged=True)
    n_used = [p + 1 for p in plan.row_max]
    kv = to_pages(k, v, page_size, spec.block_size, n_used, dtype=torch.int8 if data.draw(st.booleans()) else None)
    assert_same(dt.paged_sparse_attention(q, kv, plan, spec), paged_reference.paged_sparse_attention(q, kv, plan, spec))
    assert_same(dt.paged_dense_attention(q, kv, plan), paged_reference.paged_dense_attention(q, kv, plan))
