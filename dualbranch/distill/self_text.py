"""Text that a teacher writes itself: calibration and healing data that needs no corpus, and is of the kind the teacher knows. `data.self_text` tokens of it.

Documents are sampled at temperature 1 from the token that begins one and a short opening, many rows at once; a row whose document ended begins another. Half
of those of a model that chats are conversations, for which it writes both the user's words and its reply (the way of Magpie, Xu et al. 2024): a model healed on
plain text alone does not answer (docs/experiments.md). Each round is a `.jsonl` file in the run's folder `self_text/`, written whole and a function of the seed
and its number: a run cut short goes on with the next round. From there it is text like the user's own (data/text.py): split by document, packed, seen in every
epoch.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from dualbranch.chat import chat_format, render_prompt
from dualbranch.distill import dist
from dualbranch.distill.config import RunConfig
from dualbranch.model import DualBranchModel
from dualbranch.sampling import draw
from dualbranch.storage import write_text
from dualbranch.tokenizer import TokenizerBase
from kernels import has_bf16_units

#: Rows sampled at once.
N_ROWS = 32
#: What documents begin with; each as often as the others.
OPENINGS = ("", "The", "In", "How", "A", "What is", "There", "I", "One", "Why", "When", "This", "#", "It", "1.", "We")
#: Fewer tokens are no document.
SHORTEST = 16


def with_self_text(config: RunConfig, folder: Path, teacher: DualBranchModel, tok: TokenizerBase) -> RunConfig:
    """`config` with the teacher's own text among its `data.text`, sampled into `folder` where that is not done yet. Collective."""
    if not config.data.self_text:
        return config
    target, per_round = folder / config.self_text_folder.name, N_ROWS * config.data.seq_len
    if dist.rank() == 0:
        console, n_rounds, started = Console(stderr=True), -(-config.data.self_text // per_round), time.perf_counter()
        writer = fast_copy(teacher)
        todo = rounds_to_write(target, n_rounds)
        for done, i in enumerate(todo, start=1):
            write_round(target, i, sample_documents(writer, tok, N_ROWS, config.data.seq_len, seed=config.seed * 1_000_003 + i))
            rate = done * per_round / (time.perf_counter() - started)
            left = (len(todo) - done) * per_round / rate
            console.print(f"self_text: round {i + 1} of {n_rounds}, {rate:,.0f} tokens/s, {left:,.0f} s left", highlight=False)
    dist.barrier()
    return replace(config, data=replace(config.data, text=(*config.data.text, str(target))))


def rounds_to_write(folder: Path, n: int) -> list[int]:
    """Those of a run's `n` rounds that aren't in `folder` yet."""
    return [i for i in range(n) if not round_file(folder, i).exists()]


def write_round(folder: Path, i: int, lines: Iterable[dict]) -> None:
    """Round `i` as a file of `folder`, whole or not at all."""
    write_text(round_file(folder, i), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def round_file(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.jsonl"


def fast_copy(model: DualBranchModel) -> DualBranchModel:
    """`model` to sample from, rounded to bf16 where the device has units for it: 2.7 times as fast there. Elsewhere itself."""
    return copy.deepcopy(model).bfloat16() if has_bf16_units(model.device) else model


@dataclass
class _Draft:
    """A document being written. `ids`: all of it so far; `waiting`: of an opening, what is still to be read; `turns`: the user's words, then the reply's, of a
    conversation; `closing`: what stands between them."""

    ids: list[int]
    waiting: list[int]
    turns: list[list[int]] = field(default_factory=list)
    closing: list[int] = field(default_factory=list)

    def write(self, token: int) -> None:
        self.ids.append(token)
        if self.turns:
            self.turns[-1].append(token)

    def asked(self) -> bool:
        """Whether the user's words stand, and the reply has not begun."""
        return len(self.turns) == 1 and len(self.turns[0]) > 0

    def document(self, tok: TokenizerBase) -> dict | None:
        """As a line of a `.jsonl` file of text; None where it is too short for one."""
        if len(self.turns) == 1 or not all(self.turns) or len(self.ids) <= SHORTEST:
            return None
        if not self.turns:
            return {"text": tok.decode(self.ids)}
        user, reply = (tok.decode(turn) for turn in self.turns)
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]} if user.strip() and reply.strip() else None


def openings_of(tok: TokenizerBase) -> list[_Draft]:
    """What documents begin with, each as often as the others."""
    texts = [_Draft([tok.bos_id], tok.encode(text) if text else []) for text in OPENINGS]
    f = chat_format(tok)
    if f.name == "plain":
        return texts
    asks = render_prompt(tok, [{"role": "user", "content": ""}])
    n_closing = len(f.end) + len(f.assistant.ids) + len(tok.encode(f.assistant.text))
    first, *rest = asks[:-n_closing]
    closing = [*asks[-n_closing:], *(f.thinking.skip if f.thinking else ())]
    return texts + len(texts) * [_Draft([first], rest, [[]], closing)]


@torch.inference_mode()
def sample_documents(model: DualBranchModel, tok: TokenizerBase, n_rows: int, seq_len: int, seed: int) -> list[dict]:
    """Documents of up to `seq_len` tokens that `model` writes on route slow, temperature 1: what `n_rows` rows come to in `seq_len` steps. The last of each
    row is cut where the steps end. The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ends[tok.vocab_size :] = True
    ends[list(tok.control.values())] = True
    openings = openings_of(tok)
    cache = model.new_cache(n_rows, seq_len)
    documents: list[dict | None] = []

    def opening() -> _Draft:
        return copy.deepcopy(openings[int(torch.randint(len(openings), (), generator=generator))])

    drafts = [opening() for _ in range(n_rows)]
    for _ in range(seq_len):
        newest = torch.tensor([draft.ids[-1:] for draft in drafts], device=model.device)
        probs = model(newest, "slow", cache=cache).logits[:, 0].double().softmax(-1)
        chosen = draw(probs, torch.rand(n_rows, dtype=torch.float64, generator=generator)).tolist()
        kept = cache.n_cached.clone()
        for row, token in enumerate(chosen):
            draft = drafts[row]
            if draft.waiting and len(draft.ids) < seq_len:
                draft.ids.append(draft.waiting.pop(0))
            elif ends[token] and draft.asked() and len(draft.ids) < seq_len:
                draft.waiting, draft.turns = [*draft.closing], [*draft.turns, []]
                draft.ids.append(draft.waiting.pop(0))
            elif ends[token] or len(draft.ids) == seq_len:
                documents.append(draft.document(tok))
                drafts[row], kept[row] = opening(), 0
            else:
                draft.write(token)
        cache.truncate(kept)
    return [d for d in (*documents, *(draft.document(tok) for draft in drafts)) if d is not None]
