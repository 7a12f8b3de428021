"""Decoding by CUDA graphs: equal to the model's own forward when recorded passes are replayed at other positions. Recorded on the CPU where there is no GPU."""

import importlib.util
import weakref

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer

from dualbranch import graphs
from dualbranch.cache import CacheFull
from dualbranch.generate import generate_batch, stream
from dualbranch.graphs import GraphRunner
from dualbranch.sampling import SamplingParams
from kernels import SparseSpec, set_backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DIALECTS = {
    "plain": {},
    "no selected blocks": {"sparse": SparseSpec(block_size=4, n_selected_blocks=0, window=6, n_sinks=3, dense_len=12)},
    "one kv head, normed queries": {"n_kv_heads": 1, "qk_norm": True, "qkv_bias": True},
    "sliding layers": {"sliding_layers": (1, 2), "sliding_window": 10, "sliding_rope_theta": 1e4},
    "gemma": {"post_norms": True, "embed_scale": 5.5, "logit_softcap": 3.0, "activation": "geglu", "attn_scale": 0.2, "tie_embeddings": True},
    "dense": {"n_stem": 3, "n_tail": 0},
}


@pytest.fixture(autouse=True)
def _kernels_and_small_ranges(monkeypatch):
    """Recordings that serve 16, 32, 64 ... keys; and in the end, the backend that was."""
    monkeypatch.setattr(graphs, "FEWEST_KEYS", 16)
    yield
    set_backend("auto")


def model_like(**overrides):
    return make_tiny_model(400, **{"head_dim": 16, "n_layers": 3, **overrides}).to(DEVICE)


def by_graphs(model):
    """On the Triton kernels, with a runner that counts: `model.runner.recorded`, pieces recorded."""
    set_backend("triton")
    if DEVICE == "cuda":
        record = GraphRunner(model).record
    else:
        from recorded_launches import record
    model.runner = GraphRunner(model, lambda piece: recorded.append(piece) or record(piece))
    model.runner.recorded = recorded = []
    return model


