"""Sparse attention: the rule itself, the fast path against the reference, and prefill == chunks == decode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import GQA, assert_same, make, values_and_grads
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import AttentionPlan, SparseSpec, blockwise, dense_attention, pool_keys, reference, select_blocks, sparse_attention

SPEC = SparseSpec(block_size=8, n_selected_blocks=3, window=11, n_sinks=3, dense_len=24)
NAN = float("nan")


def whole(S, B=1):
    return AttentionPlan(torch.arange(S).expand(B, -1), S)


# MASKED_ELEMENTS, SHARED_RATIO, FILLED
WAYS = {"masked": (1 << 40, 0, 0.75), "shared": (0, 1 << 40, 0.5), "copied": (0, 1 << 40, 2.0), "turned round": (0, 0, 0.75), "both": (0, 1, 0.75)}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way of more than a few queries, whatever the size of the test."""
    set_way(monkeypatch, request.param)
    monkeypatch.setattr("kernels.blockwise.by_row.CHUNK_QUERIES", 32)  # several chunks
    monkeypatch.setattr("kernels.blockwise.turned.BAND_QUERIES", 16)
    monkeypatch.setattr("kernels.blockwise.by_row.SELECT_QUERIES", 16)
    return request.param


def set_way(monkeypatch, name):
    monkeypatch.setattr("kernels.blockwise.sparse.FEW_QUERIES", 8)
    monkeypatch.setattr("kernels.blockwise.sparse.MASKED_ELEMENTS", WAYS[name][0])
    monkeypatch.setattr("kernels.blockwise.by_row.SHARED_RATIO", WAYS[name][1])
    monkeypatch.setattr("kernels.blockwise.by_row.FILLED", WAYS[name][2])
    monkeypatch.setattr("kernels.blockwise.by_row.FILLED_TRAINED", WAYS[name][2])
    monkeypatch.setattr("kernels.blockwise.by_row.TILE_QUERIES", 32)
    monkeypatch.setattr("kernels.blockwise.by_row.TILE_KEYS", 24)


