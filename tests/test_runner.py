"""The decode step: equal to the model's own forward, whatever the dialect, and compiled without recompiling as the context grows."""

import dataclasses
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_model, make_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from strict_steps import strict_steps

from dualbranch import compiled, memory
from dualbranch.cache import CacheFull, KVCache
from dualbranch.compiled import PREFETCH, WHOLE_COPIES, build, compile_step, merge_repeated, steps_folder, unavailable
from dualbranch.model import DualBranchModel
from dualbranch.packed import FEW, Normed, product_dtype
from dualbranch.precision import quantize
from dualbranch.prompt import ModuleStep, modules_of, run_step
from dualbranch.runner import FEW_IN_FP32, FEW_OF_A_ROW, FEW_OF_ROWS, Runner, calls_topk, plain_steps, reach_of, read, sparse_blocks
from dualbranch.sparse_prompt import MOST_BLOCKS, SparsePrompt
from kernels import AttentionPlan, SparseSpec, has_bf16_units
from kernels.reference import pool_keys, select_blocks, sparse_mask

DIALECTS = {
    "plain": {},
    "no selected blocks": {"sparse": SparseSpec(block_size=4, n_selected_blocks=0, window=6, n_sinks=3, dense_len=12)},
    "more blocks than there are": {"sparse": SparseSpec(block_size=4, n_selected_blocks=30, window=5, n_sinks=0, dense_len=8)},
    "sinks in a block, odd window": {"sparse": SparseSpec(block_size=8, n_selected_blocks=2, window=7, n_sinks=5, dense_len=10)},
    "one kv head, normed queries": {"n_kv_heads": 1, "qk_norm": True, "qkv_bias": True},
    "sliding layers": {"sliding_layers": (1, 2), "sliding_window": 10, "sliding_rope_theta": 50.0},
    "gemma": {"post_norms": True, "embed_scale": 5.5, "logit_softcap": 3.0, "activation": "geglu", "attn_scale": 0.2, "tie_embeddings": True},
    "partial rotary": {"rotary_dim": 4},
}


def uncompiled(model):
    """With the runner's steps as plain operators."""
    model.runner = Runner(model, strict_steps(model))
    return model


def decode(model, tokens, n_prompt, route, **how):
    """Logits of `tokens (1, T)` after the first `n_prompt`, fed one by one, and the cache."""
    cache = model.new_cache(1, tokens.shape[1])
    with torch.no_grad():
        model(tokens[:, :n_prompt], route, cache=cache, **how)
        outs = [model(tokens[:, t : t + 1], route, cache=cache, **how) for t in range(n_prompt, tokens.shape[1])]
    return outs, cache


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("route", ["slow", "fast", "auto"])
def test_the_runner_computes_what_the_model_computes(dialect, route):
    tokens = torch.randint(10, 400, (1, 70), generator=torch.Generator().manual_seed(1))
    how = {"budget": 0.5} if route == "auto" else {}
    expected, cache = decode(make_tiny_model(400, **DIALECTS[dialect]), tokens, 5, route, **how)
    found, own = decode(uncompiled(make_tiny_model(400, **DIALECTS[dialect])), tokens, 5, route, **how)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(a.hidden, b.hidden, rtol=1e-4, atol=2e-5)
        assert (a.use_slow is None) == (b.use_slow is None)
        assert a.use_slow is None or torch.equal(a.use_slow, b.use_slow)
    assert torch.equal(own.n_cached, cache.n_cached) and torch.equal(own.from_slow, cache.from_slow)
    for name in ("k", "v"):
        for a, b in zip(getattr(own, name), getattr(cache, name), strict=True):
            torch.testing.assert_close(a[:, :70], b[:, :70], rtol=1e-4, atol=1e-5)
    for i, pooled in cache.pooled.items():
        whole = 70 // model_block(dialect)
        torch.testing.assert_close(own.pooled[i][:, :whole], pooled[:, :whole], rtol=1e-4, atol=1e-5)
    if route == "auto":
        assert 0 < sum(bool(o.use_slow) for o in found) < len(found)


def model_block(dialect):
    return DIALECTS[dialect].get("sparse", SparseSpec(block_size=4)).block_size


