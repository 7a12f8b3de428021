"""Claims about `dualbranch.sampling`, checked against a brute-force reading of its definitions."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.sampling import SamplingParams, filtered_probs, sample

# logits on a coarse grid: ties happen, and brute force and torch agree about every comparison
logit_rows = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=1, max_size=12)


def brute_force(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """id -> probability, from the words of the definitions, one token at a time."""
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    kept, mass = [], 0.0
    for rank, i in enumerate(order):
        passes_k = params.top_k == 0 or rank < params.top_k
        passes_p = params.top_p == 1.0 or mass < params.top_p
        if passes_k and passes_p and p[i] >= params.min_p * p[order[0]]:
            kept.append(i)
        mass += p[i]
    return {i: p[i] / sum(p[j] for j in kept) for i in kept}


@settings(deadline=None)
@given(
    logits=logit_rows,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.013, 0.31, 0.77, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.21, 0.9, 1.0]),
    heads=st.sampled_from([(256, 4096), (1, 3), (2, 5)]),
)
def test_filtered_distribution_equals_brute_force(logits, temperature, top_k, top_p, min_p, heads):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with mock.patch("dualbranch.sampling.HEADS", heads):
        probs, ids = filtered_probs(torch.tensor([logits]), params)
    got = {i: p for i, p in zip(ids[0].tolist(), probs[0].tolist(), strict=True) if p > 0}
    want = brute_force(logits, params)
    assert got.keys() == want.keys(), (got, want)
    assert all(abs(got[i] - want[i]) < 1e-9 for i in want), (got, want)


@settings(deadline=None)
@given(logits=logit_rows, top_k=st.integers(0, 5), top_p=st.floats(0.01, 1.0), min_p=st.floats(0.0, 1.0), seed=st.integers(0, 2**63 - 1))
def test_sampled_token_passes_every_filter_and_is_never_banned(logits, top_k, top_p, min_p, seed):
    banned = torch.tensor([[*logits, float("-inf")]]).roll(1, -1)  # id 0 is forbidden
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = int(sample(banned, params, torch.Generator().manual_seed(seed)))
    probs, ids = filtered_probs(banned, params)
    assert token != 0
    assert probs[0][ids[0] == token].item() > 0


def test_sampled_frequencies_match_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    params = SamplingParams(temperature=1.5, top_k=3)
    n = 20_000
    drawn = sample(logits.expand(n, 4), params, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / n
    want = torch.tensor([brute_force([2.0, 1.0, 0.0, -1.0], params).get(i, 0.0) for i in range(4)])
    assert (frequency - want).abs().max() < 0.02, (frequency, want)


def test_same_seed_same_tokens_and_another_seed_others():
    logits, params = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)), SamplingParams(temperature=1.0)
    first, second, third = (sample(logits, params, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_own_generators_make_a_row_independent_of_its_batch():
    logits, params = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)), SamplingParams(temperature=1.0)
    batch = sample(logits, params, [torch.Generator().manual_seed(s) for s in range(4)])
    alone = [sample(logits[i : i + 1], params, [torch.Generator().manual_seed(i)]).item() for i in range(4)]
    assert batch.tolist() == alone


def test_greedy_takes_the_best_token_whatever_the_filters_and_seed():
    logits = torch.randn(16, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, SamplingParams(top_k=3, top_p=0.2, seed=9)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_tiny_temperature_is_greedy_and_finite(temperature):
    logits = torch.randn(16, 30, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(sample(logits, SamplingParams(temperature=temperature), torch.Generator()), logits.argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": float("nan")}, {"min_p": -0.1}, {"min_p": 1.5}, {"max_tokens": 1}, {"seed": -1}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("wrong", [{"temperature": "0.5"}, {"top_p": None}, {"min_p": True}])
def test_shares_are_numbers(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*must be a number"):
        SamplingParams(**wrong)


@pytest.mark.parametrize("wrong", [{"top_k": 1.5}, {"seed": 0.5}, {"max_tokens": 10.5}, {"max_tokens": True}, {"top_k": "3"}])
def test_counts_are_integers(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*must be an integer"):
        SamplingParams(**wrong)