def keys_by_loops(q, k, plan, spec):
    """keys[b][t][hk]: the set of keys read, straight from the sentence in docs/architecture.md."""
    B, T, H, D = q.shape
    Hk, G = k.shape[2], H // k.shape[2]
    out = {}
    for b in range(B):
        for t in range(T):
            p, d = int(plan.q_pos[b, t]), int(plan.doc_start[b, t])
            for hk in range(Hk):
                if p < 0:
                    keys = set()
                elif p - d < spec.dense_len:
                    keys = set(range(d, p + 1))
                else:
                    sinks = set(range(d, d + spec.n_sinks))
                    window = set(range(p - spec.window + 1, p + 1))
                    scored = []
                    for n in range(d // spec.block_size, (p + 1) // spec.block_size):
                        block = range(n * spec.block_size, (n + 1) * spec.block_size)
                        if set(block) <= sinks or set(block) <= window:
                            continue
                        mean = k[b, block.start : block.stop, hk].double().mean(0)
                        score = sum(float(q[b, t, hk * G + g].double() @ mean) for g in range(G))
                        scored.append((-score, n, set(block)))
                    chosen = [x[2] for x in sorted(scored)[: spec.n_selected_blocks]]
                    keys = {s for s in sinks.union(window, *chosen) if d <= s <= p}
                out[b, t, hk] = keys
    return out


@pytest.mark.parametrize("spec", [SPEC, SparseSpec(4, 2, 1, 0, 0), SparseSpec(8, 2, 20, 18, 5), SparseSpec(5, 0, 7, 9, 12)])
def test_reference_matches_a_definition_by_loops(spec):
    bs = spec.block_size
    q, k, v = make(2, 30, 64, 4, 2, 8)
    pos = torch.stack([torch.randperm(64)[:30], torch.randint(-1, 64, (30,))])
    start = (pos // 2).clamp(min=0) // bs * bs
    for doc_start in (None, start):
        plan = AttentionPlan(pos, 64, doc_start)
        out = reference.sparse_attention(q, k, v, plan, spec)
        for (b, t, hk), keys in keys_by_loops(q, k, plan, spec).items():
            for h in (hk * 2, hk * 2 + 1):
                expected = torch.zeros(8)
                if keys:
                    keys = sorted(keys)
                    p = torch.softmax(torch.stack([q[b, t, h] @ k[b, s, hk] for s in keys]) * 8**-0.5, 0)
                    expected = sum(p[i] * v[b, s, hk] for i, s in enumerate(keys))
                assert_same(out[b, t, h], expected, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fast_path_matches_reference_in_values_and_gradients(data):
    H, Hk = data.draw(st.sampled_from(GQA))
    B, S = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 120))
    T = data.draw(st.integers(1, 120))
    bs = data.draw(st.sampled_from([1, 3, 8, 16]))
    spec = SparseSpec(bs, data.draw(st.integers(0, 5)), data.draw(st.integers(1, 30)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 50)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pos = torch.randint(-1, S, (B, T), generator=g)  # duplicates and any order
    if data.draw(st.booleans()):
        pos = pos.sort(dim=1).values
    start = (pos * torch.rand(B, T, generator=g)).long().clamp(min=0) // bs * bs if data.draw(st.booleans()) else None
    plan = AttentionPlan(pos, S, start)
    q, k, v = make(B, T, S, H, Hk, 8)
    theirs = values_and_grads(lambda *x: reference.sparse_attention(*x, plan, spec), q, k, v)
    assert torch.equal(select_blocks(q, pool_keys(k, bs), plan, spec), reference.select_blocks(q, pool_keys(k, bs), plan, spec))
    for name in WAYS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_way(monkeypatch, name)
            # a new plan: its cache holds the chunks of one way
            ours = values_and_grads(lambda *x: sparse_attention(*x, AttentionPlan(pos, S, start), spec), q, k, v)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, 1e-4)


def test_reference_passes_fp64_gradcheck():
    q, k, v = (x.requires_grad_() for x in make(1, 7, 40, 4, 2, 4, dtype=torch.float64))
    plan = AttentionPlan(torch.tensor([[39, 3, 25, 25, -1, 31, 0]]), 40)
    assert torch.autograd.gradcheck(lambda *x: reference.sparse_attention(*x, plan, SPEC), (q, k, v))


@pytest.mark.parametrize("T", [90, 5, 1])
def test_all_blocks_chosen_is_dense(way, T):
    q, k, v = make(2, T, 90, 4, 2, 8)
    plan = AttentionPlan(torch.arange(90 - T, 90).expand(2, -1), 90)
    spec = SparseSpec(8, 12, 8, 3, 0)
    assert_same(sparse_attention(q, k, v, plan, spec), dense_attention(q, k, v, plan))


def test_a_key_in_sinks_and_block_and_window_counts_once(way):
    """One block straddles the sinks' end and one the window's start; all are read, so the answer is dense attention."""
    q, k, v = make(1, 48, 48, 2, 1, 8)
    spec = SparseSpec(16, 2, 20, 20, 40)
    plan = whole(48)
    assert_same(sparse_attention(q, k, v, plan, spec), dense_attention(q, k, v, plan))


def test_a_query_always_reads_itself(way):
    q, k, v = make(1, 80, 80, 2, 1, 8)
    for spec in (SparseSpec(8, 0, 1, 0, 0), SparseSpec(8, 1, 1, 0, 0)):
        plan = whole(80)
        changed = v.clone()
        changed[:, 60] += 1
        diff = (sparse_attention(q, k, changed, plan, spec) - sparse_attention(q, k, v, plan, spec)).abs().amax((0, 2, 3))
        assert diff[60] > 1e-3 and (diff[:60] == 0).all()
    assert torch.equal(sparse_attention(q, k, v, whole(80), SparseSpec(8, 0, 1, 0, 0))[:, :, 0], v[:, :, 0])


def test_packed_documents_equal_the_same_documents_alone(way):
    lengths, starts = [70, 33, 49], [0, 72, 112]
    S = 161
    q, k, v = make(1, S, S, 4, 2, 8)
    pos, start = torch.full((1, S), -1), torch.zeros(1, S, dtype=torch.long)
    for n, s in zip(lengths, starts, strict=True):
        pos[0, s : s + n], start[0, s : s + n] = torch.arange(s, s + n), s
    packed = sparse_attention(q, k, v, AttentionPlan(pos, S, start), SPEC)
    for n, s in zip(lengths, starts, strict=True):
        alone = sparse_attention(q[:, s : s + n], k[:, s : s + n], v[:, s : s + n], whole(n), SPEC)
        assert_same(packed[:, s : s + n], alone)
    k[:, :70], v[:, :70], k[:, 112:], v[:, 112:] = 9.0, -5.0, -7.0, 3.0  # other documents change
    assert torch.equal(sparse_attention(q, k, v, AttentionPlan(pos, S, start), SPEC)[:, 72:105], packed[:, 72:105])


@pytest.mark.parametrize("H,Hk", GQA)
def test_decode_reads_only_sinks_window_and_chosen_blocks(H, Hk):
    """Every key that the rule does not name is NaN, for each KV head apart; so are pooled keys of unfinished blocks."""
    S = 100
    q, k, v = make(3, 1, S, H, Hk, 8)
    plan = AttentionPlan(torch.tensor([[95], [60], [13]]), S)
    pooled = pool_keys(k, 8)
    expected = reference.sparse_attention(q, k, v, plan, SPEC, pooled)
    ids = select_blocks(q, pooled, plan, SPEC)
    read = reference.sparse_mask(ids, plan, SPEC)[:, 0].transpose(1, 2)  # (B, S, Hk)
    limit = SPEC.n_sinks + SPEC.window + SPEC.n_selected_blocks * SPEC.block_size
    assert read[:2].sum(1).max() <= limit and read[2].sum(0).tolist() == [14] * Hk
    poisoned = torch.full_like(pooled, NAN)
    for b, p in enumerate([95, 60, 13]):
        poisoned[b, : (p + 1) // 8] = pooled[b, : (p + 1) // 8]
    k, v = (x.masked_fill(~read.unsqueeze(-1), NAN) for x in (k, v))
    assert_same(sparse_attention(q, k, v, plan, SPEC, poisoned), expected)


@pytest.mark.parametrize("H,Hk", [(4, 2), (3, 1), (16, 1)])
def test_prefill_equals_chunks_equals_token_by_token(way, H, Hk):
    S = 77
    q, k, v = make(2, S, S, H, Hk, 8)
    pooled_all = pool_keys(k, 8)
    prefill = sparse_attention(q, k, v, whole(S, 2), SPEC)
    ids = select_blocks(q, pooled_all, whole(S, 2), SPEC)
    for sizes in ([1] * S, [7] * 11, [30, 1, 8, 38], [76, 1]):
        t, n_pooled = 0, 0
        k_cache, v_cache = torch.full_like(k, NAN), torch.full_like(v, NAN)  # slots not yet written are NaN
        pooled = torch.full_like(pooled_all, NAN)
        for n in sizes:
            k_cache[:, t : t + n], v_cache[:, t : t + n] = k[:, t : t + n], v[:, t : t + n]
            done = (t + n) // 8
            pooled[:, n_pooled:done] = pool_keys(k_cache[:, n_pooled * 8 : done * 8], 8)
            n_pooled = done
            plan = AttentionPlan(torch.arange(t, t + n).expand(2, -1), S)
            qn = q[:, t : t + n]
            assert torch.equal(select_blocks(qn, pooled, plan, SPEC), ids[:, t : t + n]), f"selection at {t}"
            assert_same(sparse_attention(qn, k_cache, v_cache, plan, SPEC, pooled), prefill[:, t : t + n])
            t += n


@pytest.mark.parametrize("n", [1, 9, 40])
def test_any_subset_of_queries_in_any_order_gives_the_same_rows(way, n):
    q, k, v = make(2, 90, 90, 4, 2, 8)
    full = sparse_attention(q, k, v, whole(90, 2), SPEC)
    index = torch.stack([torch.randperm(90)[:n], torch.randint(0, 90, (n,))])  # the second row repeats positions
    take = index[:, :, None, None].expand(-1, -1, 4, 8)
    assert_same(sparse_attention(q.gather(1, take), k, v, AttentionPlan(index, 90), SPEC), full.gather(1, take))


def test_ties_go_to_the_lower_block():
    q, k, _ = make(1, 100, 100, 2, 1, 8)
    k[:] = 1.0
    for op in (select_blocks, reference.select_blocks):
        ids = op(q, pool_keys(k, 8), whole(100), SPEC)
        assert ids[0, 99, 0].tolist() == [0, 1, 2] and ids[0, 23, 0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("T", [1, 2])
def test_decode_breaks_ties_as_the_reference_does(T):
    q, k, v = make(1, T, 100, 2, 1, 8)
    k[:] = 1.0  # every score ties; the values tell which blocks were read
    plan = AttentionPlan(torch.arange(100 - T, 100)[None], 100)
    assert_same(sparse_attention(q, k, v, plan, SPEC), reference.sparse_attention(q, k, v, plan, SPEC))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decode_of_ragged_rows_matches_reference_and_reads_nothing_else(data):
    H, Hk = data.draw(st.sampled_from(GQA))
    B, S, bs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 150)), data.draw(st.sampled_from([1, 3, 8, 16]))
    spec = SparseSpec(bs, data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 50)))
    pos = torch.tensor(data.draw(st.lists(st.integers(-1, S - 1), min_size=B, max_size=B)))[:, None]
    start = (pos // 3).clamp(min=0) // bs * bs if data.draw(st.booleans()) else None
    plan = AttentionPlan(pos, S, start)
    q, k, v = make(B, 1, S, H, Hk, 8)
    pooled = pool_keys(k, bs)
    expected = reference.sparse_attention(q, k, v, plan, spec, pooled)
    read = reference.sparse_mask(reference.select_blocks(q, pooled, plan, spec), plan, spec)[:, 0].transpose(1, 2).unsqueeze(-1)
    capacity = S + data.draw(st.integers(0, 9))  # k and v are slices of a longer cache
    k, v = (torch.full((B, capacity, Hk, 8), NAN).index_copy(1, torch.arange(S), x.masked_fill(~read, NAN))[:, :S] for x in (k, v))
    assert_same(sparse_attention(q, k, v, plan, spec, pooled), expected)


def test_one_kv_head_may_have_fewer_keys_than_a_query_lists():
    """Just above dense_len a list of sinks, window and blocks, repetitions hidden, is longer than the table of keys."""
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=16)
    for S in range(17, 21):
        q, k, v = make(1, 1, S, 2, 1, 8)
        plan = AttentionPlan(torch.tensor([[S - 1]]), S)
        for _ in range(2):  # as the layers of one forward share the plan
            assert_same(sparse_attention(q, k, v, plan, spec), reference.sparse_attention(q, k, v, plan, spec))


