"""Text generation: `prefill`, then `decode_one_token` until every sequence has ended.

One loop, `decode`, serves all doors: `generate_batch` (many prompts at once), `stream` (one prompt, event by event) and
`generate` (one prompt, the library's front door). What a reply may hold is `modes.py`, how a token is drawn `sampling.py`,
conversations that keep their cache `conversation.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualbranch.accounting import token_flops, unread_flops
from dualbranch.cache import KVCache
from dualbranch.chat import Reply, render_prompt, split_reply
from dualbranch.config import DualBranchConfig
from dualbranch.model import DualBranchModel, ModelOutput
from dualbranch.modes import Mode, Phase, ThinkingController, default_mode, fitted, resolve, token_rules
from dualbranch.sampling import GREEDY, SamplingParams, check_integer, sample

if TYPE_CHECKING:
    from dualbranch.checkpoint import LoadedModel
    from dualbranch.tokenizer import Tokenizer

#: Waiting prompts are prefilled together, as soon as this share of a batch's rows is free: one by one they would cost more than idle rows do.
REFILL_AT = 0.25
#: Most tokens, padding included, of prompts that are prefilled together (one longer prompt alone); more need more memory and are no faster.
PROMPTS_AT_ONCE = 16384


class PromptTooLong(ValueError):
    """The prompt leaves no room for a reply. `n_prompt` and `max_prompt` are both counts, also named in the message."""

    def __init__(self, n_prompt: int, max_seq_len: int, min_room: int) -> None:
        self.n_prompt, self.max_prompt = n_prompt, max_seq_len - min_room
        super().__init__(
            f"the prompt has {n_prompt} tokens and the model takes at most {self.max_prompt} (max_seq_len {max_seq_len} less {min_room} for a reply);"
            " shorten it, or start a new conversation"
        )


@dataclass(frozen=True)
class Generation:
    """A finished reply.

    `ids`: everything generated after `<|assistant|>`, the decision token first, `<|end|>` last if it came. `reply`: the same as text.
    Counts: `n_prompt`; `n_think` tokens between the tags; `n_answer` tokens after the reasoning, without `<|end|>`; `n_dropped` tokens of an
    answer that was tried and dropped for reasoning; `n_second_looks` tokens computed fast, then slow. `confidence`: the lowest probability of
    a token of an answer that was tried (None where none was); `n_drafted` tokens proposed by speculation, `n_accepted` of them by the slow branch.
    `use_slow[i]`: token i of prompt + ids went through the slow branch. The last generated token is never fed back, so there are
    `n_prompt + len(ids) - 1`. `flops`: of everything computed for this reply, dropped, drafted and repeated tokens included, each by its own route
    and position; the first `n_reused` tokens came from the cache and cost nothing.
    """

    ids: list[int]
    reply: Reply
    n_prompt: int
    n_think: int
    n_answer: int
    finish_reason: str  # "stop": ended by <|end|>; "length": max_tokens or max_seq_len reached; "cancelled": stopped by the caller
    use_slow: list[bool]
    thought: bool
    flops: float
    n_reused: int = 0
    n_dropped: int = 0
    n_second_looks: int = 0
    confidence: float | None = None
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def answer(self) -> str:
        return self.reply.answer

    @property
    def reasoning(self) -> str:
        return self.reply.reasoning

    @property
    def slow_share(self) -> float:
        """Share of slow tokens among those computed for this reply, prompt included."""
        computed = self.use_slow[self.n_reused :]
        return sum(computed) / len(computed)


@dataclass(frozen=True)
class Event:
    """One generated token of `stream`.

    `piece`: the text it completes, maybe none (control tokens, half a character). The pieces of phase "think" join to
    `reply.reasoning`, those of phase "answer" to `reply.answer`. `use_slow`, `g`: branch and gate value of the forward pass that
    produced the token (`g` None where no gate ran). `generation`: the whole reply, on the last event only.
    """

    token: int
    piece: str
    phase: str  # "think" | "answer"
    use_slow: bool
    g: float | None
    generation: Generation | None = None


@dataclass
class Pending:
    """A reply in progress: its prompt, its tokens so far, and what the next one depends on. One row of a batch."""

    prompt: list[int]
    controller: ThinkingController
    generator: torch.Generator
    n_reused: int = 0
    ids: list[int] = field(default_factory=list)
    use_slow: list[bool] = field(default_factory=list)  # of every token computed so far, reused ones first
    g: float | None = None  # gate value of the pass that produced the last token
    looks_again: bool = False  # the newest token is to be computed again, slow
    n_dropped: int = 0
    n_second_looks: int = 0
    confidence: float | None = None
    n_drafted: int = 0
    n_accepted: int = 0
    extra_flops: float = 0.0  # of tokens dropped, of first looks, of drafts and of verified tokens that did not become the reply's

    @property
    def done(self) -> bool:
        return self.controller.phase is Phase.DONE

    def look_again(self, config: DualBranchConfig) -> None:
        """Voids the newest computed token, which went fast; the next step computes it again, slow. Mutates the sequence."""
        self.looks_again = True
        self.use_slow.pop()
        self.extra_flops += spent_flops(config, [False], len(self.use_slow))
        self.n_second_looks += 1

    def take(self, token: int, p: float, config: DualBranchConfig) -> bool:
        """Appends `token`, of probability `p` to the model itself, or drops the answer that it casts doubt on; whether it stands. Mutates the sequence."""
        if self.controller.on_trial:
            self.confidence = min(p, 1.0 if self.confidence is None else self.confidence)
            if self.controller.doubts(p):
                self.reconsider(config)
                return False
        self.ids.append(token)
        self.controller.advance(token)
        return True

    def reconsider(self, config: DualBranchConfig) -> None:
        """Drops the answer tried so far and opens the reasoning instead. What the cache holds after the prompt is void. Mutates the sequence."""
        n = len(self.prompt)
        self.n_dropped += len(self.ids)
        self.extra_flops += spent_flops(config, self.use_slow[n:], n)
        self.use_slow = self.use_slow[:n]
        self.controller.reconsider()
        self.ids = [self.controller.forced()]
        self.controller.advance(self.ids[0])

    def result(self, model: DualBranchModel, tok: Tokenizer) -> Generation:
        """The reply as it stands; also valid before it is done."""
        c = self.controller
        reason = "stop" if c.finished else "length" if self.done else "cancelled"
        flops = spent_flops(model.config, self.use_slow[self.n_reused :], self.n_reused)
        flops -= spared_flops(model.config, self.n_reused, len(self.prompt) - 1)
        flops += self.extra_flops
        ids, use_slow = list(self.ids), list(self.use_slow)
        return Generation(
            ids, split_reply(tok, ids), len(self.prompt), c.n_think, c.n_answer, reason, use_slow, c.thought, flops,
            self.n_reused, self.n_dropped, self.n_second_looks, self.confidence, self.n_drafted, self.n_accepted,
        )  # fmt: skip


@torch.inference_mode()
def prefill(model: DualBranchModel, prompts: Sequence[Sequence[int]], mode: Mode, cache: KVCache) -> ModelOutput:
    """Runs ragged `prompts` (each at least one token) after what `cache` holds; logits `(B, 1, V)` of each row's last token.

    Writes to and advances the cache. `g` and `use_slow` are `(B, T)`, T the longest prompt; cells past a row's length mean nothing.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    for b, p in enumerate(prompts):
        tokens[b, : len(p)] = torch.tensor(p)
    ragged = lengths if int(lengths.min()) < width else None
    return model(tokens.to(model.device), mode.route, cache=cache, lengths=ragged, budget=mode.budget, last_only=True)