@pytest.mark.parametrize("units", [False, True])
def test_only_few_cached_tokens_without_gradient_are_the_runners(monkeypatch, units):
    monkeypatch.setattr("dualbranch.runner.has_bf16_units", lambda device: units)
    of_packed = (FEW, FEW) if units else (FEW_OF_A_ROW, FEW_OF_ROWS)
    for model, few, of_rows in ((make_tiny_model(400), FEW_IN_FP32, FEW_IN_FP32), (quantize(make_tiny_model(400), "int8"), *of_packed)):
        calls, steps = [], strict_steps(model)
        model.runner = Runner(model, {name: lambda *a, name=name, steps=steps, calls=calls: calls.append(name) or steps[name](*a) for name in steps})
        one, cache, rows = torch.tensor([[20]]), model.new_cache(1, 64), model.new_cache(of_rows + 1, 16)
        model(one, cache=cache)  # with gradients enabled
        with torch.no_grad():
            model(one)
            model(one, "soft", cache=cache)
            model(torch.arange(10, 11 + few)[None], cache=cache)
            model(torch.full((of_rows + 1, 1), 20), cache=rows)
            model(torch.full((2, few // 2 + 1), 20), cache=rows.rows(0, 2))
            model(one, cache=cache, lengths=torch.tensor([0]))
            assert not {"embed", "slow", "fast"} & set(calls)  # a single token's head is the runner's, whoever computed the rest
            calls.clear()
            model(one, cache=cache)
            assert [name for name in calls if not name.startswith("unpack")] == ["embed", *["slow"] * model.config.n_layers, "logits"]
            calls.clear()
            model(torch.arange(10, 10 + few)[None], cache=cache, last_only=True)
            assert calls.count("embed") == few and calls.count("logits") == 1
            calls.clear()
            model(torch.full((of_rows, 1), 20), cache=rows.rows(0, of_rows))
            assert calls.count("embed") == of_rows and calls.count("logits") == of_rows


@pytest.mark.parametrize("dialect", ["plain", "sliding layers", "gemma"])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("route", ["slow", "fast", "auto", "given"])
def test_few_tokens_one_by_one_are_what_one_pass_computes(monkeypatch, route, last_only, dialect):
    monkeypatch.setattr(DualBranchModel, "cache_dtype", torch.float32)  # in bf16, sums in another order round some keys and values the other way
    n, tokens = 40, torch.randint(10, 400, (1, 48), generator=torch.Generator().manual_seed(1))
    how, given = ({"budget": 0.5} if route == "auto" else {}), torch.tensor([[True, False, False, True, False, True, True, False]])
    outs, caches = [], []
    plain, stepwise = (quantize(make_tiny_model(400, **DIALECTS[dialect]), "int8") for _ in range(2))
    for model in (plain, stepwise):
        cache = model.new_cache(1, tokens.shape[1])
        with torch.no_grad():
            model(tokens[:, :n], cache=cache)
            if model is stepwise:
                uncompiled(model)
            outs.append(model(tokens[:, n:], given if route == "given" else route, cache=cache, last_only=last_only, **how))
        caches.append(cache)
    for name in ("logits", "hidden", "g", "use_slow"):
        a, b = (getattr(out, name) for out in outs)
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape), name
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)
    assert torch.equal(caches[0].from_slow, caches[1].from_slow) and torch.equal(caches[0].n_cached, caches[1].n_cached)
    if route == "auto":
        assert 0 < int(outs[1].use_slow.sum()) < tokens.shape[1] - n


@pytest.mark.parametrize("dialect", ["plain", "sliding layers"])
@pytest.mark.parametrize("route", ["slow", "fast", "auto", "given"])
@torch.no_grad()
def test_rows_together_are_bit_for_bit_what_each_is_alone(route, dialect):
    model = uncompiled(quantize(make_tiny_model(400, **DIALECTS[dialect]), "int8"))
    lengths, n_new = [23, 15, 40], 2  # dense_len is 16
    tokens = torch.randint(10, 400, (3, 40 + n_new), generator=torch.Generator().manual_seed(2))
    given = torch.tensor([[True, False], [False, False], [True, True]])
    thresholds = torch.tensor([[0.5], [math.inf], [-math.inf]])  # by the gate, all slow, all fast

    def run(rows, cache):
        new = torch.stack([tokens[b, lengths[b] : lengths[b] + n_new] for b in rows])
        how = {"threshold": thresholds[rows]} if route == "auto" else {}
        return model(new, given[rows] if route == "given" else route, cache=cache, **how)

    together, alone = model.new_cache(3, 48), [model.new_cache(1, 48) for _ in range(3)]
    for b, n in enumerate(lengths):
        for cache in (together.rows(b, b + 1), alone[b]):
            model(tokens[b : b + 1, :n], "fast", cache=cache)
    out, outs = run([0, 1, 2], together), [run([b], cache) for b, cache in enumerate(alone)]
    for name in ("logits", "hidden", "g", "use_slow"):
        found, expected = getattr(out, name), [getattr(o, name) for o in outs]
        assert (found is None) == (expected[0] is None) and (found is None or torch.equal(found, torch.cat(expected))), name
    for b, (n, cache) in enumerate(zip(lengths, alone, strict=True)):
        row = together.rows(b, b + 1)
        assert torch.equal(row.n_cached, cache.n_cached) and torch.equal(row.from_slow, cache.from_slow) and int(row.n_cached) == n + n_new
        assert all(torch.equal(x, y) for layers in zip(row.heads, cache.heads, strict=True) for x, y in zip(*layers, strict=True))
        assert all(torch.equal(row.pooled[i], cache.pooled[i]) for i in row.pooled)
    if route == "auto":
        assert out.use_slow[1:].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("how", [{"dense": True}, {"last_only": True}, {}])
@torch.no_grad()
def test_rows_one_by_one_are_what_one_pass_computes(monkeypatch, how):
    monkeypatch.setattr(DualBranchModel, "cache_dtype", torch.float32)
    n_new, dense = (1, True) if how.pop("dense", False) else (3, False)
    tokens, lengths, outs, caches = torch.randint(10, 400, (3, 30 + n_new), generator=torch.Generator().manual_seed(1)), torch.tensor([30, 14, 17]), [], []
    plain, stepwise = (quantize(make_tiny_model(400, **({"n_stem": 4, "n_tail": 0} if dense else {})), "int8") for _ in range(2))
    for model in (plain, stepwise):
        cache = model.new_cache(3, 36)
        model(tokens[:, :30], "slow", cache=cache, lengths=lengths)
        if model is stepwise:
            uncompiled(model)
        outs.append(model(tokens[:, 30:], "auto", cache=cache, budget=0.5, **how))
        caches.append(cache)
    for name in ("logits", "hidden", "g"):
        a, b = (getattr(out, name) for out in outs)
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape), name
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)
    if not dense:
        assert torch.equal(outs[1].use_slow, outs[0].use_slow) and 0 < int(outs[1].use_slow.sum()) < outs[1].use_slow.numel()
    assert torch.equal(caches[0].from_slow, caches[1].from_slow) and torch.equal(caches[0].n_cached, caches[1].n_cached)
    for b, n in enumerate((lengths + n_new).tolist()):
        for x, y in zip(*([t[b, :, :n] for layer in cache.heads for t in layer] for cache in caches), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        for i, pooled in caches[0].pooled.items():
            torch.testing.assert_close(caches[1].pooled[i][b, : n // 4], pooled[b, : n // 4], rtol=1e-4, atol=1e-5)


def test_a_full_cache_is_refused_and_left_as_it_was():
    model = uncompiled(make_tiny_model(400))
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        model(torch.arange(10, 14)[None], cache=cache)
        with pytest.raises(CacheFull, match="holds 4 tokens"):
            model(torch.tensor([[20]]), cache=cache)
        assert int(cache.n_cached) == 4
        cache.truncate(2)
        with pytest.raises(CacheFull, match="holds 4 tokens"):
            model(torch.tensor([[20, 21, 22]]), cache=cache)
    assert int(cache.n_cached) == 2


@torch.no_grad()
def test_where_one_of_several_rows_is_full_none_is_written():
    model = uncompiled(quantize(make_tiny_model(400), "int8"))
    cache = model.new_cache(2, 8)
    model(torch.arange(10, 18)[None], cache=cache.rows(1, 2))
    before = [t.clone() for layer in cache.heads for t in layer]
    with pytest.raises(CacheFull, match="holds 8 tokens and 9 are needed"):
        model(torch.tensor([[20], [21]]), cache=cache)
    assert cache.n_cached.tolist() == [0, 8]
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in cache.heads for t in layer), strict=True))


