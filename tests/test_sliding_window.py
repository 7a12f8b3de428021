"""Sliding-window layers: what they read, on every way through attention, and what the model promises with them. Random weights, fp32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.accounting import layer_flops, token_flops, total_params
from kernels import AttentionPlan, SparseSpec, reference, sparse_attention

SPARSE = SparseSpec(block_size=4, n_selected_blocks=1, window=3, n_sinks=1, dense_len=12)
SIZES = {"d_model": 48, "n_layers": 5, "n_stem": 2, "n_tail": 1, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "d_ff": 64, "fast_n_heads": 3, "fast_d_ff": 16}
DIALECT = {"post_norms": True, "qk_norm": True, "embed_scale": 6.9, "attn_scale": 0.5, "logit_softcap": 5.0, "activation": "geglu", "rotary_dim": 6}
SLIDING = {"sliding_layers": (0, 2, 4), "sliding_window": 10, "sliding_rope_theta": 500.0}
CONFIG = DualBranchConfig(vocab_size=96, d_gate=4, max_seq_len=128, sparse=SPARSE, **SIZES, **DIALECT, **SLIDING)


def build(config: DualBranchConfig = CONFIG, seed: int = 0) -> DualBranchModel:
    model = DualBranchModel(config).eval()
    model.init_weights(seed)
    with torch.no_grad():
        model.embed.weight.mul_(20)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def tokens(n_rows: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (n_rows, n), generator=torch.Generator().manual_seed(seed))


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


MODEL = build()


def window_attention(q, k, v, plan, window):
    """The definition, without any of the library's rules: softmax over keys (q_pos - window, q_pos] of the query's document."""
    s = torch.arange(plan.n_keys)
    pos, start = plan.q_pos.unsqueeze(-1), plan.doc_start.unsqueeze(-1)
    mask = (s <= pos) & (s > pos - window) & (s >= start)
    return reference.attend(q, k, v, mask.unsqueeze(2).expand(-1, -1, k.shape[2], -1))


@pytest.mark.parametrize("masked", [True, False])
@settings(max_examples=drawn(8), deadline=None)
@given(data=st.data())
def test_a_sliding_rule_reads_the_window_and_nothing_else(masked, data):
    H, Hk = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2)]))
    B, S, window = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 260)), data.draw(st.integers(1, 40))
    T = data.draw(st.sampled_from([1, 3, S]))
    block = data.draw(st.sampled_from([4, 16]))
    g = torch.Generator().manual_seed(S * T)
    pos = torch.randint(-1, S, (B, T), generator=g)
    start = (pos // 2 // block * block).clamp(min=0) if data.draw(st.booleans()) else None
    plan, spec = AttentionPlan(pos, S, start), SparseSpec.sliding(window, block)
    q, k, v = (torch.randn(B, n, h, 8, generator=g, requires_grad=data.draw(st.booleans())) for n, h in ((T, H), (S, Hk), (S, Hk)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.blockwise.sparse.MASKED_ELEMENTS", 1 << 30 if masked else 0)  # else rows of more than 16 queries go by row
        out = sparse_attention(q, k, v, plan, spec)
    expected = window_attention(q, k, v, plan, window)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(reference.sparse_attention(q, k, v, plan, spec), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("T", [1, 40])
def test_a_sliding_rule_runs_on_triton(T):
    triton = pytest.importorskip("triton", reason="needs Triton (pip install triton)")
    assert triton is not None
    from kernels import decode_triton, triton_ops

    q, k, v = (torch.randn(2, n, h, 16, generator=torch.Generator().manual_seed(n)) for n, h in ((T, 4), (70, 2), (70, 2)))
    plan = AttentionPlan(torch.stack([torch.arange(T) + 30, torch.arange(T) + 20]), 70)
    spec, nothing = SparseSpec.sliding(24, 16), torch.empty(2, 0, 2, 16)
    run = decode_triton.sparse_decode if T == 1 else triton_ops.sparse_attention
    torch.testing.assert_close(run(q, k, v, plan, spec, nothing), window_attention(q, k, v, plan, 24), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("route", ["slow", "fast", "mixed"])
@torch.no_grad()
def test_prefill_equals_chunked_equals_token_by_token(route):
    t = tokens(2, 30)
    mixed = torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = MODEL(t, mixed if route == "mixed" else route).logits
    for chunk in (1, 13):
        cache = MODEL.new_cache(2, 30)
        parts = [MODEL(t[:, i : i + chunk], mixed[:, i : i + chunk] if route == "mixed" else route, cache=cache).logits for i in range(0, 30, chunk)]
        assert_close(torch.cat(parts, 1), whole)
    assert set(cache.pooled) == {3}, "a layer that chooses no blocks keeps no pooled keys"


@pytest.mark.parametrize("route", ["slow", "fast", "mixed"])
@torch.no_grad()
def test_padded_batch_equals_each_sequence_alone(route):
    t, n = tokens(3, 40), torch.tensor([40, 1, 23])
    mixed = torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    out = MODEL(t, mixed if route == "mixed" else route, lengths=n).logits
    for b, length in enumerate(n.tolist()):
        alone = MODEL(t[b : b + 1, :length], mixed[b : b + 1, :length] if route == "mixed" else route).logits
        assert_close(out[b, :length], alone[0])


@torch.no_grad()
def test_soft_at_zero_and_one_equals_the_hard_route():
    t, model = tokens(2, 30), build()
    for side in (0.0, 1.0):
        model.gate.w_out.weight.zero_()
        model.gate.w_out.bias.fill_(-200.0 if side else 200.0)
        assert_close(model(t, "soft").logits, model(t, "fast" if side else "slow").logits)


@torch.no_grad()
def test_fast_with_all_heads_and_blocks_and_equal_weights_is_slow():
    wide = dataclasses.replace(CONFIG, fast_n_heads=6, fast_d_ff=64, sparse=dataclasses.replace(SPARSE, n_selected_blocks=64))
    model = build(wide)
    for i in wide.dual_layers:
        model.blocks[i].fast.load_state_dict(model.blocks[i].slow.state_dict())
    t = tokens(2, 60)
    assert_close(model(t, "fast").logits, model(t, "slow").logits)


@torch.no_grad()
def test_a_packed_document_equals_itself_alone():
    t, starts = tokens(1, 44), torch.tensor([[0] * 16 + [16] * 28])
    assert_close(MODEL(t, doc_start=starts).logits[:, 16:], MODEL(t[:, 16:]).logits)


@pytest.mark.parametrize("route", ["slow", "fast"])
@torch.no_grad()
def test_only_sliding_layers_forget_and_exactly_beyond_their_window(route):
    window = CONFIG.sliding_window if route == "slow" else CONFIG.fast_window
    one = dataclasses.replace(CONFIG, n_layers=2, n_stem=1, n_tail=0, sliding_layers=(0, 1))
    model = build(one)
    t = tokens(1, 40)
    other = t.clone()
    other[0, 5] = (t[0, 5] + 1) % 96
    change = (model(t, route).logits - model(other, route).logits).abs().amax(-1)[0]
    reach = 5 + one.sliding_window - 1 + window - 1  # through the stem, then through the dual layer
    assert change[reach] > 0 and (change[reach + 1 :] == 0).all(), f"a token is heard up to {int(change.nonzero().max())}, expected {reach}"


@pytest.mark.parametrize("change", [{"sliding_layers": (0,)}, {"sliding_window": 9}, {"sliding_rope_theta": None}, {"attn_scale": None}, {"rotary_dim": None},
                                    {"embed_scale": 1.0}, {"logit_softcap": None}, {"rope_theta": 9_000.0}])  # fmt: skip
@torch.no_grad()
def test_no_setting_of_the_dialect_is_ignored(change):
    other = DualBranchModel(dataclasses.replace(CONFIG, **change))
    other.load_state_dict(MODEL.state_dict())
    t = tokens(1, 40)
    assert (other(t).logits - MODEL(t).logits).abs().max() > 1e-3


@torch.no_grad()
def test_post_norms_are_read_in_both_branches():
    for name in ("attn_post_norm", "ff_post_norm"):
        for branch in ("slow", "fast"):
            model = build()
            getattr(getattr(model.blocks[2], branch), name).weight.mul_(3)
            assert (model(tokens(1, 9), branch).logits - MODEL(tokens(1, 9), branch).logits).abs().max() > 1e-3


def test_accounting_counts_parameters_and_windows_exactly():
    for change in ({}, {"qkv_bias": True}, {"tie_embeddings": False}, {"n_stem": 5, "n_tail": 0}):
        c = dataclasses.replace(CONFIG, **change)
        assert total_params(c) == sum(p.numel() for p in DualBranchModel(c).parameters())
    near, far = (layer_flops(CONFIG, True, n, sliding=True) for n in (9, 99))
    assert near == far and layer_flops(CONFIG, True, 99) > far
    c = CONFIG
    layers = [layer_flops(c, i not in c.dual_layers, 99, i in c.sliding_layers) for i in range(c.n_layers)]
    assert token_flops(c, 0.0, 99) == sum(layers) + 2 * c.vocab_size * c.d_model + 2 * (c.d_model * c.d_gate + c.d_gate)


def test_bad_settings_are_refused_by_name():
    bad = {
        "sliding_layers": {"sliding_layers": (3, 1)},
        "need each other": {"sliding_window": None},
        "sliding_window is 0": {"sliding_window": 0},
        "rotary_dim is 7": {"rotary_dim": 7},
        "rotary_dim is 10": {"rotary_dim": 10},
        "logit_softcap": {"logit_softcap": 0.0},
        "attn_scale": {"attn_scale": float("nan")},
        "embed_scale": {"embed_scale": float("inf")},
        "rope_theta": {"rope_theta": 1.0},
        "sliding_rope_theta": {"sliding_layers": (), "sliding_window": None},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