@torch.inference_mode()
def decode_one_token(model: DualBranchModel, tokens: Sequence[int], mode: Mode, cache: KVCache, slow: Sequence[bool] = ()) -> ModelOutput:
    """Feeds one token per row and returns logits `(B, 1, V)` of the next. Writes to and advances the cache.

    In route auto the rows in `slow` go slow whatever the gate says.
    """
    column = torch.tensor(tokens, device=model.device)[:, None]
    threshold = None
    if any(slow):
        of_gate = model.calibration.threshold(mode.budget)
        threshold = torch.tensor([[math.inf if s else of_gate] for s in slow], device=model.device)
    return model(column, mode.route, cache=cache, budget=mode.budget, threshold=threshold, last_only=True)


@torch.inference_mode()
def choose_tokens(logits: Tensor, sequences: Sequence[Pending], banned: Tensor, params: SamplingParams) -> list[int]:
    """The next token of each sequence, from `logits (B, V)` and what its controller forces or allows.

    `banned (n_rules, V)`: see `TokenRules`. Consumes one random number per sequence unless greedy.
    """
    p_think = [None] * len(sequences)
    if any(s.controller.undecided for s in sequences):
        r = sequences[0].controller.rules
        p_think = torch.sigmoid(logits[:, r.think] - logits[:, r.skip]).tolist()
    rules = torch.tensor([s.controller.rule for s in sequences], device=logits.device)
    tokens = sample(logits.masked_fill(banned[rules], float("-inf")), params, [s.generator for s in sequences]).tolist()
    forced = [s.controller.forced(p) for s, p in zip(sequences, p_think, strict=True)]
    return [t if f is None else f for t, f in zip(tokens, forced, strict=True)]