def test_where_it_cannot_be_compiled_decoding_goes_on_without(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    model = make_tiny_model(400)
    assert not model.compile_decode() and model.runner is None
    assert "dualbranch compile" in caplog.text
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not model.compile_decode(build=True)
    assert "no C++ compiler 'no-such-compiler'" in caplog.text


def test_libraries_are_told_apart_by_everything_their_code_depends_on(monkeypatch):
    config = make_tiny_model(400).config
    folder = steps_folder(config, "int8")
    for change in ({"fast_d_ff": 24}, {"qk_norm": True}, {"sparse": SparseSpec(window=9)}, {"vocab_size": 401}):
        assert steps_folder(dataclasses.replace(config, **change), "int8") != folder
    assert steps_folder(config, "int4") != folder
    assert steps_folder(dataclasses.replace(config, max_seq_len=512), "int8") == folder
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert steps_folder(config, "int8") != folder


@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
def test_quantized_weights_are_not_decoded_by_the_runner_of_the_old_ones():
    model = make_tiny_model(400)
    model.runner = Runner(model, strict_steps(model))
    quantize(model, "int4")
    assert model.runner is None


def test_weights_moved_or_replaced_are_not_decoded_by_the_runner_of_the_old_ones():
    model, other = make_tiny_model(400), make_tiny_model(400, seed=1)
    tokens = torch.tensor([[20]])

    def next_logits():
        with torch.no_grad():
            return model(tokens, cache=model.new_cache(1, 8)).logits

    for change in (lambda: model.load_state_dict(other.state_dict(), assign=True), model.double, model.float):
        model.runner = Runner(model, strict_steps(model))
        change()
        assert model.runner is None
    torch.testing.assert_close(next_logits(), other(tokens).logits)
    packed = quantize(make_tiny_model(400), "int8")
    packed.runner = Runner(packed, dict.fromkeys(plain_steps(packed), int))  # steps that can do nothing
    packed.to("cpu")
    assert torch.isfinite(packed(torch.tensor([[20, 21]])).logits).all(), "matrices unpack themselves without the steps they had"


def test_more_sinks_than_cached_tokens_are_clamped():
    model = make_tiny_model(400, sparse=SparseSpec(block_size=4, n_selected_blocks=1, window=4, n_sinks=40, dense_len=8))
    tokens = torch.randint(10, 400, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, "fast").logits
        model.runner = Runner(model, strict_steps(model))
        cache = model.new_cache(1, 20)
        found = [model(tokens[:, :12], "fast", cache=cache).logits, *(model(tokens[:, i : i + 1], "fast", cache=cache).logits for i in range(12, 20))]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 9), st.sampled_from([0, 1, 2, 3, 5, MOST_BLOCKS, MOST_BLOCKS + 1]), st.integers(1, 25), st.integers(0, 20), st.integers(0, 99),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_blocks_read_hold_each_key_of_the_rule_once(block_size, n_selected, window, n_sinks, position, tied, seed):
    spec = SparseSpec(block_size, n_selected, window, n_sinks, dense_len=0)
    room = (position // block_size + 1) * block_size
    q, k = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), torch.randn(1, room, 2, 8, generator=torch.Generator().manual_seed(seed + 1))
    if tied and not calls_topk(spec):  # many scores are equal, and exactly so
        q, k = q.round(), k[:, ::block_size].round().clamp(-1, 1).repeat_interleave(block_size, 1)
    pooled, plan = pool_keys(k, block_size), AttentionPlan(torch.tensor([[position]]), room)
    reach, room_for_one = reach_of(position, block_size, True), F.pad(pooled, (0, 0, 0, 0, 0, 1), value=float("nan"))
    blocks, seen = sparse_blocks(q.view(2, 2, 8), room_for_one, reach, torch.tensor([position]), spec)
    assert int(blocks.min()) >= 0 and int(blocks.max()) < room // block_size
    times_read = torch.zeros(2, room, dtype=torch.int64)
    tokens = blocks[..., None] * block_size + torch.arange(block_size)
    times_read.scatter_add_(1, tokens.flatten(1), seen.flatten(1).long())
    expected = sparse_mask(select_blocks(q[None, None], pooled, plan, spec), plan, spec)[0, 0]
    assert torch.equal(times_read, expected.long())


