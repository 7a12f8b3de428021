"""Packed matrices: what they hold, what they compute, and that nothing but rounding happens to the weights."""

from functools import partial

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch import packed as packed_module
from dualbranch.checkpoint import load_checkpoint, save_checkpoint
from dualbranch.layers import FeedForward
from dualbranch.packed import FEW, GROUP, PackedEmbedding, PackedFeedForward, PackedLinear, PackedMatrix, ProductNorm, more_rows, multiply
from dualbranch.precision import BITS, normal_form, parse_precision, quantize, unpack_branches

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 100))


def packed(weight, bits):
    matrix = PackedMatrix(*weight.shape, bits)
    matrix.pack(weight)
    return matrix


def rounded(weight, bits):
    """The same rounding, written out plainly."""
    if bits == 16:
        return weight.bfloat16().float()
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round() * scale
    out = weight.clone()
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], GROUP):
            group = weight[row, first : first + GROUP]
            if len(group) < GROUP:  # the layout pads with zeros
                group = torch.cat([group, torch.zeros(GROUP - len(group))])
            low = group.min().bfloat16().float()
            scale = ((group.max() - low) / 15).clamp(min=1e-12).bfloat16().float()
            values = ((group - low) / scale).round().clamp(0, 15) * scale + low
            out[row, first : first + GROUP] = values[: weight.shape[1] - first]
    return out


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from([4, 8, 16]), st.integers(0, 99))
def test_unpacking_gives_the_rounded_weights(size, bits, seed):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    matrix, expected = packed(weight, bits), rounded(weight, bits)
    torch.testing.assert_close(matrix.transposed().T, expected, rtol=1e-6, atol=1e-6)
    index = torch.randint(0, size[0], (2, 3))
    torch.testing.assert_close(matrix.rows(index), expected[index], rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from([4, 8, 16]), st.integers(1, 4), st.integers(0, 99))
def test_the_product_with_packed_words_is_the_product_with_the_unpacked_matrix(size, bits, n, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, x = packed(torch.randn(size, generator=generator), bits), torch.randn(n, size[1], generator=generator)
    torch.testing.assert_close(matrix.product(x), x @ matrix.transposed(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(16, 2**-8), (8, 1 / 127), (4, 1 / 10)])
def test_rounding_errors_are_those_of_the_format(bits, error):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    difference = (packed(weight, bits).transposed().T - weight).abs().amax(1)
    assert (difference <= error * weight.abs().amax(1)).all()
    assert difference.max() > 0


def test_weights_of_sixteen_levels_survive_four_bits():
    scale, low = torch.tensor(0.5), torch.tensor(-3.25)  # numbers that bf16 holds
    q = torch.arange(16).repeat(8, 4).view(8, 64)
    assert torch.equal(packed(q * scale + low, 4).transposed().T, q * scale + low)


def test_zero_rows_stay_zero():
    for bits in (4, 8, 16):
        assert packed(torch.zeros(8, 32), bits).transposed().abs().max() == 0


def test_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match="4, 8 or 16"):
        PackedMatrix(8, 32, 3)


@pytest.mark.parametrize("bits", [4, 16])
def test_weights_survive_a_change_of_dtype(bits):
    linear = PackedLinear(32, 8, bits)
    linear.matrix.pack(torch.randn(8, 32) * 1e-9)
    before = {name: t.clone() for name, t in linear.state_dict().items()}
    linear.half().double().float()
    for name, t in linear.state_dict().items():
        assert t.dtype == torch.int32 and torch.equal(t, before[name]), name
    assert linear.matrix.words.dtype == (torch.bfloat16 if bits == 16 else torch.int32)
    other = PackedLinear(32, 8, bits)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.matrix.transposed(), linear.matrix.transposed())


