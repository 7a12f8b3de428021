"""Claims about modes and about `ThinkingController`, driven by an adversary that may choose any token the rules allow."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbranch.chat import split_reply
from dualbranch.modes import MAX_TRIED, MIN_ROOM, MODES, Phase, Rule, ThinkingController, resolve, token_rules


def play(tok, mode, room: int, seed: int, p_control: float = 0.5, p_think: float | None = 0.7):
    """A reply by an adversary that prefers control tokens and blank text. Returns `(ids, controller)`."""
    rng, rules = random.Random(seed), token_rules(tok, tok.vocab_size)
    blank = next(i for i in range(tok.vocab_size) if tok.decode([i]) in (" ", "\n"))
    controller, ids = ThinkingController(rules, mode, room), []
    while controller.phase is not Phase.DONE:
        token = controller.forced(p_think if controller.undecided else None)
        if token is None:
            allowed = [i for i, banned in enumerate(rules.banned[controller.rule].tolist()) if not banned]
            tempting = [i for i in allowed if tok.is_control(i) or i == blank]
            token = rng.choice(tempting if tempting and rng.random() < p_control else allowed)
        ids.append(token)
        controller.advance(token)
    return ids, controller


replies = given(
    name=st.sampled_from(list(MODES)),
    thinking_budget=st.sampled_from([None, 0, 1, 5, 10**9]),
    room=st.one_of(st.integers(MIN_ROOM, 12), st.integers(MIN_ROOM, 200)),
    seed=st.integers(0, 2**32),
    p_control=st.sampled_from([0.0, 0.3, 1.0]),
    p_think=st.sampled_from([0.0, 0.49, 0.5, 1.0]),
)


def test_every_reply_is_well_formed_within_budget_and_never_empty(tiny):
    tok = tiny[1]
    c = tok.control

    @settings(deadline=None, max_examples=200)
    @replies
    def check(name, thinking_budget, room, seed, p_control, p_think):
        mode = resolve(name, thinking_budget=None if name == "fast" else thinking_budget)
        ids, controller = play(tok, mode, room, seed, p_control, p_think)
        reply = split_reply(tok, ids)
        assert len(ids) <= room
        assert ids.count(c["<think>"]) == int(reply.thought) and ids.count(c["</think>"]) == 1
        assert reply.thought == controller.thought and (not reply.thought or name != "fast")
        close = ids.index(c["</think>"])
        assert controller.n_think == max(close - 1, 0)
        assert controller.n_answer == len(ids) - close - 1 - int(reply.finished)
        if mode.thinking_budget is not None:
            assert controller.n_think <= mode.thinking_budget
        assert reply.answer.strip(), ids  # never empty, not even blank
        assert not set(ids) & {c["<pad>"], c["<bos>"], c["<|system|>"], c["<|user|>"], c["<|assistant|>"]}
        assert c["<|end|>"] not in ids[:-1]
        if controller.thought:
            assert len(ids) - close - 1 >= 1
        if p_think < 0.5 and name == "auto":
            assert not reply.thought

    check()


@pytest.mark.parametrize("room", [5, 8, 40, 400])
def test_the_answer_keeps_its_reserve_when_reasoning_never_ends(tiny, room):
    tok = tiny[1]
    controller = ThinkingController(token_rules(tok, tok.vocab_size), resolve("think"), room)
    text = tok.encode("a")[0]
    while controller.phase is not Phase.ANSWER:
        controller.advance(text if (forced := controller.forced()) is None else forced)
    assert controller.thought and controller.remaining == controller.answer_reserve >= min(64, room // 4)


@pytest.mark.parametrize("room", [2, 3])
def test_no_reasoning_is_opened_where_there_is_no_room_for_it(tiny, room):
    ids, controller = play(tiny[1], resolve("think"), room, seed=0)
    assert not controller.thought and controller.n_answer >= 1


def test_thinking_budget_zero_closes_at_once(tiny):
    for name in ("think", "auto"):
        ids, controller = play(tiny[1], resolve(name, thinking_budget=0), 50, seed=0, p_think=1.0)
        assert ids[0] == tiny[1].control["</think>"] and not controller.thought


def test_auto_decides_by_the_threshold(tiny):
    rules = token_rules(tiny[1], tiny[1].vocab_size)
    for p, threshold, thinks in ((0.3, 0.2, True), (0.2, 0.2, True), (0.19, 0.2, False)):
        controller = ThinkingController(rules, MODES["auto"], 100, think_threshold=threshold)
        assert controller.undecided
        assert controller.forced(p) == (rules.think if thinks else rules.close)


def test_a_tried_answer_is_dropped_at_the_first_doubt_and_its_room_given_back(tiny):
    rules = token_rules(tiny[1], tiny[1].vocab_size)
    text = tiny[1].encode("a")[0]
    c = ThinkingController(rules, MODES["auto"], 100, think_threshold=0.5, direct_confidence=0.9)
    c.advance(c.forced(0.4))
    assert c.trying and not c.doubts(0.9) and c.doubts(0.89)
    c.advance(text)
    c.reconsider()
    assert (c.remaining, c.n_answer, c.trying, c.undecided, c.forced()) == (100, 0, False, False, rules.think)
    c.advance(rules.think)
    assert c.thought and c.phase is Phase.THINK


def test_a_long_answer_stands_and_other_modes_try_nothing(tiny):
    rules = token_rules(tiny[1], tiny[1].vocab_size)
    text = tiny[1].encode("a")[0]
    c = ThinkingController(rules, MODES["auto"], 500, direct_confidence=0.9)
    c.advance(c.forced(0.0))
    for _ in range(MAX_TRIED):
        assert c.trying
        c.advance(text)
    assert not c.trying and not c.doubts(0.0)
    for mode, threshold in ((resolve("auto", thinking="off"), 0.9), (resolve("auto", thinking="on"), 0.9), (MODES["auto"], None)):
        c = ThinkingController(rules, mode, 500, direct_confidence=threshold)
        c.advance(c.forced(0.0 if c.undecided else None))
        assert not c.trying


def test_rules_allow_text_everywhere_but_at_the_decision(tiny):
    tok = tiny[1]
    rules = token_rules(tok, tok.vocab_size + 7)
    text = tok.encode("sum")[0]
    for rule in Rule:
        assert bool(rules.banned[rule, text]) == (rule is Rule.DECISION)
    assert rules.banned[:, tok.vocab_size :].all()  # ids of a padded vocabulary


def test_mode_is_a_preset_over_two_knobs():
    assert (MODES["fast"].route, MODES["fast"].thinking) == ("fast", "off")
    assert (MODES["think"].route, MODES["think"].thinking) == ("slow", "on")
    assert (MODES["auto"].route, MODES["auto"].thinking) == ("auto", "auto")
    mixed = resolve("fast", route="slow", thinking="on", thinking_budget=3)
    assert (mixed.route, mixed.thinking, mixed.thinking_budget) == ("slow", "on", 3)
    assert resolve("auto", budget=0.25).budget == 0.25
    assert resolve(mixed, thinking_budget=4) == resolve("fast", "slow", "on", None, 4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"mode": "quick"}, ["quick", "fast", "think", "auto"]),
        ({"mode": "auto", "route": "medium"}, ["medium", "fast", "slow", "auto"]),
        ({"mode": "auto", "thinking": "yes"}, ["yes", "on", "off", "auto"]),
        ({"mode": "auto", "budget": 1.5}, ["budget", "1.5", "[0, 1]"]),
        ({"mode": "auto", "budget": float("nan")}, ["budget", "nan"]),
        ({"mode": "fast", "budget": 0.3}, ["budget", "route fast"]),
        ({"mode": "think", "thinking_budget": -1}, ["thinking_budget", "-1"]),
        ({"mode": "fast", "thinking_budget": 5}, ["thinking_budget", "thinking off"]),
    ],
)
def test_wrong_or_idle_knobs_are_refused_naming_the_choices(call, named):
    with pytest.raises(ValueError) as error:
        resolve(**call)
    assert all(word in str(error.value) for word in named), str(error.value)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(tiny):
    tok = tiny[1]
    with pytest.raises(ValueError, match=f"{tok.vocab_size}.*{tok.vocab_size - 1}"):
        token_rules(tok, tok.vocab_size - 1)


def test_budgets_of_the_wrong_type_are_value_errors():
    with pytest.raises(ValueError, match=r"budget is '0\.3'"):
        resolve("auto", budget="0.3")
    with pytest.raises(ValueError, match=r"thinking_budget is 2\.5; it must be an integer"):
        resolve("think", thinking_budget=2.5)