def test_selection_follows_the_scores_of_its_own_group():
    """Planted: KV head 0's queries point at block 4, head 1's at block 6; swapping the groups would swap the blocks."""
    q, k, _ = make(1, 1, 100, 4, 2, 8)
    k *= 0.01
    k[0, 32:40, 0], k[0, 48:56, 1] = 3.0, 3.0
    q[:] = 1.0
    ids = select_blocks(q, pool_keys(k, 8), AttentionPlan(torch.tensor([[99]]), 100), SparseSpec(8, 1, 8, 0, 0))
    assert ids.flatten().tolist() == [4, 6]


def test_queries_below_dense_len_are_bit_equal_to_dense():
    q, k, v = make(1, 24, 24, 4, 2, 8)
    assert torch.equal(sparse_attention(q, k, v, whole(24), SPEC), dense_attention(q, k, v, whole(24)))


def test_nothing_before_and_behind_documents_is_read(way):
    """Two documents in one row; keys before the first and behind the second are NaN."""
    first, second = torch.arange(8, 45), torch.arange(56, 86)
    plan = AttentionPlan(torch.cat([first, second])[None], 90, torch.cat([first * 0 + 8, second * 0 + 56])[None])
    q, k, v = make(1, len(first) + len(second), 90, 4, 2, 8)
    unseen = (torch.arange(90) < 8) | (torch.arange(90) > 85)
    for spec in (SPEC, SparseSpec(8, 2, 30, 3, 0)):  # the second: sparse queries whose window is longer than their document
        expected = reference.sparse_attention(q, k, v, plan, spec)
        poisoned = (x.masked_fill(unseen[:, None, None], NAN) for x in (k, v))
        assert_same(sparse_attention(q, *poisoned, plan, spec, pool_keys(k, 8)), expected)