def start(model: DualBranchModel, tok: Tokenizer, prompts: Sequence[Sequence[int]], mode: Mode, params: SamplingParams) -> list[Pending]:
    """Checked sequences, ready for `decode`. Row i draws from a generator seeded `params.seed + i`.

    Raises ValueError for an empty prompt or an id outside the vocabulary, and PromptTooLong.
    """
    rules, mode = token_rules(tok, model.config.vocab_size), fitted(mode, tok)
    if params.max_tokens < rules.min_room:
        raise ValueError(f"max_tokens is {params.max_tokens}; a reply of this model needs at least {rules.min_room}")
    calibration = model.calibration
    when_to_think = () if calibration is None else (calibration.think_threshold, calibration.direct_confidence)
    sequences = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(f"prompt {i} is text; give its token ids (render_prompt makes them from messages)")
        prompt = list(prompt)
        if not prompt:
            raise ValueError(f"prompt {i} is empty; it needs at least <bos> (render_prompt makes one from messages)")
        room = model.config.max_seq_len - len(prompt)
        if room < rules.min_room:
            raise PromptTooLong(len(prompt), model.config.max_seq_len, rules.min_room)
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(f"prompt {i} holds token ids outside [0, {model.config.vocab_size}); was it made by another tokenizer?")
        controller = ThinkingController(rules, mode, min(params.max_tokens, room), *when_to_think)
        sequences.append(Pending(prompt, controller, torch.Generator().manual_seed((int(params.seed) + i) % 2**63)))
    return sequences


