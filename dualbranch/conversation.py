"""Several turns on one KV cache: each turn computes only what is new, whatever mode it is in.

The ids of a turn are an exact extension of the ids before it (generated ids are kept, never re-tokenised; reasoning stays in the
history), so the cache always holds a prefix of the next prompt. Slow rows of the cache serve every mode, fast rows serve fast and
auto: a turn with route slow recomputes from the first fast row on and so equals a cold slow run. Used by `infer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from dualbranch.cache import KVCache
from dualbranch.chat import render_prompt
from dualbranch.generate import Event, Generation, PromptTooLong, stream
from dualbranch.modes import Mode, default_mode, resolve, token_rules
from dualbranch.sampling import GREEDY, SamplingParams

if TYPE_CHECKING:
    from dualbranch.checkpoint import LoadedModel


class Conversation:
    """A conversation with one model; the mode and the sampling may change from turn to turn.

    `messages`: the turns so far, as `render_prompt` takes them, replies by their ids; `ids`: the same as tokens, all but the last few
    of which are cached. `n_reused` of the `n_prompt` tokens of the last turn's prompt came from the cache. One thread at a time.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forgets every turn, keeps the system message."""
        self.messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.ids: list[int] = []
        self.n_reused = self.n_prompt = 0
        self._cache: KVCache | None = None

    def send(self, text: str, mode: Mode | str | None = None, params: SamplingParams = GREEDY) -> Generation:
        """The reply to `text`, which becomes part of the conversation."""
        *_, last = self.stream(text, mode, params)
        return last.generation

    def stream(self, text: str, mode: Mode | str | None = None, params: SamplingParams = GREEDY) -> Iterator[Event]:
        """Events of the reply to `text`, as `generate.stream` gives them; `mode` as in `generate.generate`.

        Raises at once: ValueError for a blank text, PromptTooLong; the conversation is then as before. Close the iterator to stop
        a reply: what was generated so far stays, as a reply that was cut; if nothing was, the turn is forgotten.
        """
        if not text.strip():
            raise ValueError("the prompt is empty; write something to reply to")
        mode = resolve(default_mode(self.model.config.fast_only) if mode is None else mode)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = render_prompt(self.tokenizer, messages)
        assert prompt[: len(self.ids)] == self.ids, "a turn must extend the turns before it"
        max_seq_len = self.model.config.max_seq_len
        min_room = token_rules(self.tokenizer, self.model.config.vocab_size).min_room
        if len(prompt) + min_room > max_seq_len:
            raise PromptTooLong(len(prompt), max_seq_len, min_room)
        n_reused = 0 if self._cache is None else reusable(self._cache, mode.route)
        capacity = min(len(prompt) + params.max_tokens, max_seq_len)
        if self._cache is None:
            self._cache = self.model.new_cache(1, capacity)
        elif self._cache.capacity < capacity:
            self._cache = grown(self._cache, min(max(capacity, 2 * self._cache.capacity), max_seq_len))
        events = stream(self.model, self.tokenizer, prompt, mode, params, self._cache, n_reused)
        self.n_reused, self.n_prompt = n_reused, len(prompt)
        return self._record(events, messages, prompt)

    def _record(self, events: Iterator[Event], messages: list[dict[str, Any]], prompt: list[int]) -> Iterator[Event]:
        n_cached = self._cache.n_cached.clone()
        ids: list[int] = []
        try:
            for event in events:
                ids.append(event.token)
                yield event
        finally:  # also when closed or interrupted
            if ids:
                self.messages = [*messages, {"role": "assistant", "ids": ids}]
                self.ids = prompt + ids
                self._cache.truncate(len(self.ids) - 1)  # of held events some may never be taken
            else:
                self._cache.truncate(n_cached)


def reusable(cache: KVCache, route: str) -> int:
    """How many of the first tokens in `cache` (one row) serve `route`: all of them, but for slow only those before the first fast one."""
    n = int(cache.n_cached[0])
    if route != "slow":
        return n
    fast = (~cache.from_slow[0, :n]).nonzero()
    return int(fast[0]) if len(fast) else n


def grown(cache: KVCache, capacity: int) -> KVCache:
    """A cache of `capacity` tokens that holds what `cache` holds. Mutates nothing."""
    dtype, device = cache.k[0].dtype, cache.k[0].device
    out = KVCache(cache.config, cache.n_rows, capacity, dtype, device)
    with torch.inference_mode():
        for new, old in zip([*out.k, *out.v, *out.pooled.values()], [*cache.k, *cache.v, *cache.pooled.values()], strict=True):
            new[:, : old.shape[1]] = old
    out.from_slow[:, : cache.capacity] = cache.from_slow
    out.n_cached = cache.n_cached.clone()
    return out
