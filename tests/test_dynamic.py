"""8-bit activations: smoothing changes nothing, products are those of the rounded numbers, and no token sees another."""

import copy

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer

from dualbranch import dynamic
from dualbranch.checkpoint import load, save_checkpoint
from dualbranch.dynamic import DynamicFeedForward, smooth, to_8bit
from dualbranch.layers import FeedForward, activate
from dualbranch.packed import FEW
from dualbranch.precision import lay_out, quantize

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no VNNI: nothing is rounded")


def tokens(n, seed=0):
    return torch.randint(10, 400, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "dialect",
    [
        {},
        {"activation": "geglu", "post_norms": True},
        {"n_stem": 4, "n_tail": 0},
        {"sliding_layers": (1,), "sliding_window": 10, "sliding_rope_theta": 1e4},
    ],
)
def test_smoothing_computes_the_same_and_evens_out_what_it_saw(dialect):
    model = make_tiny_model(400, **dialect)
    with torch.no_grad():
        model.blocks[0].slow.ff_norm.weight[3] = 40.0  # a large channel
    smoothed = copy.deepcopy(model)
    smooth(smoothed, ("slow", "fast"), tokens(50))
    assert not torch.equal(smoothed.blocks[0].slow.ff.w_up.weight, model.blocks[0].slow.ff.w_up.weight)
    with torch.no_grad():
        for route in ("slow", "fast"):
            torch.testing.assert_close(smoothed(tokens(40, 1), route).logits, model(tokens(40, 1), route).logits, rtol=1e-4, atol=1e-4)
    before, after = (float(w.max() / w.median()) for w in (m.blocks[0].slow.ff_norm.weight.detach() for m in (model, smoothed)))
    assert after < before / 3


@needs_vnni
@pytest.mark.parametrize(("d_model", "d_ff", "activation"), [(64, 96, "swiglu"), (40, 72, "geglu"), (32, 20, "swiglu")])
def test_a_dynamic_feed_forward_multiplies_the_rounded_numbers(d_model, d_ff, activation):
    ff = dynamic_feed_forward(d_model, d_ff, activation)
    x = torch.randn(FEW + 20, d_model, generator=torch.Generator().manual_seed(1))

    def product(rounded, linear):
        q, scale = rounded
        return (q.double() * scale.double()) @ linear.matrix.transposed().double()

    rounded = to_8bit(x)
    hidden = activate(product(rounded, ff.w_act), activation) * product(rounded, ff.w_up)
    torch.testing.assert_close(ff(x).double(), product(to_8bit(hidden.float()), ff.w_down), rtol=1e-3, atol=1e-3)
    assert (ff(x) - FeedForward.forward(ff, x)).abs().max() > 1e-4, "nothing was rounded"


@needs_vnni
def test_a_token_is_rounded_by_itself_and_few_are_not():
    ff = dynamic_feed_forward(64, 96, "swiglu")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    x[17] *= 1000
    whole = ff(x)
    assert torch.equal(ff(x[:12]), whole[:12])
    few = x[:FEW]
    assert torch.equal(ff(few), FeedForward.forward(ff, few))
    assert torch.isfinite(ff(torch.zeros(12, 64))).all() and not ff(torch.zeros(12, 64)).any()


def dynamic_feed_forward(d_model, d_ff, activation):
    torch.manual_seed(0)
    model = make_tiny_model(400, d_model=d_model, d_ff=d_ff, activation=activation)
    return lay_in(model).blocks[0].slow.ff


def lay_in(model):
    """Quantized without smoothing."""
    packed = quantize(copy.deepcopy(model), "int8")
    for block in packed.blocks:
        block.slow.ff = DynamicFeedForward(block.slow.ff)
    return packed


def test_prompts_are_read_nearly_as_at_int8_and_single_tokens_as_there(tmp_path):
    tok = make_tiny_tokenizer()
    model = make_tiny_model(tok.vocab_size)
    plain, rounded = quantize(copy.deepcopy(model), "int8"), quantize(copy.deepcopy(model), "int8-dynamic", tok)
    assert rounded.precision == "int8-dynamic" and isinstance(rounded.blocks[1].fast.ff, DynamicFeedForward)
    ids = torch.randint(10, tok.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for route in ("slow", "fast", "auto"):
            a, b = (m(ids, route, **({"threshold": 0.5} if route == "auto" else {})).logits for m in (plain, rounded))
            assert (a - b).norm() < 0.1 * a.norm()
        one = rounded(ids[:1, :1]).logits
        torch.testing.assert_close(one, model(ids[:1, :1]).logits, rtol=0.1, atol=0.1)
    save_checkpoint(tmp_path / "m", rounded, tok)
    loaded = load(tmp_path / "m")
    assert loaded.model.precision == "int8-dynamic" and isinstance(loaded.model.blocks[0].slow.ff, DynamicFeedForward)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, rounded(ids).logits)


def test_by_part_and_what_is_refused():
    tok = make_tiny_tokenizer()
    model = quantize(make_tiny_model(tok.vocab_size), "slow=int8-dynamic,fast=int4", tok)
    assert isinstance(model.blocks[1].slow.ff, DynamicFeedForward) and not isinstance(model.blocks[1].fast.ff, DynamicFeedForward)
    with pytest.raises(ValueError, match="write head=int8"):
        lay_out(make_tiny_model(400), "head=int8-dynamic")
    untouched = make_tiny_model(400)
    with pytest.raises(ValueError, match="reads a text"):
        quantize(untouched, "int8-dynamic")
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), make_tiny_model(400).parameters(), strict=True))
    with pytest.raises(ValueError, match="already"):
        quantize(model, "int8-dynamic", tok)


def test_without_vnni_it_computes_as_at_int8(monkeypatch):
    monkeypatch.setattr(dynamic.torch.cpu, "_is_vnni_supported", lambda: False)
    model = make_tiny_model(400)
    with torch.no_grad():
        assert torch.equal(lay_in(model)(tokens(30)).logits, quantize(model, "int8")(tokens(30)).logits)
