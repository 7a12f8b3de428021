"""Cutting a narrow branch out of a wide one: planted importance, groups, closed-form refit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.convert.rounding import input_grams
from dualbranch.data.packing import Rows, pack
from dualbranch.distill.cut import init_from_teacher, kept_layers, layer_views, ridge, top_heads
from kernels import SparseSpec

SIZES = {"d_model": 32, "n_layers": 3, "n_stem": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "fast_n_heads": 2, "fast_d_ff": 16}
CONFIG = DualBranchConfig(vocab_size=64, sparse=SparseSpec(8, 2, 16, 2, 64), **SIZES)
STUDENT = dataclasses.replace(CONFIG, n_stem=1)


@pytest.fixture
def teacher() -> DualBranchModel:
    model = DualBranchModel(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight.mul_(40)
    return model


def rows_of(seq_len: int) -> Rows:
    """The same 16 documents of 40 tokens, one a row; the rest of the row is padding."""
    generator = torch.Generator().manual_seed(0)
    return pack([(torch.randint(1, 64, (40,), generator=generator).tolist(), [0.0] + [1.0] * 39) for _ in range(16)], seq_len, 8, 0)


@pytest.fixture
def rows():
    return rows_of(48)


def distance(a: DualBranchModel, b: DualBranchModel, rows, route: str) -> float:
    with torch.no_grad():
        return float((a(rows.tokens, route, doc_start=rows.doc_start).logits - b(rows.tokens, doc_start=rows.doc_start).logits).square().mean())


def test_student_cut_from_a_teacher_is_that_teacher_on_route_slow(teacher, rows):
    student = DualBranchModel(STUDENT)
    student.init_weights(1)
    init_from_teacher(student, teacher, rows)
    assert distance(student, teacher, rows, "slow") == 0.0


def test_refitted_fast_branch_is_closer_to_the_teacher_than_a_random_one(teacher, rows):
    student, random = DualBranchModel(STUDENT), DualBranchModel(STUDENT)
    student.init_weights(1)
    init_from_teacher(student, teacher, rows)
    random.load_state_dict(student.state_dict())
    fresh = DualBranchModel(STUDENT)
    fresh.init_weights(2)
    for i in STUDENT.dual_layers:
        random.blocks[i].fast.load_state_dict(fresh.blocks[i].fast.state_dict())
    assert distance(student, teacher, rows, "fast") < 0.7 * distance(random, teacher, rows, "fast")


def test_planted_dead_heads_and_neurons_go_first_and_nothing_is_lost(teacher, rows):
    with torch.no_grad():
        for block in teacher.blocks:
            block.slow.w_o.weight[:, 8:16] = 0  # head 1 of group 0
            block.slow.w_o.weight[:, 16:24] = 0  # head 0 of group 1
            block.slow.ff.w_down.weight[:, 5:37] = 0  # 32 of 48 neurons
    student = DualBranchModel(STUDENT)
    student.init_weights(1)
    init_from_teacher(student, teacher, rows)
    for i in STUDENT.dual_layers:
        source, fast = teacher.blocks[i].slow, student.blocks[i].fast
        assert torch.equal(fast.w_q.weight, source.w_q.weight[[*range(8), *range(24, 32)]])
        assert torch.equal(fast.ff.w_act.weight, source.ff.w_act.weight[[*range(5), *range(37, 48)]])
    assert distance(student, teacher, rows, "fast") < 1e-3 * distance(student, DualBranchModel(CONFIG), rows, "fast")


def test_permuting_neurons_leaves_the_cut_function_unchanged(teacher, rows):
    cut = DualBranchModel(STUDENT)
    cut.init_weights(1)
    init_from_teacher(cut, teacher, rows)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for block in teacher.blocks:
            ff = block.slow.ff
            ff.w_act.weight.copy_(ff.w_act.weight[order])
            ff.w_up.weight.copy_(ff.w_up.weight[order])
            ff.w_down.weight.copy_(ff.w_down.weight[:, order])
    again = DualBranchModel(STUDENT)
    again.init_weights(1)
    init_from_teacher(again, teacher, rows)
    a, b = (m(rows.tokens, "fast", doc_start=rows.doc_start).logits for m in (cut, again))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_padding_is_no_calibration_text(teacher):
    few, many = rows_of(40), rows_of(72)
    a, b = DualBranchModel(STUDENT), DualBranchModel(STUDENT)
    init_from_teacher(a, teacher, few)
    init_from_teacher(b, teacher, many)
    with torch.no_grad():
        x, y = (m(few.tokens, "fast", doc_start=few.doc_start).logits for m in (a, b))
    torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    a, b = (input_grams(a, rows) for rows in (few, many))
    for name, gram in a.items():
        torch.testing.assert_close(gram, b[name], atol=1e-3, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_every_kv_group_keeps_as_many_heads():
    assert top_heads(torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 2, 4).tolist() == [0, 1, 4, 5]


def test_ridge_recovers_a_linear_map_and_survives_dead_inputs():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    x[:, 4] = 0
    w[:, 4] = 0
    torch.testing.assert_close(ridge(x, x @ w.T, 1e-6), w, atol=1e-3, rtol=1e-3)


def test_a_shallower_student_keeps_first_and_last_layers(teacher, rows):
    assert kept_layers(12, 5) == [0, 3, 6, 8, 11] or kept_layers(12, 5)[0] == 0
    assert (kept_layers(12, 5)[0], kept_layers(12, 5)[-1], len(set(kept_layers(12, 5)))) == (0, 11, 5)
    small = DualBranchModel(dataclasses.replace(CONFIG, n_layers=2, n_stem=2, n_heads=2, d_ff=24))
    init_from_teacher(small, teacher, rows)
    assert small(rows.tokens).logits.isfinite().all()


def test_a_student_that_cannot_be_cut_is_refused_naming_the_setting(teacher, rows):
    with pytest.raises(ValueError, match=r"model.d_model is 64 but the teacher has 32"):
        init_from_teacher(DualBranchModel(dataclasses.replace(STUDENT, d_model=64)), teacher, rows)
    with pytest.raises(ValueError, match=r"model.d_ff is 96, more than the teacher's 48"):
        init_from_teacher(DualBranchModel(dataclasses.replace(STUDENT, d_ff=96)), teacher, rows)


def test_layer_views_replay_the_forward_pass(teacher, rows):
    with torch.no_grad():
        expected = teacher(rows.tokens, doc_start=rows.doc_start).hidden[rows.real]
    block, last = list(layer_views(teacher, rows))[-1]
    with torch.no_grad():
        mid = last.x + block.slow.w_o(block.slow.attend(last.h, last.tokens, *last.keys))
        out = mid + block.slow.ff(block.slow.ff_norm(mid))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