def test_tiles_are_shared_where_neighbours_choose_alike(monkeypatch):
    calls = []
    for name in ("_read_shared", "read_turned"):
        read = getattr(blockwise.by_row, name)
        monkeypatch.setattr(blockwise.by_row, name, lambda *args, name=name, read=read: calls.append(name) or read(*args))
    spec, plan = SparseSpec(8, 3, 16, 0, 200), whole(1024)
    monkeypatch.setattr("kernels.blockwise.by_row.SHARED_RATIO", 7)
    for alike, expected in ((True, "_read_shared"), (False, "read_turned")):
        q, k, v = make(1, 1024, 1024, 2, 1, 8)
        if alike:
            q[:], k[:, 32:56] = 1.0, 3.0
        assert_same(sparse_attention(q, k, v, plan, spec), reference.sparse_attention(q, k, v, plan, spec))
        assert set(calls) == {expected}
        calls.clear()


@pytest.mark.parametrize("filled", [0.75, 2.0])
def test_tiles_read_multiples_of_tile_keys_or_all_between(monkeypatch, filled):
    monkeypatch.setattr("kernels.blockwise.by_row.FILLED", filled)
    found, share = [], blockwise.by_row._share
    monkeypatch.setattr(blockwise.by_row, "_share", lambda *args: found.append(share(*args)) or found[-1])
    spec = SparseSpec(8, 3, 16, 4, 200)
    monkeypatch.setattr("kernels.blockwise.by_row.SHARED_RATIO", 1 << 20)
    monkeypatch.setattr("kernels.blockwise.by_row.TILE_QUERIES", 16)
    q, k, v = make(1, 1100, 1100, 2, 1, 8)
    assert_same(sparse_attention(q, k, v, whole(1100), spec), reference.sparse_attention(q, k, v, whole(1100), spec))
    blocks = [b for tiles in found for b, _ in tiles]
    whole_tiles = [len(b) == b[-1] + 1 - b[0] for b in blocks]
    assert all(w or len(b) * 8 % blockwise.by_row.TILE_KEYS == 0 for w, b in zip(whole_tiles, blocks, strict=True))
    assert not all(whole_tiles) and all((b.diff() > 0).all() for b in blocks)


