"""Claims about the rows of a `KVCache`: each holds a text of its own, wherever it lies and whatever lay there before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.cache import CacheFull

N_ROWS, CAPACITY = 4, 80

rows = st.tuples(st.integers(0, N_ROWS - 1), st.integers(1, N_ROWS))  # the first one, and how many
actions = st.one_of(
    st.tuples(st.just("copy"), st.permutations(range(N_ROWS)), st.integers(1, N_ROWS // 2)),
    st.tuples(st.just("truncate"), rows, st.integers(0, 40)),
)


@settings(max_examples=15, deadline=None)
@given(rounds=st.lists(st.tuples(st.lists(actions, max_size=3), rows, st.integers(1, 30)), min_size=2, max_size=4))
@torch.no_grad()
def test_rows_written_cut_and_copied_in_any_order_hold_what_a_cold_run_of_each_text_gives(tiny, rounds):
    model, generator = tiny[0], torch.Generator().manual_seed(0)
    cache, texts, routes = model.new_cache(N_ROWS, CAPACITY), [[]] * N_ROWS, [[]] * N_ROWS
    for store in (*cache.k, *cache.v, *cache.pooled.values()):
        store.fill_(float("nan"))
    for before, (start, n), n_new in rounds:
        for what, which, amount in before:
            if what == "copy":
                sources, targets = which[:amount], which[amount : 2 * amount]
                cache.copy_rows(sources, targets)
                for source, target in zip(sources, targets, strict=True):
                    texts[target], routes[target] = texts[source], routes[source]
            else:
                part = slice(which[0], min(sum(which), N_ROWS))
                cache.rows(part.start, part.stop).truncate(amount)
                texts[part], routes[part] = [x[:amount] for x in texts[part]], [x[:amount] for x in routes[part]]
        stop = min(start + n, N_ROWS)
        n_new = min(n_new, CAPACITY - max(map(len, texts)))
        if n_new:
            tokens = torch.randint(10, model.config.vocab_size, (stop - start, n_new), generator=generator)
            out = model(tokens, "auto", threshold=0.5, cache=cache.rows(start, stop))
            for b, new in enumerate(tokens.tolist(), start):
                texts[b] = texts[b] + new
                cold = model(torch.tensor([texts[b]]), "auto", threshold=0.5)
                routes[b] = cold.use_slow[0].tolist()
                torch.testing.assert_close(out.logits[b - start], cold.logits[0, -n_new:], atol=1e-4, rtol=1e-4)
        assert cache.n_cached.tolist() == [len(text) for text in texts]
        assert [row[: len(text)] for row, text in zip(cache.from_slow.tolist(), texts, strict=True)] == routes


@pytest.mark.parametrize("route", ["slow", "fast", "auto", "mixed"])
@torch.no_grad()
def test_a_long_prompt_read_in_parts_gives_what_it_gives_in_one(tiny, monkeypatch, route):
    model, generator = tiny[0], torch.Generator().manual_seed(1)
    tokens = torch.randint(10, model.config.vocab_size, (1, 61), generator=generator)
    routes = torch.rand(1, 61, generator=generator) < 0.5 if route == "mixed" else route
    found = []
    for at_once in (2048, 16):
        monkeypatch.setattr("dualbranch.model.PROMPT_AT_ONCE", at_once)
        cache = model.new_cache(1, 80)
        model(tokens[:, :7], "slow", cache=cache)
        found.append((model(tokens, routes, cache=cache, budget=0.5 if route == "auto" else None, last_only=True), cache))
    (whole, one), (parts, other) = found
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts.hidden, whole.hidden, atol=1e-4, rtol=1e-4)
    assert (parts.g is None) == (whole.g is None) and (parts.g is None or torch.allclose(parts.g, whole.g, atol=1e-5))
    assert (parts.use_slow is None) == (whole.use_slow is None) and (parts.use_slow is None or torch.equal(parts.use_slow, whole.use_slow))
    assert torch.equal(one.n_cached, other.n_cached) and torch.equal(one.from_slow, other.from_slow)
    for a, b in zip([*one.k, *one.v], [*other.k, *other.v], strict=True):
        torch.testing.assert_close(a[:, :68], b[:, :68], atol=1e-4, rtol=1e-4)


def test_a_cache_larger_than_memory_says_how_large(tiny):
    with pytest.raises(CacheFull, match=r"a cache of 1 x 17,?592,?186,?044,?416 tokens takes [\d,.]+ GB"):
        tiny[0].new_cache(1, 1 << 44)


@torch.no_grad()
def test_a_prompt_in_parts_that_does_not_fit_leaves_the_cache_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr("dualbranch.model.PROMPT_AT_ONCE", 16)
    cache = tiny[0].new_cache(1, 40)
    with pytest.raises(CacheFull, match="holds 40 tokens and 41 are needed"):
        tiny[0](torch.ones(1, 41, dtype=torch.int64), "slow", cache=cache, last_only=True)
    assert int(cache.n_cached) == 0 and not any(x.any() for x in cache.k)
    longer = tiny[0].config.max_seq_len + 1
    cache = tiny[0].new_cache(1, longer)
    with pytest.raises(ValueError, match=f"{longer} tokens exceed max_seq_len"):
        tiny[0](torch.ones(1, longer, dtype=torch.int64), "slow", cache=cache, last_only=True)
    assert int(cache.n_cached) == 0 and not any(x.any() for x in cache.k)
