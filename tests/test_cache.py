"""Claims about the rows of a `KVCache`: each holds a text of its own, wherever it lies and whatever lay there before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