def test_what_a_program_computes_twice_is_computed_once():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return (x * 2.0).sin() + (x * 2.0).sin() * (x * 3.0)

    program = torch.export.export(Twice(), (torch.ones(3),)).run_decompositions({})
    before = len(program.graph.nodes)
    merge_repeated(program)
    assert len(program.graph.nodes) == before - 2
    x = torch.randn(3)
    assert torch.equal(program.module()(x), Twice()(x))


def test_plain_steps_of_norms_leave_the_model_movable(monkeypatch):
    for module in ("packed", "runner"):
        monkeypatch.setattr(f"dualbranch.{module}.has_bf16_units", lambda device: True)
    model = quantize(make_tiny_model(400), "int8")
    for _ in range(2):
        steps = strict_steps(model)
        model.runner = Runner(model, steps)
        assert "norm" in steps and set(model.state_dict()) == set(quantize(make_tiny_model(400), "int8").state_dict())
        model.to("cpu")


@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("n_blocks", "in_one_piece"), [(2, {"choose", "read"}), (MOST_BLOCKS + 1, {"fast-sparse"})])
def test_steps_that_return_or_call_take_one_allocation_and_the_others_the_stack(monkeypatch, tmp_path, n_blocks, in_one_piece):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    dialect, options = DIALECTS["sliding layers"], {}
    rule = dataclasses.replace(make_tiny_model(400, **dialect).config.sparse, n_selected_blocks=n_blocks)
    model = make_tiny_model(400, **dialect | {"sliding_layers": (1,), "sparse": rule})

    def note(program, package_path, inductor_configs):
        options[Path(package_path).stem] = inductor_configs
        Path(package_path).touch()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", note)
    build(model, n_at_once=1)
    assert {name for name, how in options.items() if "memory_planning" in how} == in_one_piece
    assert {name for name, how in options.items() if "aot_inductor.allow_stack_allocation" in how} == set(options) - in_one_piece - {"embed", "logits"}
    assert "sliding-fast-sparse" in options


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_code_is_for_one_thread_or_any_number_of_them(monkeypatch, tmp_path, n_threads):
    said, own = [], torch.get_num_threads
    monkeypatch.setattr("os.cpu_count", lambda: 64)  # for as many PyTorch's compiler writes code that asks how many there are; else for exactly so many
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **how: said.append(torch.get_num_threads()))
    compile_step(Normed(1e-5), (torch.ones(40, 8), torch.ones(8)), (None, None), tmp_path / "norm.pt2", n_threads)
    assert said == [1 if n_threads == 1 else 64] and torch.get_num_threads is own