@pytest.mark.parametrize("large", [1, 1 << 22])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_any_registers_compute_the_same(capability, large, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(packed_module, "LARGE", large)
    generator, in_turns = torch.Generator().manual_seed(0), []
    for n_rows in (16, 40, 64):  # 1, 3 and 4 blocks
        weight, x = torch.randn(n_rows, 64, generator=generator), torch.randn(2, 64, generator=generator)
        matrix = packed(weight, 8)
        torch.testing.assert_close(matrix.product(x), x @ rounded(weight, 8).T, rtol=1e-4, atol=1e-4)
        in_turns.append([len(rows) for rows in matrix._in_turns()])
    assert in_turns == {("AVX2", 1): [[2], [2], [2, 2]], ("AVX2", 1 << 22): [[2]] * 3}.get((capability, large), [[1]] * 3)


def signed32(word):
    return word - (1 << 32) if word >> 31 else word


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_state_dict_lies_as_in_the_checkpoints_that_there_are(bits):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(1 - (1 << (min(bits, 8) - 1)), 1 << (min(bits, 8) - 1), (32, 64), generator=generator)  # integers of so many bits
    q[:, ::32], q[:, 1::32] = (-127, 127) if bits == 8 else (-8, 7)  # every scale, and the 4-bit offset, are exact
    scale = 2.0 ** torch.randint(-3, 3, (32, 2), generator=generator)  # of each row's halves
    scale = scale if bits == 4 else scale[:, :1].expand(32, 2)
    weight = q * scale.repeat_interleave(32, dim=1)
    stored = packed(weight, bits).state_dict()
    words = torch.zeros(2, {4: 8, 8: 16, 16: 64}[bits], {4: 16, 8: 16, 16: 8}[bits], dtype=torch.int32)
    pairs = weight.bfloat16().view(torch.int16).long() & 0xFFFF
    for block, column, lane in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        if bits == 16:  # two rows' numbers, the first one's below
            first, second = (int(pairs[16 * block + 2 * lane + i, column]) for i in (0, 1))
            word = first | second << 16
        else:
            half, per = 1 << (bits - 1), 32 // bits
            of_row = [int(q[16 * block + lane, (8 * column + j) if bits == 4 else (16 * j + column)]) for j in range(per)]
            word = sum((value + half if j < per - 1 else value & (2 * half - 1)) << (bits * j) for j, value in enumerate(of_row))
        words[block, column, lane] = signed32(word)
    assert torch.equal(stored["words"], words)
    if bits == 8:
        assert torch.equal(stored["scales"], scale[:, 0].float())
    if bits == 4:  # offsets, then scales: of 16 rows a group
        low_scale = torch.stack([-8 * scale, scale]).view(2, 2, 16, 2).transpose(2, 3).bfloat16().contiguous()
        assert torch.equal(stored["scales"].view(torch.bfloat16), low_scale)
    again = PackedMatrix(32, 64, bits)
    again.load_state_dict(stored)
    assert torch.equal(again.transposed().T, weight)


def test_precision_by_part():
    assert parse_precision("int8") == {"slow": "int8", "fast": "int8", "head": "int8"}
    assert parse_precision("int4") == {"slow": "int4", "fast": "int4", "head": "int8"}
    assert parse_precision("slow=bf16, fast=int4") == {"slow": "bf16", "fast": "int4", "head": "fp32"}
    assert parse_precision("int8-dynamic") == {"slow": "int8-dynamic", "fast": "int8-dynamic", "head": "int8"}
    for wrong in ("int3", "slow=int3", "medium=int8", "", "slow=", "slow=int8,slow=int4", None):
        with pytest.raises(ValueError, match="precision"):
            parse_precision(wrong)
    for text, form in (("head=int8, fast=int8,slow=int8", "int8"), ("slow=int4,fast=int4,head=int8", "int4"), ("fast=int4,slow=int8", "slow=int8,fast=int4")):
        assert normal_form(text) == form == quantize(make_tiny_model(400), text).precision
    with pytest.raises(ValueError, match=r"fast=int8.* none; write int8"):
        quantize(make_tiny_model(400, n_stem=4, n_tail=0), "fast=int8")


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "slow=int8,fast=int4", "fast=int8", "head=int8"])
@torch.no_grad()
def test_weights_in_half_precision_are_quantized_as_the_same_in_fp32(tmp_path, precision):
    tokens, model = torch.arange(40)[None], make_tiny_model(400).bfloat16()
    expected, model = quantize(make_tiny_model(400).bfloat16().float(), precision), quantize(model, precision)
    save_checkpoint(tmp_path, model, make_tiny_tokenizer(), dtype="bfloat16")
    for found in (model, load_checkpoint(tmp_path)[0], load_checkpoint(tmp_path, dtype="bfloat16")[0]):
        for route in ("slow", "fast", "auto", "soft"):
            torch.testing.assert_close(found(tokens, route, threshold=0.5).logits, expected(tokens, route, threshold=0.5).logits)