def decode(
    model: DualBranchModel, sequences: Sequence[Pending], mode: Mode, params: SamplingParams, cache: KVCache | None = None, n_rows: int | None = None
) -> Iterator[list[Pending]]:
    """Generates every one of `sequences`, at least one, as many at once as the cache has rows, and yields after each step those that got a token.

    A step computes one token of each running sequence, or the prompts of a group of waiting ones, which take the rows of sequences that ended.
    In route auto, a sequence whose newest token is `unsure` gets none: it takes the step to compute that token again, slow, beside the others.
    An answer tried without reasoning and then dropped (`ThinkingController.doubts`) leaves `<think>` as the sequence's only token.
    Mutates the sequences. `cache`, if given, has a row for each that holds the first `n_reused` tokens of its prompt; it is advanced, shrunk only
    where tokens are dropped or computed again, and holds everything but the token just chosen at each step. Without it one of at most `n_rows` is
    made (None = a row for each), with room for the longest reply.
    """
    if cache is None:
        capacity = max(len(s.prompt) + s.controller.remaining for s in sequences)
        cache = model.new_cache(min(n_rows or len(sequences), len(sequences)), capacity)
    banned = sequences[0].controller.rules.banned.to(model.device)
    sure = model.calibration.confidence(mode.budget) if mode.route == "auto" and model.calibration is not None else 0.0
    waiting, filling = deque(sequences), False
    live: list[Pending] = []  # live[b] is row b of the cache; the rows after them are free
    while live or waiting:
        n_free = cache.n_rows - len(live)
        filling = bool(waiting) and n_free >= (1 if filling else min(len(waiting), REFILL_AT * cache.n_rows))
        if filling:
            group = _next_group(waiting, n_free)
            rows = cache.rows(len(live), len(live) + len(group))
            rows.truncate([s.n_reused for s in group])
            live = [*live, *group]
            out = prefill(model, [s.prompt[s.n_reused :] for s in group], mode, rows)
        else:
            group, rows = live, cache.rows(0, len(live))
            out = decode_one_token(model, [s.ids[-1] for s in group], mode, rows, [s.looks_again for s in group])
        _record(out, group)
        stepped = _extend(model, group, out.logits[:, -1], banned, params, sure)
        if any(s.looks_again or len(s.ids) == 1 for s in group):  # a token was voided, or an answer dropped
            rows.truncate([len(s.use_slow) for s in group])
        if stepped:
            yield stepped
        live = _without_ended(live, cache)


def _next_group(waiting: deque[Pending], n_free: int) -> list[Pending]:
    """The first of `waiting`, at most `n_free`, whose prompts are prefilled together. Mutates `waiting`."""
    group, longest = [], 0
    while waiting and len(group) < n_free:
        longest = max(longest, len(waiting[0].prompt) - waiting[0].n_reused)
        if group and (len(group) + 1) * longest > PROMPTS_AT_ONCE:
            break
        group.append(waiting.popleft())
    return group


def _extend(model: DualBranchModel, group: Sequence[Pending], logits: Tensor, banned: Tensor, params: SamplingParams, sure: float) -> list[Pending]:
    """Gives each sequence its next token, by `logits (B, V)`, unless its newest one is to be computed again; those that got one. Mutates them."""
    probs = None  # the model's own: no temperature, no rules
    if sure > 0.0 or any(s.controller.on_trial for s in group):
        probs = logits.softmax(-1)
    again = unsure(group, probs, sure)
    stepped = [s for s, a in zip(group, again, strict=True) if not a]
    if len(stepped) < len(group):
        for s, a in zip(group, again, strict=True):
            if a:
                s.look_again(model.config)
        if not stepped:
            return []
        ready = torch.tensor(again, device=logits.device).logical_not()
        logits, probs = logits[ready], probs[ready]
    tokens = choose_tokens(logits, stepped, banned, params)
    p = [1.0] * len(stepped)
    if any(s.controller.on_trial for s in stepped):
        p = probs.gather(1, torch.tensor(tokens, device=probs.device)[:, None])[:, 0].tolist()
    for s, token, p_token in zip(stepped, tokens, p, strict=True):
        s.take(token, p_token, model.config)
    return stepped


def unsure(group: Sequence[Pending], probs: Tensor | None, sure: float) -> list[bool]:
    """Whose newest token went fast and leaves the next one unsure: its likeliest successor, by `probs (B, V)`, is less probable than `sure`.

    Where the next token is no text of the model's own choice, nothing is unsure; nor where `sure` is 0 (`probs` is not read then).
    """
    if sure <= 0.0:
        return [False] * len(group)
    p = probs.amax(-1).tolist()
    return [p < sure and bool(s.ids) and not s.use_slow[-1] and s.controller.chooses_text for s, p in zip(group, p, strict=True)]