def largest_difference(a, b):
    """Of tensors, or tuples of them."""
    pairs = [(a, b)] if isinstance(a, torch.Tensor) else zip(a, b, strict=True)
    return max(float((x.float() - y.float()).abs().max()) for x, y in pairs)


def test_compiled_and_quantized_it_computes_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    monkeypatch.setattr(DualBranchModel, "cache_dtype", torch.float32)  # in bf16, sums in another order round some keys and values the other way
    tok = make_tiny_tokenizer()
    tokens = torch.randint(10, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    model = make_tiny_model(tok.vocab_size, qk_norm=True, qkv_bias=True, post_norms=True, attn_scale=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("dualbranch.packed.LARGE", 1)  # every 8-bit matrix of two blocks
    model = quantize(model, "slow=int8-dynamic,fast=int4,head=bf16", tok)
    routes = {"slow": {}, "fast": {}, "auto": {"budget": 0.5}}
    expected = {route: decode(model, tokens, 5, route, **how)[0] for route, how in routes.items()}
    names, n = [], 18 + 4 * has_bf16_units(model.device)
    build(model, names.append)
    # slow, fast, fast-sparse, embed, logits, keys, queries of both, rest of fast, choose, read, unpacking 3 widths to each dtype, norms, between bytes
    assert len(names) == len(plain_steps(model)) == n
    build(model, names.append)
    assert len(names) == n, "what is built is built again"
    plain = plain_steps(model)
    assert model.compile_decode()
    for route, how in routes.items():
        for n_tokens in (50, 90):  # two capacities, both sides of dense_len
            for a, b in zip(decode(model, tokens[:, :n_tokens], 5, route, **how)[0], expected[route], strict=False):
                torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=2e-5)
    rows, alone, lengths = model.new_cache(3, 64), [model.new_cache(1, 64) for _ in range(3)], (30, 9, 15)
    with torch.no_grad():
        for b, length in enumerate(lengths):
            for cache in (rows.rows(b, b + 1), alone[b]):
                model(tokens[:, :length], "fast", cache=cache)
        for t in range(4):
            newest = torch.stack([tokens[0, length + t : length + t + 1] for length in lengths])
            together = model(newest, "auto", cache=rows, budget=0.5)
            of_each = [model(newest[b : b + 1], "auto", cache=alone[b], budget=0.5) for b in range(3)]
            assert torch.equal(together.logits, torch.cat([out.logits for out in of_each]))
    modules = modules_of(model.blocks[1])
    assert set(modules) == {"keys", "queries-slow", "queries-fast", "rest-fast"}
    for name, module in modules.items():
        for n_tokens in (FEW + 1, 32, 70):  # rounding aside, whole prompts would differ by the blocks that they choose
            is_rest, generator = name.startswith("rest"), torch.Generator().manual_seed(n_tokens)
            shapes = [(32,), (module.w_o.matrix.n_columns,)] if is_rest else [(32,), (1, 8), (1, 8)]
            args = [torch.randn(n_tokens, *shape, generator=generator).bfloat16().float() for shape in shapes]  # what is exact in bf16
            weights = ModuleStep(module).weights_of(module)
            found, in_operators = (run_step(steps[name], weights, is_rest, *args) for steps in (model.runner.steps, plain))
            with monkeypatch.context() as in_fp32:
                in_fp32.setattr("dualbranch.packed.has_bf16_units", lambda device: False)
                exact = run_step(plain[name], weights, is_rest, *args)
            off, allowed = (largest_difference(result, exact) for result in (found, in_operators))
            assert off <= 2 * allowed + 1e-5, f"{name} of {n_tokens} tokens is off by {off}, PyTorch's operators by {allowed}"
    sparse, c = model.runner.blocks[1].fast.sparse, model.config
    for n_tokens in (c.sparse.dense_len + 15, c.max_seq_len):
        generator = torch.Generator().manual_seed(n_tokens)
        h = torch.randn(n_tokens, c.d_model, generator=generator)
        k, v = (torch.randn(1, n_tokens, c.n_kv_heads, c.head_dim, generator=generator).bfloat16() for _ in range(2))
        dtype, (cos, sin) = product_dtype(n_tokens, model.device), model.rope(torch.arange(n_tokens), n_tokens)
        q = model.blocks[1].fast.queries(h.to(dtype), cos.to(dtype), sin.to(dtype))  # in fp32 all the same: a bias was added
        assert q.dtype == torch.float32
        plan = AttentionPlan(torch.arange(n_tokens)[None], n_tokens)
        plain_sparse = SparsePrompt(c.sparse, plain["choose"], plain["read"], sparse.dtype)
        found, expected = (of(q, k, v, None, plan) for of in (sparse, plain_sparse))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)  # at most rounded the other way
    with torch.no_grad():
        compiled_steps, model.runner = model.runner, Runner(model, plain)
        expected = model(tokens, "fast", cache=model.new_cache(1, 100)).logits
        model.runner = compiled_steps
        found = model(tokens, "fast", cache=model.new_cache(1, 100)).logits
    assert (found - expected).norm() < 0.1 * expected.norm(), "a whole prompt; some block may be chosen the other way"