@torch.no_grad()
def test_where_only_other_parts_are_packed_the_slow_branch_computes_what_it_did(monkeypatch):
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: True)
    tokens = torch.arange(100)[None]
    assert torch.equal(quantize(make_tiny_model(400), "fast=int8")(tokens, "slow").hidden, make_tiny_model(400)(tokens, "slow").hidden)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "slow=int8,fast=int4,head=bf16"])
def test_a_quantized_model_is_the_model_with_rounded_matrices(precision, monkeypatch):
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: False)  # nothing else is rounded
    bits, tokens = {part: BITS[name] for part, name in parse_precision(precision).items()}, torch.arange(40)[None]
    model, plain = quantize(make_tiny_model(400), precision), make_tiny_model(400)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            part = "head" if name.startswith(("embed", "head")) else "fast" if ".fast." in name else "slow"
            if p.dim() == 2 and not name.startswith("gate") and bits[part] < 32:
                p.copy_(rounded(p, bits[part]))
        for route in ("slow", "fast", "soft"):
            torch.testing.assert_close(model(tokens, route).logits, plain(tokens, route).logits, rtol=1e-4, atol=1e-4)
    kinds = {type(m) for m in model.modules()}
    assert PackedEmbedding in kinds and not any(isinstance(m, torch.nn.Linear) for b in model.blocks for m in b.modules())


def test_quantizing_twice_is_refused_and_fp32_changes_nothing():
    model = quantize(make_tiny_model(400), "fp32")
    assert any(isinstance(m, torch.nn.Linear) for m in model.blocks.modules())
    with pytest.raises(ValueError, match="already"):
        quantize(quantize(model, "int8"), "int4")


@pytest.mark.parametrize("precision", ["int8", "slow=int4,head=bf16"])
def test_a_quantized_checkpoint_loads_as_it_was(tmp_path, precision):
    model, tokens = quantize(make_tiny_model(400), precision), torch.arange(30)[None]
    save_checkpoint(tmp_path / "small", model, make_tiny_tokenizer())
    save_checkpoint(tmp_path / "full", make_tiny_model(400), make_tiny_tokenizer())
    again, _ = load_checkpoint(tmp_path / "small")
    assert again.precision == precision
    for (name, a), (_, b) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert a.dtype == b.dtype, f"compiled code reads {name} as what it was made for"
    with torch.no_grad():
        assert torch.equal(again(tokens, "slow").logits, model(tokens, "slow").logits)
    small, full = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("small", "full"))
    assert small < 0.75 * full


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_many_tokens_are_multiplied_in_bf16_only_where_there_are_units_for_it(bits, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrix, x = packed(torch.randn(48, 64, generator=generator), bits), torch.randn(FEW + 1, 64, generator=generator)
    exact = x @ matrix.transposed()
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: True)
    rounded = multiply(matrix, x)
    assert rounded.dtype == torch.bfloat16 and 0 < (rounded.float() - exact).norm() / exact.norm() < 0.01
    assert torch.equal(multiply(matrix, x[:FEW]), x[:FEW] @ matrix.transposed())
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: False)
    assert torch.equal(multiply(matrix, x), exact)


