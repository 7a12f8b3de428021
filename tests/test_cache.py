"""Claims about the rows of a `KVCache`: each is a text of its own, wherever it lies and whatever lay there before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

N_ROWS, CAPACITY = 4, 64

rows = st.integers(0, N_ROWS - 1)
writes = st.tuples(st.just("write"), rows, st.integers(1, N_ROWS), st.integers(1, 9))  # from a row, so many rows, so many tokens each
truncations = st.tuples(st.just("truncate"), rows, st.integers(1, N_ROWS), st.integers(0, 20))
copies = st.tuples(st.just("copy"), st.permutations(range(N_ROWS)), st.integers(1, N_ROWS // 2))


@settings(max_examples=15, deadline=None)
@given(actions=st.lists(st.one_of(writes, writes, truncations, copies), min_size=2, max_size=7))
@torch.no_grad()
def test_rows_written_in_part_cut_and_copied_hold_what_a_cold_run_of_each_text_gives(tiny, actions):
    model = tiny[0]
    generator = torch.Generator().manual_seed(0)
    cache, texts = model.new_cache(N_ROWS, CAPACITY), [[] for _ in range(N_ROWS)]
    for store in (*cache.k, *cache.v, *cache.pooled.values()):
        store.fill_(float("nan"))
    for what, *action in actions:
        if what == "copy":
            order, n = action
            cache.copy_rows(order[:n], order[n : 2 * n])
            for source, target in zip(order[:n], order[n : 2 * n], strict=True):
                texts[target] = list(texts[source])
        else:
            start, n, length = action
            stop = min(start + n, N_ROWS)
            part = cache.rows(start, stop)
            if what == "truncate":
                part.truncate(length)
                texts[start:stop] = [text[:length] for text in texts[start:stop]]
            elif max(map(len, texts[start:stop])) + length <= CAPACITY:
                tokens = torch.randint(10, model.config.vocab_size, (stop - start, length), generator=generator)
                out = model(tokens, "auto", threshold=0.5, cache=part)
                for b, new in enumerate(tokens.tolist()):
                    texts[start + b] += new
                    cold = model(torch.tensor([texts[start + b]]), "auto", threshold=0.5)
                    torch.testing.assert_close(out.logits[b], cold.logits[0, -length:], atol=1e-4, rtol=1e-4)
                    assert cache.from_slow[start + b, : len(texts[start + b])].tolist() == cold.use_slow[0].tolist()
        assert cache.n_cached.tolist() == [len(text) for text in texts]