@pytest.mark.skipif(os.name != "posix", reason="compilers that are shell scripts")
def test_compilers_get_the_flags_they_know(monkeypatch, tmp_path):
    def compiler(name: str, version: str, refused: str) -> str:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "{version}";; *{refused}*) exit 1;; esac\n')
        path.chmod(0o755)
        return str(path)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert compiled._accepted_flags(compiler("new", "Free Software Foundation", "none")) == [PREFETCH, WHOLE_COPIES]
    assert compiled._accepted_flags(compiler("old", "Free Software Foundation", "-mmove-max=256")) == [PREFETCH]
    assert compiled._accepted_flags(compiler("clang", "clang 19", "none")) == []
    for made in ("slow.pt2", "done"):
        (tmp_path / made).touch()
    notes = []
    for name, n_notes, there in (("new", 0, True), ("new", 0, True), ("old", 1, False), ("clang", 1, False)):  # no flags are on record at first
        monkeypatch.setenv("CXX", str(tmp_path / name))
        compiled._discard_if_made_otherwise(tmp_path, notes.append)
        assert len(notes) == n_notes and (tmp_path / "slow.pt2").exists() == (tmp_path / "done").exists() == there
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert compiled._accepted_flags(compiler("wide", "Free Software Foundation", "none")) == [PREFETCH]