def _record(out: ModelOutput, group: Sequence[Pending]) -> None:
    """Notes on each sequence which branch computed its newest tokens, and the gate value of the last. Mutates them."""
    use_slow = None if out.use_slow is None else out.use_slow.tolist()
    g = None if out.g is None else out.g.tolist()
    for b, s in enumerate(group):
        n = len(s.prompt) + len(s.ids) - len(s.use_slow)  # tokens not computed so far: the rest of the prompt, or the newest token
        s.use_slow += [True] * n if use_slow is None else use_slow[b][:n]
        s.g = None if g is None else g[b][n - 1]
        s.looks_again = False


def _without_ended(live: list[Pending], cache: KVCache) -> list[Pending]:
    """Those of `live` that go on, again as the first rows of the cache: the last ones take the places of those that ended. Mutates the cache."""
    n = sum(not s.done for s in live)
    if n == len(live):
        return live
    places = [b for b in range(n) if live[b].done]
    movers = [b for b in range(n, len(live)) if not live[b].done]
    if movers:
        cache.copy_rows(movers, places)
    kept = live[:n]
    for place, mover in zip(places, movers, strict=True):
        kept[place] = live[mover]
    return kept


@lru_cache(maxsize=8)
def _flops_table(config: DualBranchConfig, n_positions: int) -> tuple[list[float], list[float], list[float]]:
    """FLOPs of a fast [0] and a slow [1] token at each position, and what one of a prompt spares [2]."""
    spared = [unread_flops(config, n) for n in range(n_positions)]
    return *([token_flops(config, share, n) for n in range(n_positions)] for share in (0.0, 1.0)), spared


def spent_flops(config: DualBranchConfig, use_slow: Sequence[bool], n_cached: int = 0) -> float:
    """FLOPs of tokens at positions `n_cached, n_cached + 1, ...`, of which `use_slow` went slow (`accounting.token_flops`, summed)."""
    end = n_cached + len(use_slow)
    fast, slow, _ = _flops_table(config, _table_length(end))
    return math.fsum(slow[n] if s else fast[n] for n, s in enumerate(use_slow, n_cached))


def spared_flops(config: DualBranchConfig, start: int, end: int) -> float:
    """FLOPs that the tokens of a prompt at positions `[start, end)`, none of them its last, don't cost (`accounting.unread_flops`, summed)."""
    return math.fsum(_flops_table(config, _table_length(end))[2][start:end])


def _table_length(n: int) -> int:
    return max(256, 1 << (n - 1).bit_length()) if n else 1


