"""Sparse prompts in steps: the blocks that `kernels.select_blocks` chooses, and what `kernels.reference` reads of them."""

import pytest
import torch
from conftest import make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strict_steps import strict_steps

from dualbranch import sparse_prompt
from dualbranch.runner import Runner
from dualbranch.sparse_prompt import AHEAD, BLOCKS, GROUP, QUERIES, TILE, Choose, SparsePrompt, best, serves
from kernels import AttentionPlan, SparseSpec, pool_keys, reference, select_blocks
from kernels.blockwise.sparse import FEW_QUERIES


def prompt(spec):
    return SparsePrompt(spec, *sparse_prompt.plain_steps(spec).values(), torch.float32)


def row(seed, n_keys, n_groups=2, n_kv_heads=2, head_dim=8, whole_numbers=False):
    """q, k, v `(1, S, heads, D)`, and S positions in order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n_keys, heads, head_dim) for heads in (n_groups * n_kv_heads, n_kv_heads, n_kv_heads)]
    if whole_numbers:
        return [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_the_best_are_those_of_a_stable_sort(n, length, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, length * AHEAD, TILE, generator=generator)
    scores = (2 * scores).round() if tied else scores
    scores[torch.rand(scores.shape, generator=generator) < 0.3] = float("-inf")
    found, ids = best(scores, torch.arange(length * AHEAD).float()[:, None], min(n, length * AHEAD))
    expected, order = torch.sort(scores, dim=1, descending=True, stable=True)
    exists = found > float("-inf")
    assert torch.equal(found, expected[:, : found.shape[1]])
    assert torch.equal(ids[exists].long(), order[:, : ids.shape[1]][exists])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 4, 8, 16]), st.integers(1, 6), st.integers(1, 40), st.integers(0, 20), st.integers(0, 60), st.integers(1, 3), st.booleans(),
    st.integers(0, 2**31),
)
def test_it_reads_what_the_rule_says(block_size, n_selected, window, n_sinks, dense_len, n_groups, tied, seed):
    spec = SparseSpec(block_size, n_selected, window, n_sinks, dense_len)
    generator = torch.Generator().manual_seed(seed)
    n_keys = int(torch.randint(dense_len + 1, dense_len + 150, (), generator=generator)) + 2 * FEW_QUERIES
    q, k, v = row(seed, n_keys, n_groups, whole_numbers=tied)
    at = torch.arange(n_keys)[torch.rand(n_keys, generator=generator) < 0.7]
    at = torch.cat([at[at < n_keys - FEW_QUERIES], torch.arange(n_keys - FEW_QUERIES, n_keys)])[-100:]
    plan = AttentionPlan(at[None], n_keys)
    assert prompt(spec).takes(plan)
    for pooled in (None, pool_keys(k, block_size)):
        found = prompt(spec)(q[0, at], k, v, pooled, plan)
        torch.testing.assert_close(found, reference.sparse_attention(q[:, at], k, v, plan, spec)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_it_chooses_what_the_rule_says(tied):
    spec, n_keys = SparseSpec(block_size=4, n_selected_blocks=5, window=10, n_sinks=3, dense_len=0), 4 * BLOCKS
    q, k, _ = row(0, n_keys, n_kv_heads=1, whole_numbers=tied)
    pooled, at = pool_keys(k, 4), torch.arange(n_keys - QUERIES, n_keys)
    expected = select_blocks(q[:, at], pooled, AttentionPlan(at[None], n_keys), spec)[0, :, 0]
    found = Choose(spec)(q[0, at].unflatten(0, (-1, TILE)), pooled[0, :, 0].unflatten(0, (-1, GROUP)), at.view(-1, TILE))
    assert torch.equal(found.sort().values, expected)


def test_what_no_query_reads_may_hold_anything():
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=6, n_sinks=2, dense_len=12)
    q, k, v = row(1, 60)
    at = torch.arange(10, 43)
    plan = AttentionPlan(at[None], 60)
    expected = reference.sparse_attention(q[:, at], k, v, plan, spec)[0]
    pooled = pool_keys(k, 4)
    for x, first in ((k, 43), (v, 43), (pooled, 43 // 4)):
        x[:, first:] = float("nan")
    torch.testing.assert_close(prompt(spec)(q[0, at], k, v, pooled, plan), expected, rtol=1e-5, atol=1e-5)


def test_keys_of_another_dtype_are_read_in_that_of_the_queries():
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=6, n_sinks=2, dense_len=12)
    q, k, v = row(2, 60)
    plan = AttentionPlan(torch.arange(60)[None], 60)
    k, v = k.bfloat16(), v.bfloat16()
    found = prompt(spec)(q[0], k, v, None, plan)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference.sparse_attention(q, k.float(), v.float(), plan, spec)[0], rtol=1e-5, atol=1e-5)


def test_queries_of_another_dtype_are_computed_in_that_of_the_steps():
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=6, n_sinks=2, dense_len=12)
    q, k, v = row(3, 60)
    plan, given = AttentionPlan(torch.arange(60)[None], 60), []
    choose, read = sparse_prompt.plain_steps(spec).values()

    def noted(q, k, v, ids, at):
        given.extend(x.dtype for x in (q, k, v))
        return read(q, k, v, ids, at)

    found = SparsePrompt(spec, choose, noted, torch.bfloat16)(q[0], k, v, None, plan)
    assert set(given) == {torch.bfloat16} and found.dtype == torch.float32


def test_it_serves_rows_of_one_document_in_order_and_rules_that_choose():
    spec = SparseSpec(block_size=4, n_selected_blocks=2, window=6, n_sinks=2, dense_len=12)
    takes = prompt(spec).takes
    at = torch.arange(40)
    assert takes(AttentionPlan(at[None], 40)) and takes(AttentionPlan(at[None, -FEW_QUERIES - 1 :], 40))
    assert not takes(AttentionPlan(at[None, -FEW_QUERIES:], 40))
    assert not prompt(SparseSpec(block_size=4, dense_len=40)).takes(AttentionPlan(at[None], 40))  # all dense
    assert prompt(SparseSpec(block_size=4, dense_len=39)).takes(AttentionPlan(at[None], 40))
    assert not takes(AttentionPlan(at.expand(2, -1), 40))
    assert not takes(AttentionPlan(at.flip(0)[None], 40))
    assert not takes(AttentionPlan(torch.cat([at, torch.tensor([-1])])[None], 40))  # padding
    assert not takes(AttentionPlan(at[None], 40, torch.zeros(1, 40).long().index_fill(1, torch.arange(36, 40), 36)))
    assert serves(spec) and not serves(None) and not serves(SparseSpec.sliding(8, 4)) and not serves(SparseSpec(n_selected_blocks=64))


@pytest.mark.parametrize("route", ["fast", "auto"])
def test_a_model_reads_long_prompts_through_them_and_answers_the_same(route):
    model, how = make_tiny_model(400), {"threshold": 0.5} if route == "auto" else {}
    tokens = torch.randint(10, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    steps, calls = strict_steps(model), []
    with torch.no_grad():
        expected, g = model(tokens, route, **how).logits, model(tokens, "auto", threshold=0.5).g
        assert ((g < 0.5).any() and (g >= 0.5).any()) or route == "fast", "auto has to split the prompt"
        model.runner = Runner(model, {name: lambda *args, n=name, step=step: calls.append(n) or step(*args) for name, step in steps.items()})
        for cache in (None, model.new_cache(1, 100)):
            calls.clear()
            torch.testing.assert_close(model(tokens, route, cache=cache, **how).logits, expected, rtol=1e-4, atol=1e-4)
            assert {"choose", "read"} <= set(calls)
