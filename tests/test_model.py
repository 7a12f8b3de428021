"""The exactness a dual-branch model promises (DESIGN 5), on random weights in fp32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch import DualBranchConfig, DualBranchModel
from dualbranch.block import Block
from dualbranch.cache import CacheFull
from dualbranch.gate import MOST_SECOND_LOOKS, Calibration
from dualbranch.routing import Grid, TokenGroup
from kernels import SparseSpec

SPARSE = SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=12)
SIZES = {"d_model": 48, "n_layers": 5, "n_stem": 1, "n_tail": 1, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "d_ff": 64, "fast_n_heads": 3, "fast_d_ff": 16}
CONFIG = DualBranchConfig(vocab_size=96, d_gate=4, max_seq_len=128, sparse=SPARSE, **SIZES)
ROUTES = ("slow", "fast", "auto", "mixed")


def build(config: DualBranchConfig = CONFIG, seed: int = 0) -> DualBranchModel:
    model = DualBranchModel(config).eval()
    model.init_weights(seed)
    if config.is_dense:
        return model
    with torch.no_grad():  # the initial gate hardly varies; make its decisions differ from token to token
        model.gate.w_in.weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(2)
    return model


def tokens(n_rows: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (n_rows, n), generator=torch.Generator().manual_seed(seed))


def route_of(name: str, t: torch.Tensor):
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) < 0.5 if name == "mixed" else name


def columns(route, start: int, end: int):
    return route if isinstance(route, str) else route[:, start:end]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


MODEL = build()


def middle_gap(g: torch.Tensor) -> float:
    """A threshold that splits `g` roughly in half and lies in the widest gap there: no decision hangs on a rounding error."""
    middle = g.detach().flatten().sort().values[g.numel() // 3 : 2 * g.numel() // 3]
    i = int(middle.diff().argmax())
    return float((middle[i] + middle[i + 1]) / 2)


THRESHOLD = middle_gap(MODEL(tokens(2, 45), "auto", threshold=0.5).g)


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_soft_at_zero_and_one_equals_the_hard_route_exactly(side):
    t = tokens(2, 30)
    model = build()
    with torch.no_grad():
        model.gate.w_out.weight.zero_()
        model.gate.w_out.bias.fill_(-200.0 if side else 200.0)  # need of -200 gives g = 1
        assert torch.equal(model(t, "soft").g, torch.full((2, 30), side))
        assert torch.equal(model(t, "soft").logits, model(t, "fast" if side else "slow").logits)


def test_swapping_the_branches_changes_the_output():
    t = tokens(1, 20)
    assert (MODEL(t, "slow").logits - MODEL(t, "fast").logits).abs().max() > 0.1


def test_fast_with_all_heads_and_blocks_and_equal_weights_is_slow():
    wide = dataclasses.replace(CONFIG, fast_n_heads=6, fast_d_ff=64, sparse=dataclasses.replace(SPARSE, n_selected_blocks=64))
    model = build(wide)
    for i in wide.dual_layers:
        model.blocks[i].fast.load_state_dict(model.blocks[i].slow.state_dict())
    t = tokens(2, 60)
    assert_close(model(t, "fast").logits, model(t, "slow").logits)


@pytest.mark.parametrize("name", ROUTES)
@torch.no_grad()
def test_prefill_equals_chunked_equals_token_by_token(name):
    t = tokens(2, 45)
    route = route_of(name, t)
    whole = MODEL(t, route, threshold=THRESHOLD)
    for chunk in (1, 4, 7, 13):
        cache, parts = MODEL.new_cache(2, 45), []
        for i in range(0, 45, chunk):
            parts.append(MODEL(t[:, i : i + chunk], columns(route, i, i + chunk), cache=cache, threshold=THRESHOLD))
        assert_close(torch.cat([p.logits for p in parts], 1), whole.logits)
        if name == "auto":
            assert torch.equal(torch.cat([p.use_slow for p in parts], 1), whole.use_slow)
            assert 0 < whole.use_slow.float().mean() < 1


@pytest.mark.parametrize("name", ROUTES)
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 33), min_size=1, max_size=4), more=st.integers(1, 6))
@torch.no_grad()
def test_padded_batch_equals_each_sequence_alone(name, lengths, more):
    width = max(lengths)
    t = tokens(len(lengths), width + more, seed=sum(lengths))
    route, n = route_of(name, t), torch.tensor(lengths)
    cache = MODEL.new_cache(len(lengths), width + more)
    first = MODEL(t[:, :width], columns(route, 0, width), cache=cache, lengths=n, threshold=THRESHOLD)
    second = MODEL(t[:, width:], columns(route, width, width + more), cache=cache, threshold=THRESHOLD)
    assert cache.n_cached.tolist() == [x + more for x in lengths]
    for b, length in enumerate(lengths):
        alone = torch.cat([t[b : b + 1, :length], t[b : b + 1, width:]], 1)
        r = route if isinstance(route, str) else torch.cat([route[b : b + 1, :length], route[b : b + 1, width:]], 1)
        expected = MODEL(alone, r, threshold=THRESHOLD).logits[0]
        assert_close(first.logits[b, :length], expected[:length])
        assert_close(second.logits[b], expected[length:])


@pytest.mark.parametrize("name", ["slow", "fast", "auto", "soft"])
@torch.no_grad()
def test_no_future_token_changes_a_past_logit_or_gate_decision(name):
    t = tokens(1, 40)
    changed = t.clone()
    changed[:, 25:] = (changed[:, 25:] + 7) % 96
    a, b = MODEL(t, name, threshold=THRESHOLD), MODEL(changed, name, threshold=THRESHOLD)
    assert_close(a.logits[:, :25], b.logits[:, :25])
    assert (a.logits[:, 25:] - b.logits[:, 25:]).abs().max() > 1e-3
    if a.g is not None:
        assert_close(a.g[:, :25], b.g[:, :25])


@torch.no_grad()
def test_budget_zero_is_all_fast_and_one_is_all_slow():
    model, t = build(), tokens(2, 30)
    model.calibration = Calibration.measure(model(t, "auto", threshold=0.5).g)
    assert torch.equal(model(t, "auto", budget=0.0).logits, model(t, "fast").logits)
    assert torch.equal(model(t, "auto", budget=1.0).logits, model(t, "slow").logits)
    shares = [float(model(t, "auto", budget=b).use_slow.float().mean()) for b in (0.1, 0.3, 0.5, 0.9)]
    assert shares == pytest.approx([0.1, 0.3, 0.5, 0.9], abs=0.06), shares


@torch.no_grad()
@pytest.mark.parametrize("route", ["slow", "fast", "auto"])
def test_a_budget_that_is_no_share_is_refused_on_every_route(route):
    for budget in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="must lie in"):
            build()(tokens(1, 2), route, budget=budget)


def test_gate_and_second_looks_share_the_budget():
    generator = torch.Generator().manual_seed(0)
    g, confidence = torch.rand(4000, generator=generator), torch.rand(4000, generator=generator)
    c = Calibration.measure(g, confidence)
    for budget in (0.1, 0.3, 0.5, 0.9):
        gated = g < c.threshold(budget)
        again = ~gated & (confidence < c.confidence(budget))
        assert float((gated | again).float().mean()) == pytest.approx(budget, abs=0.002)
        assert float(again.float().mean()) == pytest.approx(min(budget / 2, MOST_SECOND_LOOKS), abs=0.002)
    assert c.confidence(0.0) == c.confidence(1.0) == 0.0 and c.threshold(1.0) == float("inf")
    assert Calibration.measure(g).confidence(0.5) == 0.0
    # looks are taken only where they gain more than the gate does for the same FLOPs
    unsure = Calibration.measure(g, confidence, kl=(confidence < 0.1).float())
    assert (unsure.thresholds[:17], unsure.confidences[:17]) == (c.thresholds[:17], c.confidences[:17])
    gated = Calibration.measure(g, confidence, kl=1 - g)
    assert gated.confidences == () and float((g < gated.threshold(0.3)).float().mean()) == pytest.approx(0.3, abs=0.002)


@torch.no_grad()
def test_a_hard_routed_token_pays_for_one_branch_only():
    t, seen = tokens(2, 20), {"slow": 0, "fast": 0}
    block = MODEL.blocks[2]
    hooks = [getattr(block, n).register_forward_hook(lambda _m, args, _o, n=n: seen.__setitem__(n, seen[n] + len(args[0]))) for n in seen]
    out = MODEL(t, "auto", threshold=THRESHOLD)
    for h in hooks:
        h.remove()
    assert seen == {"slow": int(out.use_slow.sum()), "fast": 40 - int(out.use_slow.sum())}


@torch.no_grad()
def test_packed_documents_see_only_themselves():
    a, b = tokens(1, 16, 3), tokens(1, 21, 4)
    row = torch.cat([a, b], 1)
    start = torch.tensor([[0] * 16 + [16] * 21])
    for name in ("slow", "fast", "auto", "soft"):
        packed = MODEL(row, name, doc_start=start, threshold=THRESHOLD).logits
        assert_close(packed[:, :16], MODEL(a, name, threshold=THRESHOLD).logits)
        assert_close(packed[:, 16:], MODEL(b, name, threshold=THRESHOLD).logits)


@torch.no_grad()
def test_logits_at_some_tokens_are_those_of_the_whole_in_row_major_order():
    t, at = tokens(2, 45), torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) < 0.4
    whole, some = MODEL(t, "auto", threshold=THRESHOLD), MODEL(t, "auto", threshold=THRESHOLD, logits_at=at)
    assert_close(some.logits, whole.logits[at])
    assert torch.equal(some.hidden, whole.hidden)


LASTS = {
    "slow layer": MODEL,
    "dual layer": build(dataclasses.replace(CONFIG, n_tail=0)),
    "dense": build(dataclasses.replace(CONFIG, n_stem=5, n_tail=0)),
    "sliding": build(dataclasses.replace(CONFIG, sliding_window=6, sliding_layers=(0, 2, 4))),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LASTS)
@pytest.mark.parametrize("name", ROUTES)
def test_last_only_gives_the_last_tokens_of_the_whole_and_the_same_cache(kind, name):
    model, t, lengths = LASTS[kind], tokens(3, 24), torch.tensor([24, 1, 17])
    route = route_of(name, t)  # of a dense model all the same
    caches = [model.new_cache(3, 32) for _ in range(2)]
    seen = []
    hook = model.blocks[-1].kv.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    more = model.blocks[-1].slow.ff.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for start, end, n in ((0, 24, lengths), (0, 7, torch.tensor([7, 3, 5]))):  # a prompt, and more of it
        part = [x[:, start:end] if isinstance(x, torch.Tensor) else x for x in (t, route)]
        whole, last = (model(*part, cache=c, lengths=n, threshold=THRESHOLD, last_only=only) for c, only in zip(caches, (False, True), strict=True))
        rows = torch.arange(3), n - 1
        assert_close(last.logits[:, 0], whole.logits[rows])
        assert_close(last.hidden[:, 0], whole.hidden[rows])
    for a, b in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
        assert_close(a, b)
    hook.remove(), more.remove()
    if kind != "dual layer":
        assert seen[2:4] == [3 * 24, 3]  # the keys of all, the rest of the last layer for one token of each row


def test_every_token_is_in_the_cache_whichever_branch_computed_it():
    t = tokens(1, 24)
    cache = MODEL.new_cache(1, 32)
    out = MODEL(t, route_of("mixed", t), cache=cache)
    assert all((k[0, :24].abs().sum((1, 2)) > 0).all() for k in cache.k)
    assert torch.equal(cache.from_slow[0, :24], out.use_slow[0])


@torch.no_grad()
def test_stale_slots_and_pooled_keys_cannot_leak():
    t = tokens(1, 40)
    clean, dirty = MODEL.new_cache(1, 64), MODEL.new_cache(1, 64)
    for store in (*dirty.k, *dirty.v, *dirty.pooled.values()):
        store.fill_(float("nan"))
    for route in ("fast", "slow"):
        assert_close(MODEL(t, route, cache=clean).logits, MODEL(t, route, cache=dirty).logits)
        for c in (clean, dirty):
            c.truncate(17)
        assert_close(MODEL(t[:, :9], route, cache=clean).logits, MODEL(t[:, :9], route, cache=dirty).logits)
        for c in (clean, dirty):
            c.truncate(0)


@torch.no_grad()
def test_pooled_keys_are_updated_once_per_completed_block(monkeypatch):
    from dualbranch import cache as cache_module

    completed = []
    original = cache_module.CacheWriter.__init__

    def recording(self, *arguments):
        original(self, *arguments)
        completed.extend(map(tuple, self.completed.tolist()))

    monkeypatch.setattr(cache_module.CacheWriter, "__init__", recording)
    cache = MODEL.new_cache(1, 64)
    MODEL(tokens(1, 10), "fast", cache=cache)
    for i in range(23):
        MODEL(tokens(1, 1, i), "fast", cache=cache)
    assert completed == [(0, n) for n in range(33 // 4)]


@torch.no_grad()
def test_truncate_then_replay_equals_a_cold_run():
    t = tokens(1, 40)
    cache = MODEL.new_cache(1, 64)
    MODEL(t, "fast", cache=cache)
    cache.truncate(11)
    assert_close(MODEL(t[:, 11:], "fast", cache=cache).logits, MODEL(t, "fast").logits[:, 11:])


def test_gradients_reach_every_parameter_in_soft_mode():
    model = build()
    model(tokens(2, 30), "soft").logits.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@settings(max_examples=15, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    n_kv=st.integers(1, 3),
    more=st.fixed_dictionaries(
        {
            "n_stem": st.integers(1, 3),
            "n_tail": st.integers(0, 1),
            "tie_embeddings": st.booleans(),
            "qk_norm": st.booleans(),
            "qkv_bias": st.booleans(),
            "activation": st.sampled_from(["swiglu", "geglu"]),
        }
    ),
)
def test_accounting_counts_the_parameters_of_any_shape(group, n_kv, more):
    from dualbranch.accounting import total_params

    c = dataclasses.replace(CONFIG, n_heads=group * n_kv, n_kv_heads=n_kv, fast_n_heads=n_kv, **more)
    model = DualBranchModel(c)
    assert total_params(c) == sum(p.numel() for p in model.parameters())
    assert model(tokens(1, 9), "fast").logits.isfinite().all()


def test_accounted_flops_equal_those_of_the_executed_matrices():
    from torch.utils.flop_counter import FlopCounterMode

    from dualbranch.accounting import layer_flops

    t = tokens(1, 10)
    for route, slow in (("slow", True), ("fast", False)):
        with FlopCounterMode(display=False) as counter:
            MODEL(t, route)
        linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        c = CONFIG
        attention = {True: 4 * c.n_heads * c.head_dim, False: 4 * c.fast_n_heads * c.head_dim}
        per_token = sum(layer_flops(c, s, 0) - attention[s] for s in [True, slow, slow, slow, True]) + 2 * c.vocab_size * c.d_model
        assert linear == 10 * per_token


def test_the_gate_costs_under_one_percent_of_a_layer():
    from dualbranch.accounting import gate_params, layer_flops

    c = DualBranchConfig(d_model=1024, n_heads=16, n_kv_heads=4, head_dim=64, d_ff=3072, fast_n_heads=8, fast_d_ff=384, d_gate=64)
    assert 2 * gate_params(c) < 0.01 * layer_flops(c, True, 0)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_scaling_keeps_short_wavelengths_and_stretches_long_ones(kind):
    from dualbranch import RopeScaling
    from dualbranch.layers import rope_frequencies

    plain, _ = rope_frequencies(64, 10_000.0, RopeScaling())
    scaled, amplitude = rope_frequencies(64, 10_000.0, RopeScaling(kind=kind, factor=8.0, original_max_seq_len=2048))
    assert float(scaled[-1] / plain[-1]) == pytest.approx(1 / 8, rel=1e-9)
    assert float(scaled[0] / plain[0]) == pytest.approx(1 / 8 if kind == "linear" else 1, rel=1e-9)
    assert amplitude == pytest.approx(1.2079 if kind == "yarn" else 1.0, abs=1e-4)


def test_yarn_is_exact_up_to_131072_positions():
    """cos and sin at far positions, where angles multiplied in fp32 are off by a hundredth; a model decodes there what one pass gives."""
    from dualbranch import RopeScaling
    from dualbranch.layers import Rope, rope_frequencies

    scaling = RopeScaling(kind="yarn", factor=16.0, original_max_seq_len=8192)
    config = dataclasses.replace(CONFIG, max_seq_len=131_072, rope_theta=100_000.0, rope_scaling=scaling)
    positions = torch.tensor([0, 8191, 100_003, 131_071])
    freq, amplitude = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    cos, sin = Rope(config)(positions, 131_072)
    angle = positions.double()[:, None] * freq
    half = config.head_dim // 2
    torch.testing.assert_close(cos[:, 0, :half].double(), angle.cos() * amplitude, rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[:, 0, half:].double(), angle.sin() * amplitude, rtol=0, atol=1e-7)
    model = DualBranchModel(config)
    model.init_weights(0)
    t = torch.randint(10, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    for route in ("slow", "fast"):
        cache = model.new_cache(1, 131_072)
        with torch.no_grad():
            for k, v in zip(cache.k, cache.v, strict=True):
                k[:, :131_064].normal_()
                v[:, :131_064].normal_()
            for pooled in cache.pooled.values():
                pooled.normal_()
            cache.n_cached.fill_(131_064)
            at_once = model(t, route, cache=cache).logits
            cache.truncate(131_064)
            one_by_one = torch.cat([model(t[:, i : i + 1], route, cache=cache).logits for i in range(8)], 1)
        torch.testing.assert_close(one_by_one, at_once, rtol=1e-3, atol=1e-4)


def test_user_errors_name_what_to_change():
    t = tokens(1, 5)
    with pytest.raises(ValueError, match=r"unknown route 'turbo'.*slow, fast, auto, soft"):
        MODEL(t, "turbo")
    with pytest.raises(ValueError, match="calibrated gate"):
        build()(t, "auto")
    with pytest.raises(ValueError, match=r"route decides for tokens of shape \(1, 1\), and they are \(1, 5\)"):
        MODEL(t, torch.tensor([[True]]))
    with pytest.raises(ValueError, match="1 rows of tokens do not fit a cache of 2"):
        MODEL(t, cache=MODEL.new_cache(2, 8))
    for wrong in (torch.zeros(2), torch.zeros(1, 5), torch.zeros(1, 1, 1)):
        with pytest.raises(ValueError, match=r"threshold has shape .*one per row, \(1, 1\)"):
            MODEL(t, "auto", threshold=wrong)
    with pytest.raises(ValueError, match=r"budget is 1.5.*\[0, 1\]"):
        Calibration((0.5,), (0.5,)).threshold(1.5)
    with pytest.raises(ValueError, match="129 tokens exceed max_seq_len = 128"):
        MODEL(tokens(1, 129))
    with pytest.raises(CacheFull, match="holds 8 tokens and 9 are needed"):
        MODEL(tokens(1, 9), cache=MODEL.new_cache(1, 8))
    with pytest.raises(ValueError, match="T >= 1"):
        MODEL(tokens(1, 0))
    with pytest.raises(ValueError, match=r"n_heads.*multiple of n_kv_heads"):
        dataclasses.replace(CONFIG, n_heads=4)


@pytest.mark.parametrize("case", ["prompt", "behind a cache", "rows of unequal lengths", "documents", "one token each"])
def test_tokens_of_both_branches_that_read_everything_attend_in_one_call(monkeypatch, case):
    model = make_tiny_model(400, fast_n_heads=4, sparse=SparseSpec(block_size=4, n_selected_blocks=1, window=4, n_sinks=1, dense_len=32))
    generator = torch.Generator().manual_seed(3)
    tokens, use_slow = torch.randint(10, 400, (2, 32), generator=generator), torch.rand(2, 32, generator=generator) < 0.4
    first = {"prompt": 0, "behind a cache": 20, "one token each": 31}.get(case, 0)
    doc_start = torch.tensor([[0] * 12 + [12] * 20, [0] * 32])
    how = {"rows of unequal lengths": {"lengths": torch.tensor([32, 9])}, "documents": {"doc_start": doc_start}}.get(case, {})
    use_slow[:, -1] = torch.tensor([True, False])
    valid = torch.arange(32)[first:] < how["lengths"][:, None] if "lengths" in how else torch.ones(2, 32 - first, dtype=torch.bool)
    calls, attend = [], TokenGroup.attend

    def run():
        calls.clear()
        cache = None if case == "documents" else model.new_cache(2, 32)
        with torch.no_grad():
            if first:
                model(tokens[:, :first], cache=cache)
                calls.clear()
            return model(tokens[:, first:], use_slow[:, first:], cache=cache, **how).logits[valid], len(calls)

    monkeypatch.setattr(TokenGroup, "attend", lambda self, *args: calls.append(1) or attend(self, *args))
    found, n_calls = run()
    monkeypatch.setattr(Block, "reads_all", lambda self, tokens: False)
    expected, n_apart = run()
    assert n_calls == model.config.n_layers and n_apart == n_calls + len(model.config.dual_layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_whether_branches_attend_in_one_call_or_each_for_itself(monkeypatch):
    model = make_tiny_model(400, fast_n_heads=4, sparse=SparseSpec(block_size=4, window=4, dense_len=32))
    tokens = torch.randint(10, 400, (2, 32), generator=torch.Generator().manual_seed(3))
    use_slow, gradients = torch.rand(2, 32, generator=torch.Generator().manual_seed(4)) < 0.4, []
    for _ in range(2):
        model.zero_grad()
        model(tokens, use_slow).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        monkeypatch.setattr(Block, "reads_all", lambda self, tokens: False)
    assert gradients[0].keys() == gradients[1].keys() and any("fast.w_q" in name for name in gradients[0])
    for name, of_one_call in gradients[0].items():
        torch.testing.assert_close(of_one_call, gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", [{"fast_n_heads": 2}, {"dense_len": 31}, {"sliding_layers": (1, 2), "sliding_window": 8}])
def test_branches_that_read_otherwise_attend_apart(change):
    change = {"fast_n_heads": 4, "dense_len": 32} | change
    model = make_tiny_model(400, sparse=SparseSpec(block_size=4, window=4, dense_len=change.pop("dense_len")), **change)
    whole = Grid(torch.arange(32)[None], None, 32, torch.ones(32, 1, 8), torch.ones(32, 1, 8)).whole()
    assert not any(model.blocks[i].reads_all(whole) for i in model.config.dual_layers)
