"""The three modes, and the rules that decide which tokens a reply may hold next.

A mode is a preset over two knobs: `route` (which branch computes) and `thinking` (whether a reasoning block comes first).
`ThinkingController` holds one reply to its mode: no reasoning when off, at most the thinking budget, always room for an answer,
and an answer that is never empty. Used by `generate.py`; knows nothing of models or caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dualbranch.chat import chat_format
from dualbranch.gate import check_budget
from dualbranch.sampling import check_integer

if TYPE_CHECKING:
    from dualbranch.tokenizer import TokenizerBase

ROUTES = ("fast", "slow", "auto")
THINKING = ("on", "off", "auto")

#: Most tokens kept back for the answer when reasoning would use up the room; a quarter of the room where that is less.
ANSWER_RESERVE = 64
#: Most tokens of an answer held back while it may still be dropped for reasoning; a longer one stands.
MAX_TRIED = 64
#: A reply is at least the decision to think or not and one answer token (`TokenRules.min_room`: more where a format frames its replies).
MIN_ROOM = 2


@dataclass(frozen=True)
class Mode:
    """How to answer. `route`: "fast" | "slow" | "auto". `thinking`: "on" | "off" | "auto".

    `budget` in [0, 1]: share of tokens that may go slow, for route auto (None = the calibration's default). `thinking_budget`: most
    tokens of reasoning (None = what the room allows). Make one with `resolve`.
    """

    name: str
    route: str
    thinking: str
    budget: float | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise ValueError(f"unknown route {self.route!r}; choose one of {', '.join(ROUTES)}")
        if self.thinking not in THINKING:
            raise ValueError(f"unknown thinking {self.thinking!r}; choose one of {', '.join(THINKING)}")
        if self.budget is not None:
            check_budget(self.budget)
            if self.route != "auto":
                raise ValueError(f"budget = {self.budget} has no effect with route {self.route}; set route auto (mode auto), or leave budget out")
        if self.thinking_budget is not None:
            check_integer("thinking_budget", self.thinking_budget)
            if self.thinking_budget < 0:
                raise ValueError(f"thinking_budget is {self.thinking_budget}; it counts tokens and must be at least 0")
            if self.thinking == "off":
                raise ValueError(f"thinking_budget = {self.thinking_budget} has no effect with thinking off; set thinking on or auto, or leave it out")


MODES = {
    "fast": Mode("fast", route="fast", thinking="off"),
    "think": Mode("think", route="slow", thinking="on"),
    "auto": Mode("auto", route="auto", thinking="auto"),
}


def default_mode(fast_only: bool) -> str:
    """The preset of a model where none is asked for; `fast_only`: it has its fast branch alone."""
    return "fast" if fast_only else "auto"


def resolve(mode: str | Mode, route: str | None = None, thinking: str | None = None, budget: float | None = None, thinking_budget: int | None = None) -> Mode:
    """The preset `mode` with the knobs that are not None put in place of its own.

    Raises ValueError for an unknown mode, route or thinking (naming the valid ones), a budget outside [0, 1], and a knob that
    could have no effect: a budget without route auto, a thinking budget with thinking off.
    """
    if not isinstance(mode, Mode):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        mode = MODES[mode]
    return Mode(
        mode.name,
        mode.route if route is None else route,
        mode.thinking if thinking is None else thinking,
        mode.budget if budget is None else budget,
        mode.thinking_budget if thinking_budget is None else thinking_budget,
    )


def fitted(mode: Mode, tok: TokenizerBase, asked: bool = False) -> Mode:
    """`mode` as the tokenizer's model can carry it out: one without a thinking mode answers directly, whatever the preset says.

    Raises ValueError where reasoning was asked for by itself: a thinking budget, or thinking on other than as a preset (`asked`: even then).
    """
    if mode.thinking == "off" or chat_format(tok).thinking is not None:
        return mode
    preset = MODES.get(mode.name)
    if mode.thinking == "on" and (asked or preset is None or preset.thinking != "on"):
        raise ValueError("thinking is on, but this model has no thinking mode; leave thinking out, or train one (docs/architecture.md)")
    if mode.thinking_budget is not None:
        raise ValueError(f"thinking_budget = {mode.thinking_budget} has no effect: this model has no thinking mode; leave it out")
    return replace(mode, thinking="off")


class Phase(Enum):
    """Where a reply stands: the decision token, inside the reasoning, after it, ended."""

    DECIDE = "decide"
    THINK = "think"
    ANSWER = "answer"
    DONE = "done"


class Rule(IntEnum):
    """Which control tokens may come next besides plain text; indexes `TokenRules.banned`."""

    DECISION = 0  # <think> or </think>, no text
    REASONING = 1  # </think>
    OPENING = 2  # <tool_call>: no text in the answer yet
    TEXT = 3  # none: a call has opened and holds nothing yet
    VISIBLE_TEXT = 4  # none, and no blank text: the last chance for an answer that is not empty
    ANSWER = 5  # <|end|>, <tool_call>
    CALL = 6  # <|end|>, </tool_call>


class TokenRules:
    """What the rules mean for one tokenizer: `banned (n_rules, V)` bool, and `visible[id]`: the token adds text that is not blank.

    `think` and `skip`: the tokens that decide for and against reasoning; `close` begins its end; `ends`: all that end a reply. None where
    the model's chat format has no such thing.
    """

    def __init__(self, tok: TokenizerBase, vocab_size: int) -> None:
        if tok.vocab_size > vocab_size:
            raise ValueError(f"the tokenizer has {tok.vocab_size} tokens and the model {vocab_size}; they don't belong together")
        form = chat_format(tok)
        self.thinking, self.ends = form.thinking, form.stops
        self.think, self.skip = (None, None) if form.thinking is None else form.thinking.decision
        self.close = None if form.thinking is None else form.thinking.close[0]
        self.call, self.close_call = form.tool_call or (None, None)
        self.min_room = MIN_ROOM if form.thinking is None else max(MIN_ROOM, len(form.thinking.skip) + 1)
        self.visible = [not tok.is_control(i) and bool(tok.decode([i]).strip()) for i in range(tok.vocab_size)]
        not_text = torch.ones(vocab_size, dtype=torch.bool)  # control tokens, and a padded vocabulary's unused ids
        not_text[[i for i in range(tok.vocab_size) if not tok.is_control(i)]] = False
        self.banned = not_text.repeat(len(Rule), 1)
        self.banned[Rule.DECISION] = True
        self.banned[Rule.VISIBLE_TEXT, : tok.vocab_size] = ~torch.tensor(self.visible)
        for rule, allowed in {
            Rule.DECISION: (self.think, self.skip),
            Rule.REASONING: (self.close,),
            Rule.OPENING: (self.call,),
            Rule.ANSWER: (*self.ends, self.call),
            Rule.CALL: (*self.ends, self.close_call),
        }.items():
            self.banned[rule, [i for i in allowed if i is not None]] = False


@lru_cache(maxsize=8)
def token_rules(tok: TokenizerBase, vocab_size: int) -> TokenRules:
    """`TokenRules`, built once per tokenizer object."""
    return TokenRules(tok, vocab_size)


class ThinkingController:
    """Holds one reply to its mode: DECIDE -> (THINK ->) ANSWER -> DONE; from ANSWER on where the model has no thinking mode.

    Before each token ask `forced` and, if it leaves the choice to the model, mask its logits by `rules.banned[rule]`; then `advance`.
    With thinking auto and a `direct_confidence`, an answer without reasoning is at first only tried (`trying`): if `doubts(p)` of a token's
    probability, call `reconsider` instead of `advance`, and the reply starts over with reasoning.
    `room`: most tokens of the whole reply, at least `rules.min_room`. Counts: `n_think` tokens between the tags, `n_answer` tokens after
    the reasoning without `<|end|>`; `framing`: the newest token is part of a tag, neither reasoning nor answer. Guaranteed for any model: no
    reasoning with thinking off, `n_think <= thinking_budget`, at least one visible answer token, at most `room` tokens.
    """

    def __init__(self, rules: TokenRules, mode: Mode, room: int, think_threshold: float = 0.5, direct_confidence: float | None = None) -> None:
        assert room >= rules.min_room, f"room {room} is below {rules.min_room}"
        self.rules, self.mode, self.think_threshold, self.direct_confidence = rules, mode, think_threshold, direct_confidence
        self.remaining = room
        self.answer_reserve = max(1, min(ANSWER_RESERVE, room // 4))
        self.n_think = self.n_answer = 0
        self.phase = Phase.ANSWER if rules.thinking is None else Phase.DECIDE
        self.framing = False
        self._n_frame, self._queue = 0, []  # tokens of the opening frame so far; tokens of a frame that come next whatever the model prefers
        self.thought = self.finished = False  # opened a reasoning block; ended by <|end|>
        self.trying = self.reconsidered = False  # answers without reasoning, for now; did so in vain
        self._has_text = self._call_open = False

    @property
    def undecided(self) -> bool:
        """Whether the next token is the model's own decision to think or not (thinking auto, and room for it)."""
        free = self.phase is Phase.DECIDE and self._n_frame == self.rules.thinking.n_common
        return free and self.mode.thinking == "auto" and not self.reconsidered and self._may_think()

    def forced(self, p_think: float | None = None) -> int | None:
        """The token that comes next whatever the model prefers, or None. `p_think`, needed when `undecided`: P(<think>) against </think>."""
        if self._queue:
            return self._queue[0]
        if self.phase is Phase.DECIDE:
            frame = self.rules.thinking
            if self._n_frame < frame.n_common:
                return frame.open[self._n_frame]
            if self.undecided:
                thinks = p_think >= self.think_threshold
            else:
                thinks = (self.mode.thinking == "on" or self.reconsidered) and self._may_think()
            return self.rules.think if thinks else self.rules.skip
        if self.phase is Phase.THINK:
            budget = self.mode.thinking_budget
            used_up = budget is not None and self.n_think >= budget
            if used_up or self.remaining - len(self.rules.thinking.close) <= self.answer_reserve:  # </think> and then the reserve fills the room
                return self.rules.close
        return None

    @property
    def rule(self) -> Rule:
        """What the model may choose from when nothing is forced."""
        if self.phase is Phase.DECIDE:
            return Rule.DECISION
        if self.phase is Phase.THINK:
            return Rule.REASONING
        if not self._has_text:
            if self.remaining <= 1:
                return Rule.VISIBLE_TEXT
            return Rule.TEXT if self._call_open else Rule.OPENING
        return Rule.CALL if self._call_open else Rule.ANSWER

    @property
    def chooses_text(self) -> bool:
        """Whether the model chooses the next token, within reasoning or answer."""
        return self.phase in (Phase.THINK, Phase.ANSWER) and self.forced() is None

    @property
    def on_trial(self) -> bool:
        """Whether the next token is one that an answer, so far only tried, is judged by."""
        return self.trying and not self._queue

    @property
    def may_be_dropped(self) -> bool:
        """Whether what there is of the reply may yet be dropped: an answer that is only tried, or what of a frame comes before one."""
        return self.trying or (self.phase is Phase.DECIDE and self.mode.thinking == "auto" and not self.reconsidered)

    def doubts(self, p: float) -> bool:
        """Whether an answer that is only tried must be dropped, its next token having the probability `p`."""
        return self.on_trial and p < self.direct_confidence

    def reconsider(self) -> None:
        """Drops the answer tried so far: back to the decision, which now falls to reasoning. Mutates the controller."""
        assert self.trying, "this reply is not a trial"
        self.remaining += len(self.rules.thinking.skip) + self.n_answer
        self.n_answer, self.phase, self.trying, self.reconsidered = 0, Phase.DECIDE, False, True
        self._has_text = self._call_open = self.framing = False
        self._n_frame, self._queue = 0, []

    def advance(self, token: int) -> None:
        """Counts `token` as generated. Mutates the controller."""
        r = self.rules
        if self.phase is Phase.DECIDE:
            self.trying = self.undecided and token == r.skip and self.direct_confidence is not None
        self.remaining -= 1
        self.framing = True
        if self._queue:
            assert token == self._queue[0], "a frame's tokens are forced"
            del self._queue[0]
        elif self.phase is Phase.DECIDE:
            k = self._n_frame
            self._n_frame += 1
            if k == r.thinking.n_common:
                self.thought = token == r.think
                self._queue = list((r.thinking.open if self.thought else r.thinking.skip)[k + 1 :])
                self.phase = Phase.THINK if self.thought else Phase.ANSWER
        elif self.phase is Phase.THINK:
            if token == r.close:
                self._queue = list(r.thinking.close[1:])
                self.phase = Phase.ANSWER
            else:
                self.framing = False
                self.n_think += 1
        else:
            assert self.phase is Phase.ANSWER, "the reply has ended"
            self.framing = False
            if token in r.ends:
                self.phase, self.finished, self.trying = Phase.DONE, True, False
                return
            self.n_answer += 1
            self.trying = self.trying and self.n_answer < MAX_TRIED
            self._has_text = self._has_text or r.visible[token]
            self._call_open = token == r.call or (self._call_open and token != r.close_call)
        if self.remaining == 0:
            self.phase, self.trying = Phase.DONE, False

    def _may_think(self) -> bool:
        """A budget above 0, and room for <think>, one token, </think> and the reserve."""
        frame = self.rules.thinking
        needed = len(frame.open) - self._n_frame + 1 + len(frame.close)
        return self.mode.thinking_budget != 0 and self.remaining - needed >= self.answer_reserve