def generate_batch(
    model: DualBranchModel,
    tok: Tokenizer,
    prompts: Sequence[Sequence[int]],
    mode: Mode | str,
    params: SamplingParams = GREEDY,
    batch_size: int = 128,
) -> list[Generation]:
    """One `Generation` per prompt (ids ending in `<|assistant|>`), in order; `batch_size` sequences are decoded at once.

    A reply doesn't depend on the batch it is in (but for rounding where its matrices are packed or its steps compiled: `runner.few_tokens`,
    `packed.product_dtype`).
    Raises ValueError and PromptTooLong as `start` does, before anything is computed.
    """
    check_integer("batch_size", batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    mode = resolve(mode)
    sequences = start(model, tok, prompts, mode, params)
    by_length = sorted(sequences, key=lambda s: len(s.prompt))  # little padding in what is prefilled together
    for _ in decode(model, by_length, mode, params, n_rows=batch_size) if by_length else ():
        pass
    return [s.result(model, tok) for s in sequences]


def stream(
    model: DualBranchModel,
    tok: Tokenizer,
    prompt_ids: Sequence[int],
    mode: Mode | str,
    params: SamplingParams = GREEDY,
    cache: KVCache | None = None,
    n_reuse: int = 0,
    speculate: bool = False,
) -> Iterator[Event]:
    """Events of one reply, token by token; the last carries the `Generation`. Raises at once what `start` raises.

    `speculate`, for route slow: the fast branch drafts and the slow one verifies (`speculate.py`); ValueError where that can't be.
    With `cache` (one row), its first `n_reuse` tokens must be those of the prompt, on route slow computed by the slow branch, and at least one prompt
    token must be new; the cache is truncated to them and then advanced. Stop iterating whenever you like: the cache holds what was computed.
    """
    mode = resolve(mode)
    if cache is None and n_reuse:
        raise ValueError(f"n_reuse is {n_reuse} without a cache; give the cache that holds the prompt's first tokens")
    (pending,) = start(model, tok, [prompt_ids], mode, params)
    if speculate:
        from dualbranch import speculate as speculation

        steps = speculation.speculate(model, pending, params, cache)
    else:
        steps = decode(model, [pending], mode, params, cache)
    if cache is not None:
        if not 0 <= n_reuse < len(pending.prompt) or n_reuse > int(cache.n_cached[0]):
            n_cached = int(cache.n_cached[0])
            raise ValueError(f"n_reuse is {n_reuse}; it must be below the prompt's {len(pending.prompt)} tokens and at most the {n_cached} cached")
        if mode.route == "slow" and not bool(cache.from_slow[0, :n_reuse].all()):
            raise ValueError(f"n_reuse is {n_reuse}, and not all of these tokens were computed by the slow branch; reuse those before the first fast one")
        cache.truncate(n_reuse)
        pending.n_reused = n_reuse
        pending.use_slow = cache.from_slow[0, :n_reuse].tolist()
    return _events(model, tok, pending, steps)


def _events(model: DualBranchModel, tok: Tokenizer, pending: Pending, steps: Iterator[list[Pending]]) -> Iterator[Event]:
    text, held = tok.stream(), []  # events of an answer that may yet be dropped
    for _ in steps:
        token = pending.ids[-1]
        if len(pending.ids) == 1:
            text, held = tok.stream(), []
        closes = pending.controller.thought and token == pending.controller.rules.close
        phase = "think" if closes or pending.controller.phase is Phase.THINK else "answer"
        piece = "" if pending.controller.framing else text.push(token)
        if closes or pending.done:  # reasoning and answer are decoded apart, as in split_reply
            piece += text.flush()
        generation = pending.result(model, tok) if pending.done else None
        held.append(Event(token, piece, phase, pending.use_slow[-1], pending.g, generation))
        if not pending.controller.may_be_dropped:
            yield from held
            held = []


def generate(
    loaded: LoadedModel,
    prompt: str | Sequence[Mapping[str, Any]],
    mode: Mode | str | None = None,
    *,
    route: str | None = None,
    thinking: str | None = None,
    budget: float | None = None,
    thinking_budget: int | None = None,
    speculate: bool = False,
    **sampling: Any,
) -> Generation:
    """The model's reply to `prompt`: a user's text, or messages as for `render_prompt`.

        loaded = dualbranch.load("runs/small")
        print(dualbranch.generate(loaded, "What is 12 + 30?", mode="think").answer)

    `mode` (None: auto, of a fast branch alone fast) and the four knobs are those of `resolve`, `speculate` that of `stream`; `sampling` are the fields of
    `SamplingParams` (temperature, top_k, top_p, min_p, seed, max_tokens). Raises ValueError for anything out of range, an empty prompt, and PromptTooLong.
    """
    unknown = sampling.keys() - SamplingParams.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"unknown setting {min(unknown)!r}; sampling settings are {', '.join(SamplingParams.__dataclass_fields__)}")
    ids = prompt_ids(loaded.tokenizer, prompt)
    mode = default_mode(loaded.model.config.fast_only) if mode is None else mode
    mode = fitted(resolve(mode, route, thinking, budget, thinking_budget), loaded.tokenizer, asked=thinking == "on")
    params = SamplingParams(**sampling)
    if speculate:
        *_, last = stream(loaded.model, loaded.tokenizer, ids, mode, params, speculate=True)
        return last.generation
    (generation,) = generate_batch(loaded.model, loaded.tokenizer, [ids], mode, params)
    return generation


def prompt_ids(tok: Tokenizer, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a user's text or of messages, up to and including `<|assistant|>`. Raises ValueError for a blank text."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty; write something to reply to")
        prompt = [{"role": "user", "content": prompt}]
    return render_prompt(tok, prompt)