@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
def test_compiled_in_fp32_it_computes_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    tokens = torch.randint(10, 400, (1, 40), generator=torch.Generator().manual_seed(1))
    model = make_tiny_model(400, n_stem=4, n_tail=0, qkv_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    expected = decode(model, tokens, 5, "slow")[0]
    compiler, computed = torch._inductor.aoti_compile_and_package, []

    def compile_and_look(program, **how):
        computed.append([(node.target, node.args, node.kwargs) for node in program.graph.nodes if node.op == "call_function"])
        return compiler(program, **how)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_look)
    compiler_with_log, log = tmp_path / "g++", tmp_path / "flags"
    compiler_with_log.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {os.environ.get("CXX") or "g++"} "$@"\n')
    compiler_with_log.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler_with_log))}):
        build(model, n_at_once=1)
    asked = [set(line.split()) for line in log.read_text().splitlines() if "-c" in line.split()]
    expected_flags = {"-ffp-contract=fast", *" ".join(compiled._accepted_flags(str(compiler_with_log))).split()}
    assert asked and all(expected_flags <= flags for flags in asked), "PyTorch passes the C++ compiler's flags on"
    assert computed and all(len({str(x) for x in operators}) == len(operators) for operators in computed), "nothing is computed twice"
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(memory, "HUGE_PAGE", 4096)  # so that this model fills one
    assert model.compile_decode(), "what is built needs no compiler"
    if memory._huge_memory(1) is not None:
        assert all(t.data_ptr() in memory._regions for t in model.parameters())
    for a, b in zip(decode(model, tokens, 5, "slow")[0], expected, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)
    folder = steps_folder(model.config, model.precision)
    shutil.copytree(folder, tmp_path / "sound")
    (folder / "slow.pt2").write_bytes((folder / "slow.pt2").read_bytes()[:5000])
    assert not make_tiny_model(400, n_stem=4, n_tail=0, qkv_bias=True).compile_decode() and not folder.exists(), "what is damaged is thrown away"
    shutil.copytree(tmp_path / "sound", folder)
    (folder / "slow.pt2").unlink()
    builds = []
    monkeypatch.setattr(compiled, "build", lambda *_: builds.append(1) or folder.exists() or shutil.copytree(tmp_path / "sound", folder))
    monkeypatch.setattr(compiled, "unavailable", lambda *_: None)
    assert model.compile_decode(build=True) and len(builds) == 2, "and built anew where that was asked for"