def random_tokens(n, seed=1):
    return torch.randint(10, 400, (1, n), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def decode(model, tokens, widths, route, **how):
    """Outputs after a prompt, fed `widths[0]` tokens at once, then `widths[1]`, ..., and the cache."""
    cache, outs, at = model.new_cache(1, tokens.shape[1]), [], 0
    with torch.inference_mode():
        for width in widths:
            outs.append(model(tokens[:, at : at + width], route, cache=cache, **how))
            at += width
    assert at == tokens.shape[1]
    return outs, cache


def assert_alike(found, expected, own, cache):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(a.hidden, b.hidden, rtol=1e-4, atol=5e-5)
        assert (a.g is None) == (b.g is None) and (a.use_slow is None) == (b.use_slow is None)
        assert a.use_slow is None or torch.equal(a.use_slow, b.use_slow)
        if a.g is not None:
            torch.testing.assert_close(a.g, b.g, rtol=1e-4, atol=1e-5)
    n = int(cache.n_cached)
    assert torch.equal(own.n_cached, cache.n_cached) and torch.equal(own.from_slow, cache.from_slow)
    for a, b in zip((*own.k, *own.v), (*cache.k, *cache.v), strict=True):
        torch.testing.assert_close(a[:, :n], b[:, :n], rtol=1e-4, atol=1e-5)
    for i, pooled in cache.pooled.items():
        whole = n // cache.config.sparse.block_size
        torch.testing.assert_close(own.pooled[i][:, :whole], pooled[:, :whole], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("route", ["slow", "fast", "auto"])
def test_replayed_passes_compute_what_the_model_computes(dialect, route):
    model, how = model_like(**DIALECTS[dialect]), {}
    if model.config.is_dense and route != "slow":
        pytest.skip("a dense model has one route")
    if route == "auto":
        with torch.no_grad():  # half way between two of the values it will see, so that rounding decides nothing
            how = {"threshold": float(model(random_tokens(36), "auto", threshold=0.5).g[0].sort().values[17:19].mean())}
    tokens, widths = random_tokens(36), [12] + [1] * 24
    expected, cache = decode(model, tokens, widths, route, **how)
    model = by_graphs(model)
    found, own = decode(model, tokens, widths, route, **how)
    assert_alike(found, expected, own, cache)
    recorded = model.runner.recorded
    assert len(recorded) == len(set(recorded)) >= 6, "ranges up to 16, 32 and 64 keys, each piece of each recorded once"
    assert len(recorded) == 6 or route == "auto"
    if route == "auto":
        assert 0 < sum(bool(o.use_slow) for o in found[1:]) < len(widths) - 1


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("route", ["slow", "fast"])
def test_a_few_tokens_at_once_are_replayed_too(route, last_only):
    model, tokens, widths = model_like(), random_tokens(32), [5, 3, 3, 3, 1, 1, 1, 3, 3, 3, 3, 3]
    expected, cache = decode(model, tokens, widths, route, last_only=last_only)
    model = by_graphs(model)
    found, own = decode(model, tokens, widths, route, last_only=last_only)
    assert_alike(found, expected, own, cache)
    assert {n_new for n_new, _ in model.runner.steps} == {1, 3, 5}


def test_a_token_computed_again_slow_overwrites_its_fast_row():
    model, tokens = model_like(), random_tokens(30)

    def run(model):
        cache = model.new_cache(1, 40)
        with torch.inference_mode():
            for t in range(30):
                for route in ("fast", "slow") if t % 3 == 0 else ("fast",):
                    cache.truncate(t)
                    out = model(tokens[:, t : t + 1], route, cache=cache)
        return [out], cache

    expected = run(model)
    found = run(by_graphs(model))
    assert_alike(found[0], expected[0], found[1], expected[1])
    assert expected[1].from_slow[0, :30].tolist() == [t % 3 == 0 for t in range(30)]


def test_tokens_before_dense_len_read_everything_in_a_range_that_goes_beyond_it():
    model, tokens = model_like(sparse=SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=80)), random_tokens(96)
    widths = [72, 1, 1, 1, 21]
    expected, cache = decode(model, tokens, widths, "fast")
    model = by_graphs(model)
    found, own = decode(model, tokens, widths, "fast")
    assert_alike(found, expected, own, cache)
    assert list(model.runner.steps) == [(1, 128)]


def test_another_cache_gets_recordings_of_its_own():
    model, tokens = model_like(), random_tokens(20)
    caches = []
    expected, cache = decode(model, tokens, [1] * 20, "fast")
    model = by_graphs(model)
    for _ in range(2):
        found, own = decode(model, tokens, [1] * 20, "fast")
        caches.append(own)  # kept, so that the next one lies elsewhere
        assert_alike(found, expected, own, cache)
    assert len(model.runner.recorded) == 2 * 2 * 2, "two pieces of two ranges, for two caches"


def test_replies_are_those_of_the_model_whatever_draws_them():
    tok = make_tiny_tokenizer()
    model, prompt, params = model_like(), tok.encode("how many apples are left"), SamplingParams(temperature=0.0, max_tokens=24)
    for mode, speculate in (("auto", False), ("think", True)):
        set_backend("auto")
        model.runner = None
        (expected,) = generate_batch(model, tok, [prompt], mode, params)
        by_graphs(model)
        found = list(stream(model, tok, prompt, mode, params, speculate=speculate))[-1].generation
        assert found.ids == expected.ids and len(found.ids) > 8
        assert speculate or found.use_slow == expected.use_slow
        assert model.runner.recorded
        if speculate:
            assert max(n_new for n_new, _ in model.runner.steps) > 1, "verifications are recorded too"


def test_recordings_serve_any_mode_without_gradient_and_let_go_of_the_cache():
    model, tokens = model_like(), random_tokens(9)
    expected, cache = decode(model, tokens, [5, 1, 1, 1, 1], "fast")
    model = by_graphs(model)
    own, found = model.new_cache(1, 9), []
    for start, stop, mode in ((0, 5, torch.no_grad), (5, 6, torch.inference_mode), (6, 7, torch.no_grad), (7, 8, torch.inference_mode), (8, 9, torch.no_grad)):
        with mode():
            found.append(model(tokens[:, start:stop], "fast", cache=own))
    assert_alike(found, expected, own, cache)
    assert len(model.runner.recorded) == 2
    watched = weakref.ref(own)
    del own
    assert watched() is None


def test_what_cannot_be_recorded_goes_on_without_and_says_why(caplog):
    model, tokens, widths = model_like(), random_tokens(12), [1] * 12
    expected, cache = decode(model, tokens, widths, "slow")

    def refuse(piece):
        raise RuntimeError("operation not permitted when stream is capturing")

    set_backend("triton")
    model.runner = GraphRunner(model, refuse)
    found, own = decode(model, tokens, widths, "slow")
    assert_alike(found, expected, own, cache)
    assert model.runner is None and "without CUDA graphs: operation not permitted" in caplog.text


def test_the_limits_are_those_of_the_model():
    model = by_graphs(model_like(max_seq_len=64))
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
        model(random_tokens(8), cache=cache)
        with pytest.raises(CacheFull, match="holds 8 tokens and 9 are needed"):
            model(random_tokens(1), cache=cache)
        cache = model.new_cache(1, 96)
        model(random_tokens(62), cache=cache)
        with pytest.raises(ValueError, match="65 tokens exceed max_seq_len = 64"):
            model(random_tokens(3), cache=cache)
        assert int(cache.n_cached) == 62


def test_other_passes_are_not_the_runners():
    model, cache = by_graphs(model_like()), None
    tokens = random_tokens(20)
    model(tokens[:, :1], cache=model.new_cache(1, 8))  # with gradients enabled
    with torch.no_grad():
        model(tokens[:, :1])
        model(tokens[:, :3], "auto", threshold=0.5, cache=model.new_cache(1, 8))
        model(tokens, cache=model.new_cache(1, 20))
        model(tokens.view(2, 10)[:, :1], cache=model.new_cache(2, 8))
        model(tokens[:, :1], "soft", cache=model.new_cache(1, 8))
        assert not model.runner.steps
        model(tokens[:, :1], cache=(cache := model.new_cache(1, 8)))
    assert list(model.runner.steps) == [(1, 16)] and int(cache.n_cached) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_the_kernels_there_are_no_graphs():
    assert "attention runs on blockwise" in graphs.unavailable(model_like())
    set_backend("triton")
    assert graphs.unavailable(model_like()) is None
