"""Distillation losses against hand computation, limits and splits (PITFALLS: Distillation)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.distill.losses import align_loss, distill_loss, hard_loss, token_kl, truncated_distill_loss, truncated_targets


def logits(n: int, v: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_student_equal_to_teacher_has_zero_loss():
    z = logits(7, 11, 0)
    assert distill_loss(z, z.clone(), torch.ones(7), 3.0).abs() < 1e-12


def test_two_tokens_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # p = (3/4, 1/4) and (1/2, 1/2)
    student = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])  # q = (1/2, 1/2) and (3/4, 1/4)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)
    assert float(distill_loss(teacher, student, torch.tensor([1.0, 2.0]))) == pytest.approx(first + 2 * second, rel=1e-6)
    assert float(hard_loss(student, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))) == pytest.approx(math.log(2) + 0.5 * math.log(4), rel=1e-6)


def test_high_temperature_tends_to_half_the_centred_logit_distance_over_the_vocabulary():
    a, b = logits(5, 9, 1), logits(5, 9, 2)
    centred = (a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))
    torch.testing.assert_close(token_kl(a, b, 1e4), centred.square().sum(-1) / (2 * 9), rtol=1e-3, atol=1e-6)


def test_unequal_vocabularies_are_refused_naming_both_sizes():
    with pytest.raises(ValueError, match="9 logits and student 8"):
        token_kl(logits(1, 9, 0), logits(1, 8, 0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), v=st.integers(3, 30))
def test_top_k_kl_is_nonnegative_monotone_in_k_and_dense_at_k_equal_v(seed, v):
    teacher, student, w = logits(4, v, seed), logits(4, v, seed + 1), torch.ones(4, dtype=torch.float64)
    targets = [truncated_targets(teacher, k) for k in range(1, v + 1)]
    losses = [float(truncated_distill_loss(ids, log_p.double(), student, w)) for ids, log_p in targets]
    assert losses[0] >= -1e-6
    assert all(b >= a - 1e-5 for a, b in pairwise(losses)), losses
    assert losses[-1] == pytest.approx(float(distill_loss(teacher, student, w)), rel=1e-4, abs=1e-5)


def test_top_k_gradient_points_where_the_dense_one_does():
    teacher = logits(64, 200, 3, scale=3.0)
    student = (logits(64, 200, 4) * 0.5 + teacher * 0.5).requires_grad_()
    w = torch.ones(64, dtype=torch.float64)
    dense = torch.autograd.grad(distill_loss(teacher, student, w), student)[0]
    ids, log_p = truncated_targets(teacher, 32)
    cached = torch.autograd.grad(truncated_distill_loss(ids, log_p.double(), student, w), student)[0]
    assert torch.cosine_similarity(dense.flatten(), cached.flatten(), dim=0) > 0.98


def test_tokens_of_weight_zero_add_exactly_nothing():
    teacher, student = logits(6, 12, 5), logits(6, 12, 6)
    w = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    keep = w > 0
    assert torch.equal(distill_loss(teacher, student, w), distill_loss(teacher[keep], student[keep], w[keep]))


def test_align_loss_is_relative_and_gives_the_slow_stream_no_gradient():
    slow = logits(5, 8, 7).requires_grad_()
    fast = (slow.detach() * 1.1).requires_grad_()
    loss = align_loss(fast, slow, torch.ones(5, dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(5 * 0.01, rel=1e-6)
    assert float(align_loss(fast * 10, slow * 10, torch.ones(5, dtype=torch.float64)).detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    assert slow.grad is None and fast.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_of_distillation_is_that_of_the_kl_it_sums(temperature):
    g = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 11, generator=g, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(5, generator=g, dtype=torch.float64)
    student.requires_grad_()
    own, summed = 3.0 * distill_loss(teacher, student, weights, temperature), 3.0 * (token_kl(teacher, student, temperature) * weights).sum()
    torch.testing.assert_close(own, summed)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (own, summed)))
    assert torch.autograd.gradcheck(lambda z: distill_loss(teacher, z, weights, temperature), student)