def test_products_in_bf16_meet_few_shapes():
    more = partial(more_rows, like=torch.zeros(1, dtype=torch.bfloat16))
    assert len({n + more(n) for n in range(FEW + 1, 2049)}) == 40
    assert all(more(n) < max(16, n / 8) for n in range(1, 5000)) and more(2048) == 0
    assert more_rows(17, torch.zeros(1)) == 0, "others keep nothing"


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("n_tokens", [1, FEW, FEW + 1, 64, 70])
def test_a_packed_feed_forward_in_slices_is_what_its_matrices_say(monkeypatch, activation, bf16, n_tokens):
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: bf16)
    ff = quantize(make_tiny_model(400, activation=activation), "int8").blocks[1].fast.ff
    assert isinstance(ff, PackedFeedForward)
    x = torch.randn(n_tokens, 32, generator=torch.Generator().manual_seed(0))
    before, expected = x.clone(), FeedForward.forward(ff, x)  # every product whole
    monkeypatch.setattr(packed_module, "HIDDEN_ELEMENTS", 60 * ff.w_act.matrix.n_rows)
    monkeypatch.setattr(packed_module, "HIDDEN_TOKENS", 24)
    rows, product = [], packed_module._product
    monkeypatch.setattr(packed_module, "_product", lambda x, weight: rows.append(len(x)) or product(x, weight))
    found = ff(x)
    exact = dict(rtol=2e-2, atol=1e-2) if bf16 and n_tokens > FEW else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.float(), expected.float(), **exact)
    assert found.dtype == expected.dtype and torch.equal(x, before), "what it is given is not overwritten"
    assert rows[::3] == {64: [48, 16], 70: [48, 22]}.get(n_tokens, [n_tokens]) and len(rows) % 3 == 0


def test_norms_before_packed_products_alone_give_what_those_multiply(monkeypatch):
    x, weight = torch.randn(FEW + 1, 32, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 32)

    def kinds(precision):
        block = quantize(make_tiny_model(400), precision).blocks[1]
        return [isinstance(norm, ProductNorm) for norm in (block.attn_norm, block.slow.ff_norm, block.fast.ff_norm)]

    assert [kinds(p) for p in ("int8", "slow=int8", "fast=int4", "head=int8")] == [[True] * 3, [False, True, False], [False, False, True], [False] * 3]
    model = quantize(make_tiny_model(400), "slow=int4,fast=int8")
    norm = model.blocks[1].attn_norm
    norm.weight.copy_(weight)
    plain = torch.nn.RMSNorm(32, norm.eps)
    plain.load_state_dict(norm.state_dict())
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: True)
    assert torch.equal(norm(x), plain(x).bfloat16()) and torch.equal(norm(x[:FEW]), plain(x[:FEW]))
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: False)
    assert torch.equal(norm(x), plain(x))
    few = torch.randn(3, 32)
    expected = model.blocks[1].slow.ff(few)
    unpack_branches(model)
    torch.testing.assert_close(model.blocks[1].slow.ff(few), expected)
    assert not any(isinstance(m, (ProductNorm, PackedFeedForward)) for m in model.modules()) and torch.equal(model.blocks[1].attn_norm.weight, weight)


def test_the_cache_is_exact_where_the_weights_of_keys_and_values_are():
    for precision, dtype in (("fp32", torch.float32), ("fast=int4,head=int8", torch.float32), ("bf16", torch.bfloat16), ("slow=int8", torch.bfloat16)):
        model = quantize(make_tiny_model(400), precision)
        assert model.new_cache(1, 8).k[0].dtype == dtype, precision
        assert model.cost("slow").kv_bytes * 4 == make_tiny_model(400).cost("slow").kv_bytes * dtype.itemsize


def test_a_quantized_model_prefills_in_bf16_and_caches_what_decoding_reads(monkeypatch):
    """Whole, in chunks of many tokens, and token by token: the same but for rounding, on every route."""
    tokens = torch.randint(10, 400, (1, 60), generator=torch.Generator().manual_seed(2))
    model = quantize(make_tiny_model(400), "int8")
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: True)
    for route in ("slow", "fast"):
        logits = {}
        for size in (60, 20, 1):
            cache = model.new_cache(1, 64)
            with torch.no_grad():
                logits[size] = torch.cat([model(part, route, cache=cache).logits for part in tokens.split(size, 1)], 1)
            assert cache.k[0].dtype == torch.bfloat16
        assert 0 < (logits[60] - logits[1]).norm() / logits[1].norm() < 0.03
        assert (logits[20] - logits[1]).norm() / logits[1].norm() < 0.03