def test_queries_that_lack_blocks_do_not_make_tiles_of_the_others(monkeypatch):
    monkeypatch.setattr("kernels.blockwise.by_row.SHARED_RATIO", 1)
    calls, read = [], blockwise.by_row._read_shared
    monkeypatch.setattr(blockwise.by_row, "_read_shared", lambda q, *args: calls.append(len(q)) or read(q, *args))
    spec, positions = SparseSpec(8, 2, 16, 0, 0), torch.arange(0, 4000, 20)[None]  # neither dense ones nor neighbours
    q, k, v = make(1, 200, 4000, 2, 1, 8)
    monkeypatch.setattr("kernels.blockwise.sparse.MASKED_ELEMENTS", 0)
    plan = AttentionPlan(positions, 4000)
    assert_same(sparse_attention(q, k, v, plan, spec), reference.sparse_attention(q, k, v, plan, spec))
    assert calls == [2]  # those at 0 and 20


def test_bf16_stays_close_to_fp32(way):
    q, k, v = make(1, 90, 90, 4, 2, 8, dtype=torch.bfloat16)
    out = sparse_attention(q, k, v, whole(90), SPEC)
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), reference.sparse_attention(q.float(), k.float(), v.float(), whole(90), SPEC), 2e-2)


@pytest.mark.parametrize("by_sdpa", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 1 << 40])
@pytest.mark.parametrize(("H", "Hk"), [(4, 2), (3, 1), (9, 3)])
def test_products_in_bf16_stay_close_to_fp32(monkeypatch, ratio, H, Hk, by_sdpa):
    """Where a CPU has units for bf16: packed documents, padding, and a prompt behind what is cached; none of it masked is read."""
    monkeypatch.setattr("kernels.blockwise.common.has_bf16_units", lambda device: True)
    for module in ("dense", "by_row"):
        monkeypatch.setattr(f"kernels.blockwise.{module}.has_bf16_sdpa", lambda: by_sdpa)
    monkeypatch.setattr("kernels.blockwise.by_row.SHARED_RATIO_BF16", ratio)
    monkeypatch.setattr("kernels.blockwise.by_row.TILE_QUERIES", 32)
    t = torch.arange(90)
    plans = {
        "whole": whole(90, 2),
        "documents": AttentionPlan(torch.stack([t, t]), 90, torch.stack([t // 48 * 48, t * 0])),
        "padded": AttentionPlan(torch.stack([t, torch.where(t < 70, t, -1)]), 90),
        "behind": AttentionPlan(torch.stack([t + 60, t + 60]), 150),
    }
    for name, plan in plans.items():
        q, k, v = make(2, 90, plan.n_keys, H, Hk, 8, dtype=torch.bfloat16)
        for spec in (SPEC, SparseSpec(16, 1, 5, 0, 20), SparseSpec(4, 0, 9, 3, 0), SparseSpec(8, 2, 60, 12, 0)):
            expected = reference.sparse_attention(q.float(), k.float(), v.float(), plan, spec)
            with torch.no_grad():
                out = sparse_attention(q, k, v, plan, spec)
            assert out.dtype == torch.bfloat16
            assert (out.float() - expected).norm() < 0.01 * expected.norm(), (name, spec)


@pytest.mark.parametrize("heads_together", [True, False])
@pytest.mark.parametrize(("H", "Hk"), [(4, 2), (3, 1), (9, 3), (4, 4)])
@pytest.mark.parametrize("positions", [[[85]], [[3]], [[84, 85]], [[85], [40]], [[-1], [85]], [[85, -1], [40, 41]]])
def test_few_queries_in_bf16_read_a_cache_as_nearly_as_rounding_lets_them(monkeypatch, positions, H, Hk, heads_together):
    """Decode where a CPU has units for bf16: one row and several, sparse and dense queries, padding; what no query sees may hold anything."""
    monkeypatch.setattr("kernels.blockwise.common.has_bf16_units", lambda device: True)
    calls = []
    for module, name in ((blockwise.by_index, "_copied"), (blockwise.dense, "_one_query_in_bf16")):
        by_hand = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, by_hand=by_hand: calls.append(name) or by_hand(*args))
    q_pos = torch.tensor(positions)
    plan = AttentionPlan(q_pos, 90)
    q, k, v = make(len(q_pos), q_pos.shape[1], 90, H, Hk, 16, dtype=torch.bfloat16)
    if not heads_together:  # as a cache lies
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    for b, row in enumerate(q_pos):
        k[b, int(row.max()) + 1 :], v[b, int(row.max()) + 1 :] = NAN, NAN
    pooled = pool_keys(k, SPEC.block_size)
    with torch.no_grad():
        sparse, dense = sparse_attention(q, k, v, plan, SPEC, pooled), dense_attention(q, k, v, plan)
    assert sparse.dtype == dense.dtype == torch.bfloat16
    q, k, v = (x.float() for x in (q, k, v))
    assert_same(sparse.float(), reference.sparse_attention(q, k, v, plan, SPEC), 2e-2)
    assert_same(dense.float(), reference.dense_attention(q, k, v, plan), 2e-2)
    one, short = q_pos.numel() == 1, int(q_pos.max()) < SPEC.dense_len
    assert calls == ["_one_query_in_bf16" if short else "_copied"] + one * ["_one_query_in_bf16"]


def test_two_runs_are_bit_equal(way):
    q, k, v = make(1, 90, 90, 4, 2, 8)
    runs = [values_and_grads(lambda *x: sparse_attention(*x, whole(90), SPEC), q, k, v) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_layers_may_share_one_plan(way):
    plan = whole(90)
    for seed in range(3):
        q, k, v = make(1, 90, 90, 4, 2, 8, seed=seed)
        assert_same(sparse_attention(q, k, v, plan, SPEC), reference.sparse_attention(q, k, v, plan, SPEC))


class LargestTensor(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.n = max(self.n, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("with_grad", [False, True])
def test_prefill_of_8k_tokens_makes_no_tensor_of_queries_times_keys(with_grad):
    T = 8192
    q, k, v = (x.requires_grad_(with_grad) for x in make(1, T, T, 2, 1, 8))
    with LargestTensor() as largest:
        out = sparse_attention(q, k, v, whole(T), SparseSpec())
        if with_grad:
            out.sum().backward()
    assert largest.n < T * T // 8, f"largest tensor holds {largest.n} elements, T * S is {T * T}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_share_a_position_are_no_prefix(monkeypatch, dtype):
    monkeypatch.setattr("kernels.blockwise.common.has_bf16_units", lambda device: True)
    monkeypatch.setattr("kernels.blockwise.dense.has_bf16_sdpa", lambda: True)
    monkeypatch.setattr("kernels.blockwise.sparse.MASKED_ELEMENTS", 0)  # row by row
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.tensor([0, 2, 2]), torch.arange(3, 60)])[None]  # as many dense ones as the last of them stands far
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=40)
    q, k, v = (torch.randn(1, n, h, 16, generator=generator).to(dtype) for n, h in ((60, 4), (60, 2), (60, 2)))
    plan = AttentionPlan(positions, 60)
    found, exact = sparse_attention(q, k, v, plan, spec).float(), reference.sparse_attention(q.float(), k.float(), v.float(), plan, spec)
    dense = positions[0] < 40
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[:, dense], exact[:, dense], atol=tolerance, rtol=tolerance)
