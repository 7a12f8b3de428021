"""Many tokens through the steps of blocks: what the blocks compute, whatever is packed."""

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer
from strict_steps import strict_steps
from test_runner import DIALECTS

from dualbranch.cache import KVCache
from dualbranch.model import ROUTES
from dualbranch.packed import FEW
from dualbranch.precision import quantize
from dualbranch.routing_study import ablated
from dualbranch.runner import Runner
from kernels import SparseSpec

PRECISIONS = ["int8", "int4", "bf16", "slow=int8", "fast=int8", "slow=int8,fast=int4", "int8-dynamic", "slow=int8-dynamic,fast=int8"]


def quantized(precision, **overrides):
    tok = make_tiny_tokenizer()
    return quantize(make_tiny_model(tok.vocab_size, **overrides), precision, tok)


def noting(model, calls):
    """The plain steps of `model`, of which those of prompts note their names."""
    steps = strict_steps(model)

    def noted(name, step):
        return (lambda *args: calls.append(name) or step(*args)) if name.startswith(("keys", "queries", "rest")) else step

    return {name: noted(name, step) for name, step in steps.items()}


def passes(model, cache_dtype=torch.float32):  # rounding keys to bf16 makes much of little
    """Logits, gate values and keys of prompts on every route: behind nothing, behind a prompt, and of two rows of unequal lengths."""
    tokens = torch.randint(10, 400, (2, 60), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for route in ROUTES:
            how = {"budget": 0.5} if route == "auto" else {}
            cache, rows = (KVCache(model.config, n, 64, cache_dtype) for n in (1, 2))
            for begin, end in ((0, 33), (33, 60)):
                found.append(model(tokens[:1, begin:end], route, cache=cache, last_only=begin == 0, **how))
            found.append(model(tokens, route, cache=rows, lengths=torch.tensor([60, 14]), **how))
            found += [*cache.k, *rows.v]
    return found


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            continue
        torch.testing.assert_close(a.logits, b.logits, rtol=tolerance, atol=4 * tolerance)
        assert (a.use_slow is None) == (b.use_slow is None) and (a.use_slow is None or torch.equal(a.use_slow, b.use_slow))


def assert_as_close(found, plain, exact):
    """`found`, in bf16, is no further from what fp32 gives than twice as far as `plain`."""
    for a, b, c in zip(found, plain, exact, strict=True):
        if not isinstance(a, torch.Tensor):
            assert (a.use_slow is None) == (b.use_slow is None)
            a, b, c = a.logits, b.logits, c.logits
        assert (a.float() - c.float()).norm() <= 2 * (b.float() - c.float()).norm()


#: Branches whose tokens attend in one call.
ALIKE = {"fast_n_heads": 4, "sparse": SparseSpec(block_size=4, window=8, dense_len=64)}


@pytest.mark.parametrize("dialect", [*DIALECTS, "alike"])
def test_prompts_in_steps_are_what_blocks_compute(monkeypatch, dialect):
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: False)  # in fp32, to tell rounding from errors
    monkeypatch.setattr("dualbranch.prompt.AT_ONCE", 20)
    model, calls = quantized("int8", **(DIALECTS | {"alike": ALIKE})[dialect]), []
    expected = passes(model)
    model.runner = Runner(model, noting(model, calls))
    assert_same(passes(model), expected, 1e-4)
    assert set(calls) == {"keys", "queries-slow", "queries-fast", "rest-slow", "rest-fast"}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_packed_or_dynamic_is_left_to_the_block(monkeypatch, precision, alike, bf16):
    def has_bf16(has):
        for module in ("packed", "runner"):
            monkeypatch.setattr(f"dualbranch.{module}.has_bf16_units", lambda device: has)

    model, calls = quantized(precision, **ALIKE if alike else {}), []
    has_bf16(False)
    exact = passes(model)
    has_bf16(bf16)
    cache_dtype = torch.bfloat16 if bf16 else torch.float32
    expected = passes(model, cache_dtype)
    model.runner = Runner(model, noting(model, calls))
    found = passes(model, cache_dtype)
    if bf16:
        assert_as_close(found, expected, exact)
    else:
        assert_same(found, expected, 1e-4)
    parts = {"keys": "slow", "queries-slow": "slow", "rest-slow": "slow", "queries-fast": "fast", "rest-fast": "fast"}
    given = dict(item.split("=") for item in precision.split(",")) if "=" in precision else {"slow": precision, "fast": precision}
    packed = {part for part, of in parts.items() if of in given}
    assert set(calls) == packed - {f"rest-{of}" for of, name in given.items() if name == "int8-dynamic"}


def test_few_tokens_gradients_and_a_model_that_moves_need_no_steps():
    model, calls = quantized("int8"), []
    model.runner = Runner(model, noting(model, calls))
    tokens = torch.arange(10, 60)[None]
    with torch.no_grad():
        model(tokens[:, :FEW], "slow")
        assert not calls
        model(tokens[:, : FEW + 1], "slow")
        assert calls == ["keys", "queries-slow", "rest-slow"] * model.config.n_layers
        calls.clear()
        expected = model(tokens, "fast").logits
        assert calls.count("rest-fast") == len(model.config.dual_layers)
        with ablated(model, "fast", "zero"):
            assert not torch.allclose(model(tokens, "fast").logits, expected)
        calls.clear()
    model(tokens, "fast")
    assert not calls
    with torch.no_grad():
        model.to("cpu")
        torch.testing.assert_close(model(tokens, "fast").logits, expected, rtol=1e-2, atol=5e-2)
    assert not calls
