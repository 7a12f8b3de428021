from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.data.packing import pack

PAD = 0


@st.composite
def packings(draw):
    align = draw(st.sampled_from([1, 2, 3, 8, 16]))
    seq_len = draw(st.integers(1, 70))
    lengths = draw(st.lists(st.integers(1, seq_len), max_size=25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    examples, next_id = [], 1
    for n in lengths:  # every token of every document is unique, so that a misplaced one is seen
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], n)
        weights[0] = 0.0
        examples.append((list(range(next_id, next_id + n)), weights.tolist()))
        next_id += n
    return examples, seq_len, align


def documents(rows):
    """(row, start, end) of every run of positions with one doc_start that holds a real token."""
    for r in range(len(rows)):
        for start in rows.doc_start[r].unique().tolist():
            inside = (rows.doc_start[r] == start).nonzero()[:, 0].tolist()
            assert inside == list(range(start, inside[-1] + 1)), "a document is not one contiguous run"
            if rows.tokens[r, start] != PAD:
                yield r, start, inside[-1] + 1


@settings(max_examples=150, deadline=None)
@given(packings())
def test_every_document_is_recovered_exactly_and_starts_aligned(packing):
    examples, seq_len, align = packing
    rows = pack(examples, seq_len, align, PAD)
    found = []
    for r, start, end in documents(rows):
        ids = rows.tokens[r, start:end]
        assert start % align == 0
        n = int((ids != PAD).sum())
        assert (ids[:n] != PAD).all() and (ids[n:] == PAD).all()
        weights = [0.0, *rows.loss_weights[r, start : start + n - 1].tolist()]
        found.append((ids[:n].tolist(), weights))
    assert sorted(found) == sorted(examples)
    assert rows.n_documents == len(examples)


@settings(max_examples=150, deadline=None)
@given(packings())
def test_no_target_crosses_documents_and_weights_are_preserved(packing):
    examples, seq_len, align = packing
    rows = pack(examples, seq_len, align, PAD)
    for name in ("tokens", "targets", "loss_weights", "doc_start"):
        assert getattr(rows, name).shape == (len(rows), seq_len), name
    assert rows.tokens.dtype == rows.targets.dtype == rows.doc_start.dtype == torch.int64
    assert rows.loss_weights.dtype == torch.float32
    following = {a: b for ids, _ in examples for a, b in pairwise(ids)}
    for token, target, weight in zip(
        rows.tokens.flatten().tolist(), rows.targets.flatten().tolist(), rows.loss_weights.flatten().tolist(), strict=True
    ):
        assert target == following.get(token, PAD)
        assert weight == 0.0 or token in following
    assert float(rows.loss_weights.double().sum()) == sum(sum(weights) for _, weights in examples)


@settings(max_examples=150, deadline=None)
@given(packings())
def test_padding_belongs_to_harmless_aligned_documents(packing):
    examples, seq_len, align = packing
    rows = pack(examples, seq_len, align, PAD)
    position = torch.arange(seq_len)
    assert (rows.doc_start >= 0).all() and (rows.doc_start <= position).all()
    assert (rows.doc_start % align == 0).all()
    padding = rows.tokens == PAD
    assert torch.equal(rows.real, ~padding)
    assert (rows.loss_weights[padding] == 0).all() and (rows.targets[padding] == PAD).all()
    # no real token has padding before it in its own document
    for r, t in (~padding).nonzero().tolist():
        assert not padding[r, rows.doc_start[r, t] : t].any()


@settings(max_examples=50, deadline=None)
@given(packings())
def test_rows_are_never_empty_and_efficiency_counts_tokens(packing):
    examples, seq_len, align = packing
    rows = pack(examples, seq_len, align, PAD)
    assert (rows.tokens != PAD).any(1).all()
    n_tokens = sum(len(ids) for ids, _ in examples)
    assert rows.n_tokens == n_tokens
    assert rows.efficiency == (n_tokens / rows.tokens.numel() if examples else 0.0)


def test_the_weight_of_predicting_a_token_stands_beside_its_target():
    rows = pack([([7, 8, 9], [0.0, 0.25, 1.0])], seq_len=5, align=2, pad_id=PAD)
    assert rows.tokens.tolist() == [[7, 8, 9, 0, 0]]
    assert rows.targets.tolist() == [[8, 9, 0, 0, 0]]
    assert rows.loss_weights.tolist() == [[0.25, 1.0, 0.0, 0.0, 0.0]]
    assert rows.doc_start.tolist() == [[0, 0, 0, 0, 4]]


def test_a_document_goes_to_the_fullest_row_it_fits():
    lengths = [6, 5, 3, 2]
    rows = pack([([n] * n, [0.0] * n) for n in lengths], seq_len=8, align=1, pad_id=PAD)
    assert rows.tokens.tolist() == [[6] * 6 + [2] * 2, [5] * 5 + [3] * 3]
    assert rows.efficiency == 1.0


def test_packing_typical_lengths_wastes_less_than_a_tenth():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 300, 2000)
    rows = pack([([1] * n, [0.0] * n) for n in lengths], seq_len=1024, align=16, pad_id=PAD)
    assert rows.efficiency > 0.9, f"{rows.efficiency:.3f}"


def test_packing_is_deterministic():
    examples = [([n] * n, [0.0] + [1.0] * (n - 1)) for n in (5, 9, 2, 7, 7, 1, 12)]
    a, b = pack(examples, 16, 4, PAD), pack(iter(examples), 16, 4, PAD)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.doc_start, b.doc_start)


def test_too_long_documents_are_an_error():
    examples = [([1, 2, 3], [0.0, 1.0, 1.0]), ([4] * 9, [0.0] * 9)]
    with pytest.raises(ValueError, match="example 1 has 9 tokens, seq_len is 8"):
        pack(examples, 8, 1, PAD)


def test_no_examples_give_no_rows():
    rows = pack([], 8, 4, PAD)
    assert len(rows) == 0 and rows.tokens.shape == (0, 8) and rows.efficiency == 0.0


@pytest.mark.parametrize(
    "example, message",
    [
        (([], []), "has 0 ids"),
        (([1, 2], [0.0]), "2 ids and 1 loss_weights"),
        (([1, 2], [1.0, 1.0]), r"loss_weights\[0\] is 1.0"),
    ],
)
def test_malformed_examples_raise_value_error(example, message):
    with pytest.raises(ValueError, match=message):
        pack([example], 8, 1, PAD)


@pytest.mark.parametrize("arguments", [{"seq_len": 0}, {"align": 0}])
def test_malformed_arguments_raise_value_error(arguments):
    with pytest.raises(ValueError, match="needed"):
        pack([([1], [0.0])], **({"seq_len": 8, "align": 1, "pad_id": PAD} | arguments))