@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("most_blocks", [0, MOST_BLOCKS])
@torch.no_grad()
def test_a_sparse_step_computes_the_same_compiled(monkeypatch, tmp_path, most_blocks):
    monkeypatch.setattr("dualbranch.runner.MOST_BLOCKS", most_blocks)
    model = make_tiny_model(400, max_seq_len=320, sparse=SparseSpec(block_size=1, n_selected_blocks=6, window=3, n_sinks=1, dense_len=4))
    step, c = plain_steps(model)["fast-sparse"], model.config
    assert step.calls_topk == (most_blocks == 0)
    compile_step(step, *compiled.example(model, step), tmp_path / "step.pt2", torch.get_num_threads())
    compiled_step, weights, generator = compiled.opened(tmp_path / "step.pt2"), step.weights_of(model.blocks[1]), torch.Generator().manual_seed(1)
    for position in (5, 40, 131, 299):
        x = torch.randn(1, c.d_model, generator=generator)
        k, v = torch.randn(2, 1, c.n_kv_heads, 300, c.head_dim, generator=generator).unbind(0)
        pooled = torch.randn(1, 300, c.n_kv_heads, c.head_dim, generator=generator)
        if not step.calls_topk:
            pooled = pooled[:, torch.arange(300) % 29]  # of equal blocks the first counts
        pooled[:, position + 1 :] = float("nan")
        rest = torch.zeros(reach_of(position, 1, True)), torch.tensor([position])
        results = [x.clone(), x.clone()]
        for run, result in zip((step, compiled_step), results, strict=True):
            run(weights, result, *model.rope(rest[1], position + 1), k.clone(), v.clone(), pooled.clone(), *rest)
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
def test_a_compiler_that_fails_is_a_value_error(monkeypatch, tmp_path):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))

    def fail(*args, **kwargs):
        raise RuntimeError("C++ compile error\nno space left")

    for name in ("torch._inductor.aoti_compile_and_package", "torch.export.export"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(ValueError, match=r"^(choose|fast-sparse) can't be compiled: C\+\+ compile error"):
                build(make_tiny_model(400))


def test_sizes_that_vary_are_those_of_any_model():
    smallest = {"d_model": 32, "fast_n_heads": 2, "fast_d_ff": 16, "sparse": SparseSpec(block_size=1, n_selected_blocks=6, window=3, n_sinks=1, dense_len=4)}
    model = quantize(make_tiny_model(400, **smallest), "slow=int8,fast=int4,head=bf16")
    steps = plain_steps(model)
    for name in ("slow", "fast-sparse", "unpack4", "unpack8", "unpack16"):
        args, vary = compiled.example(model, steps[name])
        program = torch.export.export(steps[name], args, dynamic_shapes=vary, strict=False)
        inputs = (node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder")
        n_varying = sum(isinstance(size, torch.SymInt) for shape in inputs for size in shape)
        assert n_varying == sum(len(sizes) for sizes in vary if isinstance(sizes, dict) and sizes and isinstance(next(iter(sizes)), int)), name


@torch.no_grad()
def test_a_cache_in_another_dtype_is_not_for_compiled_steps():
    model, tokens = quantize(make_tiny_model(400), "int8"), torch.arange(20, 41)[None]
    cache, expected = KVCache(model.config, 1, 64), model(tokens, cache=KVCache(model.config, 1, 64)).logits[:, 20:]
    calls, steps = [], strict_steps(model)
    model.runner = Runner(model, steps | {"slow": lambda *args: calls.append(args) or steps["slow"](*args)})
    model(tokens[:, :20], cache=cache)
    torch.testing.assert_close(model(tokens[:, 20:], cache=cache).logits, expected)
    assert not calls
    model(tokens[:, :1].int(), cache=model.new_cache(1, 8))
    assert calls


@torch.no_grad()
def test_steps_get_tensors_as_they_were_compiled_for():
    model = make_tiny_model(400)
    x, steps, seen = torch.randn(400, 32), strict_steps(model), []
    expected = model.logits(x[0])
    model.runner = Runner(model, {name: lambda *args, step=step: seen.append(args[1:]) or step(*args) for name, step in steps.items()})
    torch.testing.assert_close(model.logits(x[0]), expected)
    torch.testing.assert_close(model.logits(x.t().contiguous().t()[:1])[0], expected)
    model(torch.tensor([[5]], dtype=torch.int32), cache=model.new_cache(1, 8))
    given = [tensor for args in seen for tensor in args if isinstance(tensor, torch.Tensor)]
    assert all(tensor.is_contiguous() for tensor in given) and not any(tensor.dtype == torch.int32 and tensor.dim() == 1 for tensor in given)
    assert [args[0].shape for args in seen[:2]] == [(1, 32)] * 2


def test_heads_whose_scores_lie_far_apart_keep_their_own_scale():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 3, 8, generator=generator), torch.randn(12, 2, 8, generator=generator), torch.randn(12, 2, 8, generator=generator)
    k[..., 0] = 1
    q[..., 0] = torch.tensor([[900.0, 0, -900], [-900, 500, 0]])  # the same for all keys: it changes no weight
    seen = torch.arange(12) < 10
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None].double(), *(x[:10].transpose(0, 1)[:, None].double() for x in (k, v)))
    k, v = (x.transpose(0, 1).unflatten(1, (3, 4)) for x in (k, v))  # (Hk, P, J, D)
    torch.testing.assert_close(read(q, k, v, seen.view(1, 3, 4))[0], expected.flatten(0, 2).float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_runner_refuses_what_the_model_refuses():
    model = uncompiled(make_tiny_model(400, n_stem=4, n_tail=0, max_seq_len=32))
    cache, token = model.new_cache(1, 64), torch.tensor([[11]])
    model(torch.full((1, 31), 11), "slow", cache=cache)
    with pytest.raises(ValueError, match="unknown route 'sideways'"):
        model(token, "sideways", cache=cache)
    model(token, "slow", cache=cache)
    with pytest.raises(ValueError, match="33 tokens exceed max_seq_len = 32"):
        model(token, "slow", cache=cache)
