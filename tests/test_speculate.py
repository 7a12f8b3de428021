"""Claims about self-speculation: whatever the fast branch drafts, the reply and the cache are those of plain slow decoding."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model, spared
from public_models import tokenizer_of
from strict_steps import strict_steps

from dualbranch import infer, speculate
from dualbranch.accounting import token_flops
from dualbranch.checkpoint import LoadedModel, save_checkpoint
from dualbranch.generate import decode, generate, generate_batch, prompt_ids, start, stream
from dualbranch.modes import Phase, ThinkingController, resolve, token_rules
from dualbranch.packed import product_dtype
from dualbranch.precision import quantize
from dualbranch.runner import Runner
from dualbranch.sampling import SamplingParams, filtered_probs, token_probs
from dualbranch.speculate import MAX_DRAFT, DraftLength, accept
from kernels import SparseSpec

TEXTS = ["the sum", "how many apples are left after three people take two numbers?", "一共有多少个苹果", "what is " * 9, "a", "two numbers " * 5]
SLOW = {thinking: resolve("think", thinking=thinking) for thinking in ("on", "off", "auto")}
DENSE = SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=256)  # as far as the context goes
#: Quantiles 0.999 of chi-square, by degrees of freedom.
CHI_SQUARE = {5: 20.5, 9: 27.9}


def related_model(vocab_size: int, unlikeness: float, seed: int = 0, **overrides):
    """A random model whose fast branch is the slow one at `unlikeness` 0, unrelated at 1, and in between between. The branches weigh more than the
    stem, and a fast pass is said to cost a fifth of a slow one, so that drafts are of every length."""
    model = make_tiny_model(vocab_size, seed, **({"fast_n_heads": 4, "fast_d_ff": 64, "n_layers": 3} | overrides))
    with torch.no_grad():
        for i in model.config.dual_layers:
            slow, fast = model.blocks[i].slow, model.blocks[i].fast
            for branch in (slow, fast):
                branch.w_o.weight.mul_(4)
                branch.ff.w_down.weight.mul_(4)
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                b.copy_(torch.lerp(a, b, unlikeness))
    model.cost = lambda route: SimpleNamespace(params_read={"fast": 0.2, "slow": 1.0}[route])
    return model


def prompts_of(tok) -> list[list[int]]:
    return [prompt_ids(tok, text) for text in TEXTS]


def run_to_the_end(model, tok, prompt, mode, params, speculative: bool):
    """`(reply in progress when it has ended, its cache)`; free slots of the cache are poisoned beforehand."""
    (s,) = start(model, tok, [prompt], mode, params)
    cache = model.new_cache(1, len(prompt) + s.controller.remaining)
    for t in (*cache.k, *cache.v, *cache.pooled.values()):
        t.fill_(float("nan"))
    steps = speculate.speculate(model, s, params, cache) if speculative else decode(model, [s], mode, params, cache)
    assert sum(len(stepped) for stepped in steps) >= len(s.ids)
    return s, cache


def speculated(model, tok, prompts, mode, params):
    return [list(stream(model, tok, p, mode, params, speculate=True))[-1].generation for p in prompts]


def alike(g):
    """What must not depend on speculation."""
    return dataclasses.replace(g, flops=0.0, n_drafted=0, n_accepted=0, confidence=None)


def test_a_verification_is_computed_in_the_precision_of_single_tokens(monkeypatch):
    """Or packed weights would accept and reject by other logits than decoding has."""
    monkeypatch.setattr("dualbranch.packed.has_bf16_units", lambda device: True)
    assert product_dtype(MAX_DRAFT + 1, torch.device("cpu")) == product_dtype(1, torch.device("cpu"))


# ---- greedy: the same reply


@pytest.mark.parametrize("thinking", SLOW)
@pytest.mark.parametrize("unlikeness", [0.0, 0.1, 0.3, 1.0])
def test_greedy_speculation_equals_plain_slow_decoding_token_for_token(tiny, unlikeness, thinking):
    tok = tiny[1]
    model = related_model(tok.vocab_size, unlikeness, seed=int(10 * unlikeness))
    params = SamplingParams(max_tokens=64)
    want = generate_batch(model, tok, prompts_of(tok), SLOW[thinking], params)
    got = speculated(model, tok, prompts_of(tok), SLOW[thinking], params)
    assert [alike(g) for g in got] == [alike(g) for g in want]
    drafted, accepted = sum(g.n_drafted for g in got), sum(g.n_accepted for g in got)
    assert len({token for g in got for token in g.ids}) > 50  # no loop that anything would draft
    assert accepted < drafted and (unlikeness < 1.0 or accepted < drafted / 2)


def test_narrow_fast_branch_and_always_slow_tail_change_nothing(tiny):
    model, tok = tiny
    for mode in SLOW.values():
        got, want = (f(model, tok, prompts_of(tok)[:4], mode, SamplingParams(max_tokens=30)) for f in (speculated, generate_batch))
        assert [alike(g) for g in got] == [alike(g) for g in want]


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 5, 6, 7, 9, 13])
def test_rooms_of_few_tokens_and_small_thinking_budgets_are_kept_to(tiny, max_tokens):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.1)
    for mode in (SLOW["off"], SLOW["on"], *(resolve("think", thinking_budget=n) for n in (0, 1, 3))):
        params = SamplingParams(max_tokens=max_tokens)
        want = generate_batch(model, tok, prompts_of(tok)[:3], mode, params)
        got = speculated(model, tok, prompts_of(tok)[:3], mode, params)
        assert [alike(g) for g in got] == [alike(g) for g in want]


def test_budgets_end_reasoning_in_the_midst_of_a_draft_where_plain_decoding_ends_it(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.0, sparse=DENSE)  # every draft is accepted, so drafts are long
    for budget in range(1, 12):
        mode, params = resolve("think", thinking_budget=budget), SamplingParams(max_tokens=40)
        (got,) = speculated(model, tok, prompts_of(tok)[:1], mode, params)
        (want,) = generate_batch(model, tok, prompts_of(tok)[:1], mode, params)
        assert alike(got) == alike(want) and got.n_think == budget


def test_a_context_filled_to_its_end_is_no_obstacle(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.1)
    for room in (2, 3, 7, 20):
        prompt = [tok.bos_id] + [20 + i % 50 for i in range(model.config.max_seq_len - room - 2)] + [tok.control["<|assistant|>"]]
        (got,), (want,) = speculated(model, tok, [prompt], SLOW["on"], SamplingParams()), generate_batch(model, tok, [prompt], SLOW["on"], SamplingParams())
        assert alike(got) == alike(want) and len(got.ids) == room


def test_replies_end_where_plain_ones_end_also_within_a_draft(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.1, seed=1)
    with torch.no_grad():
        model.head.weight[: len(tok.control)] *= 3
    prompts = [prompt_ids(tok, f"{text} {i}") for i in range(4) for text in TEXTS]
    for mode in (SLOW["off"], SLOW["auto"]):
        got, want = (f(model, tok, prompts, mode, SamplingParams(max_tokens=30)) for f in (speculated, generate_batch))
        assert [alike(g) for g in got] == [alike(g) for g in want]
        assert len({len(g.ids) for g in got if g.finish_reason == "stop"}) > 3


@pytest.mark.parametrize("thinking", SLOW)
@pytest.mark.parametrize("max_draft", [1, MAX_DRAFT])  # at 1, rounds end inside the frames
def test_frames_of_several_tokens_and_a_decision_behind_them_are_drafted_through(monkeypatch, thinking, max_draft):
    monkeypatch.setattr(speculate, "MAX_DRAFT", max_draft)
    tok = tokenizer_of("qwen3")  # <think>, a line break, and then the decision
    model = related_model(tok.vocab_size + 5, 0.3)
    prompts = [prompt_ids(tok, f"{text} {i}") for i in range(2) for text in TEXTS]
    rules = token_rules(tok, model.config.vocab_size)
    opening = list(rules.thinking.open[: rules.thinking.n_common])
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([[*p, *opening]]), "slow").logits[0, -1] for p in prompts])
    middle = torch.sigmoid(logits[:, rules.think] - logits[:, rules.skip]).sort().values[5:7].mean()
    model.calibration = dataclasses.replace(model.calibration, think_threshold=float(middle), direct_confidence=None)
    got, want = (f(model, tok, prompts, SLOW[thinking], SamplingParams(max_tokens=24)) for f in (speculated, generate_batch))
    assert [alike(g) for g in got] == [alike(g) for g in want]
    assert {g.thought for g in got} == {"on": {True}, "off": {False}, "auto": {True, False}}[thinking]


def test_answers_that_are_only_tried_are_dropped_at_the_same_token(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.1)
    params, mode = SamplingParams(max_tokens=20), SLOW["auto"]
    model.calibration = dataclasses.replace(model.calibration, think_threshold=1.1, direct_confidence=0.0)
    lowest = sorted(g.confidence for g in generate_batch(model, tok, prompts_of(tok), mode, params))
    for confidence in ((lowest[1] + lowest[2]) / 2, (lowest[3] + lowest[4]) / 2, 1.1):
        model.calibration = dataclasses.replace(model.calibration, direct_confidence=confidence)
        got, want = (f(model, tok, prompts_of(tok), mode, params) for f in (speculated, generate_batch))
        assert [alike(g) for g in got] == [alike(g) for g in want]
        assert [g.confidence for g in got] == pytest.approx([g.confidence for g in want], rel=1e-4)
        assert any(g.n_dropped for g in got)


# ---- the cache


@pytest.mark.parametrize("unlikeness", [0.1, 1.0])
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_the_cache_holds_what_plain_decoding_leaves_there(tiny, unlikeness, mode):
    tok = tiny[1]
    model = related_model(tok.vocab_size, unlikeness)
    for prompt in prompts_of(tok)[2:5]:
        params = SamplingParams(max_tokens=45)
        (s, got), (plain, want) = (run_to_the_end(model, tok, prompt, SLOW[mode], params, speculative) for speculative in (True, False))
        n = len(prompt) + len(s.ids) - 1
        assert s.ids == plain.ids and got.n_cached.tolist() == want.n_cached.tolist() == [n]
        assert s.n_drafted > s.n_accepted and len(s.use_slow) == n and all(s.use_slow)
        assert got.from_slow[0, :n].all() and want.from_slow[0, :n].all()
        for i in range(model.config.n_layers):
            for a, b in ((got.k[i], want.k[i]), (got.v[i], want.v[i])):
                torch.testing.assert_close(a[:, :n], b[:, :n], atol=1e-5, rtol=0)
        for i, pooled in want.pooled.items():
            n_blocks = n // model.config.sparse.block_size
            torch.testing.assert_close(got.pooled[i][:, :n_blocks], pooled[:, :n_blocks], atol=1e-5, rtol=0)


def test_a_reply_cut_at_any_token_leaves_a_cache_that_another_can_build_on(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.0, sparse=DENSE)  # long drafts: most cuts fall between tokens of one verification
    prompt, params = prompts_of(tok)[0], SamplingParams(max_tokens=24)
    for n_events in range(1, 20, 2):
        cache = model.new_cache(1, 128)
        events = stream(model, tok, prompt, SLOW["on"], params, cache, speculate=True)
        ids = [next(events).token for _ in range(n_events)]
        events.close()
        n = len(prompt) + n_events - 1
        assert cache.n_cached.tolist() == [n] and cache.from_slow[0, :n].all()
        longer = [*prompt, *ids, *prompt[1:]]
        warm = list(stream(model, tok, longer, SLOW["on"], params, cache, n_reuse=n, speculate=True))[-1].generation
        (cold,) = generate_batch(model, tok, [longer], SLOW["on"], params)
        assert warm.ids == cold.ids and warm.n_reused == n


# ---- drafts and what they cost


def recorded(model, monkeypatch) -> list[tuple[str, int, int]]:
    """(route, tokens cached before, tokens fed) of every pass from now on."""
    passes, forward = [], model.forward

    def record(tokens, route, *, cache, **rest):
        passes.append((route, int(cache.n_cached[0]), tokens.shape[1]))
        return forward(tokens, route, cache=cache, **rest)

    monkeypatch.setattr(model, "forward", record)
    return passes


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_draft_is_accepted_where_the_fast_branch_is_the_slow_one(tiny, temperature):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.0, sparse=DENSE)
    for g in speculated(model, tok, prompts_of(tok), SLOW["on"], SamplingParams(max_tokens=50, temperature=temperature)):
        assert g.n_accepted == g.n_drafted >= 36


@pytest.mark.parametrize("unlikeness", [0.0, 0.1, 1.0])
def test_flops_are_those_of_every_pass_drafts_and_rejected_tokens_included(tiny, monkeypatch, unlikeness):
    tok = tiny[1]
    model = related_model(tok.vocab_size, unlikeness)
    model.calibration = dataclasses.replace(model.calibration, think_threshold=1.1, direct_confidence=0.01)
    passes = recorded(model, monkeypatch)
    for mode in (SLOW["on"], SLOW["auto"]):
        for prompt in prompts_of(tok)[:3]:
            passes.clear()
            (g,) = speculated(model, tok, [prompt], mode, SamplingParams(max_tokens=40))
            want = sum(token_flops(model.config, float(route == "slow"), n + i) for route, n, n_new in passes for i in range(n_new))
            want -= spared(model.config, g.n_prompt)
            assert g.flops == pytest.approx(want, rel=1e-9)
            assert g.n_drafted == sum(route == "fast" for route, *_ in passes)
            assert all(n + n_new < g.n_prompt + 40 for _, n, n_new in passes)  # the last token of the room is never fed


def test_draft_length_maximises_tokens_per_cost():
    for acceptance in (0.0, 0.2, 0.5, 0.8, 0.95, 0.99):
        for ratio in (0.05, 0.2, 0.5, 1.0):
            length = DraftLength(ratio)
            length.acceptance = acceptance
            rates = [(1 - acceptance ** (k + 1)) / (1 - acceptance) / (k * ratio + 1) for k in range(1, MAX_DRAFT + 1)]
            assert rates[length.best - 1] == pytest.approx(max(rates)), (acceptance, ratio)


def test_drafts_grow_where_they_are_accepted_and_shrink_where_they_are_not(tiny, monkeypatch):
    tok = tiny[1]
    last = {}
    for unlikeness in (0.0, 1.0):
        model = related_model(tok.vocab_size, unlikeness, sparse=DENSE)
        passes = recorded(model, monkeypatch)
        speculated(model, tok, prompts_of(tok)[:1], SLOW["off"], SamplingParams(max_tokens=200))
        verified = [n_new - 1 for route, _, n_new in passes if route == "slow"][1:-1]  # neither the prompt nor the end of the room
        last[unlikeness] = verified[-1]
        assert len(set(verified)) > 1
    assert last == {0.0: MAX_DRAFT, 1.0: 1}


# ---- sampled: the same distribution


def chi_square(counts: list[int], p: list[float]) -> float:
    n = sum(counts)
    assert all(c == 0 for c, x in zip(counts, p, strict=True) if x == 0), "a token that can't come"
    return sum((c - n * x) ** 2 / (n * x) for c, x in zip(counts, p, strict=True) if x > 0)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.3, 0.05, 0.2, 0.15, 0.1, 0.2], [0.1, 0.3, 0.2, 0.05, 0.25, 0.1]),
        ([0.5, 0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.3, 0.2, 0.2, 0.1]),  # filters kept different tokens
        ([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.4, 0.1, 0.1, 0.2, 0.1, 0.1]),  # a forced token
    ],
)
def test_accepted_and_replaced_drafts_together_follow_p(p, q):
    generator, n = torch.Generator().manual_seed(0), 3000
    P, Q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    drafts = torch.multinomial(Q, n, replacement=True, generator=generator).tolist()
    out = [accept(x, Q, P, generator) for x in drafts]
    counts = Counter(token for token, _ in out)
    assert chi_square([counts[i] for i in range(6)], p) < CHI_SQUARE[5], counts
    assert all(not kept or token == x for x, (token, kept) in zip(drafts, out, strict=True))
    overlap = sum(map(min, p, q))
    assert abs(sum(kept for _, kept in out) / n - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5


@pytest.mark.parametrize("unlikeness", [0.2, 1.0])
@pytest.mark.parametrize("filters", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.95, "min_p": 0.02}], ids=["unfiltered", "filtered"])
def test_sampled_tokens_follow_the_slow_branch_whatever_was_drafted(tiny, unlikeness, filters):
    """Each token is turned into a number that is uniform in [0, 1) if it was drawn from the exact distribution, given those before it: the mass of
    the tokens that the fast branch favours less, plus a random share of its own. Biased towards or against drafts, the numbers would pile up."""
    tok = tiny[1]
    model = related_model(tok.vocab_size, unlikeness, n_layers=2, n_tail=0)
    rules, rng, uniform = token_rules(tok, model.config.vocab_size), random.Random(0), []
    n_drafted = n_accepted = 0
    for seed in range(8):
        params = SamplingParams(max_tokens=90, seed=seed, **filters)
        mode, prompt = resolve("think", thinking_budget=30), prompts_of(tok)[seed % 6]
        (g,) = speculated(model, tok, [prompt], mode, params)
        n_drafted, n_accepted = n_drafted + g.n_drafted, n_accepted + g.n_accepted
        with torch.no_grad():
            slow, fast = (model(torch.tensor([prompt + g.ids]), route).logits[0, len(prompt) - 1 : -1] for route in ("slow", "fast"))
        controller = ThinkingController(rules, mode, 90)
        for i, token in enumerate(g.ids):
            if controller.forced() is None:
                sorted_p, ids = filtered_probs(slow[i].masked_fill(rules.banned[controller.rule], float("-inf"))[None], params)
                p = dict(zip(ids[0].tolist(), sorted_p[0].tolist(), strict=True))
                favour = (fast[i] - slow[i]).tolist()
                assert p[token] > 0
                uniform.append(sum(x for t, x in p.items() if favour[t] < favour[token]) + rng.random() * p[token])
            controller.advance(token)
        assert controller.phase is Phase.DONE
    bins = Counter(min(int(10 * u), 9) for u in uniform)
    assert len(uniform) > 600 and 0 < n_accepted < n_drafted
    assert chi_square([bins[i] for i in range(10)], [0.1] * 10) < CHI_SQUARE[9], bins


def test_same_seed_same_reply_and_another_seed_another(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.2)
    ids = [speculated(model, tok, prompts_of(tok)[:1], SLOW["on"], SamplingParams(temperature=1.0, seed=s, max_tokens=40))[0].ids for s in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_token_probs_are_those_that_sample_draws_from():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.9)
    probs, ids = filtered_probs(logits, params)
    assert all(token_probs(logits, params)[b, ids[b, i]] == probs[b, i] for b in range(5) for i in range(40))
    assert token_probs(logits, SamplingParams()).tolist() == [[float(i == row.argmax()) for i in range(40)] for row in logits]


# ---- doors and errors


def test_generate_and_stream_speculate_on_request(tiny):
    tok = tiny[1]
    model = related_model(tok.vocab_size, 0.1)
    loaded = LoadedModel(model, tok)
    plain, got = (generate(loaded, "the sum", "think", max_tokens=30, speculate=s) for s in (False, True))
    assert alike(plain) == alike(got) and plain.n_drafted == 0 < got.n_accepted
    events = list(stream(model, tok, prompts_of(tok)[0], "think", SamplingParams(max_tokens=30), speculate=True))
    assert [e.token for e in events] == got.ids and events[-1].generation == got
    assert "".join(e.piece for e in events if e.phase == "think") == got.reasoning
    assert "".join(e.piece for e in events if e.phase == "answer") == got.answer


def test_decoding_by_a_runner_the_reply_is_the_plain_one_at_any_precision_and_a_warning_says_what_it_costs(tiny, caplog):
    tok = tiny[1]
    model = quantize(related_model(tok.vocab_size, 0.1), "int8")
    model.runner = Runner(model, strict_steps(model))
    speculate._warn_once.cache_clear()
    for text in TEXTS[:2]:
        plain, got = (generate(LoadedModel(model, tok), text, "think", max_tokens=40, speculate=s) for s in (False, True))
        assert alike(plain) == alike(got) and got.n_accepted
    assert caplog.text.count("speculation takes longer than plain decoding") == 1


def test_speculation_is_refused_where_it_cannot_be(tiny):
    model, tok = tiny
    prompt = prompts_of(tok)[0]
    cache = model.new_cache(1, 64)
    list(stream(model, tok, prompt, "think", SamplingParams(max_tokens=8), cache))
    n_cached = cache.n_cached.clone()
    for mode in ("fast", "auto"):
        with pytest.raises(ValueError, match=f"route is {mode}; set route slow"):
            stream(model, tok, prompt, mode, SamplingParams(max_tokens=8), cache, speculate=True)  # at once, before anything is computed
    assert torch.equal(cache.n_cached, n_cached)
    for overrides in ({"n_stem": 4, "n_tail": 0}, {"fast_only": True}):
        with pytest.raises(ValueError, match="needs both branches"):
            speculate.check_speculation(type(model).without_weights(dataclasses.replace(model.config, **overrides)), SLOW["on"])


def test_infer_speculates_and_says_how_many_drafts_were_accepted(tiny, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "model", *tiny)
    ask = ["--model", str(tmp_path / "model"), "--device", "cpu", "--prompt", "the sum", "--max-tokens", "24"]
    assert infer.main([*ask, "--mode", "think"]) == 0
    plain = capsys.readouterr()
    assert infer.main([*ask, "--mode", "think", "--speculate"]) == 0
    got = capsys.readouterr()
    assert got.out == plain.out and "drafts accepted" not in plain.err
    g = generate(LoadedModel(*tiny), "the sum", "think", max_tokens=24, speculate=True)
    assert f" · {g.n_accepted} of {g.n_drafted} drafts accepted" in got.err
    assert infer.main([*ask, "--mode", "auto", "--speculate"]) == infer.USAGE_ERROR
    assert "route slow" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert infer.main([*ask[:4], "--mode", "think", "--speculate"]) == infer.USAGE_ERROR
    assert "needs a prompt" in capsys.readouterr().err
