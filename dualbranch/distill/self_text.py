"""Text that a teacher writes itself: calibration and healing data that needs no corpus, and is of the kind the teacher knows. `data.self_text` tokens of it.

Documents are sampled at temperature 1 from the token that begins one and a short opening, many rows at once; a row whose document ended begins another. Each
round is a `.jsonl` file in the run's folder `self_text/`, written whole and a function of the seed and its number: a run cut short goes on with the next
round. From there it is text like the user's own (data/text.py): split by document, packed, seen in every epoch.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dualbranch.checkpoint import write_text
from dualbranch.distill import dist
from dualbranch.distill.config import RunConfig
from dualbranch.model import DualBranchModel
from dualbranch.sampling import draw
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
    target, per_round = folder / "self_text", N_ROWS * config.data.seq_len
    if dist.rank() == 0:
        console, n_rounds, started = Console(stderr=True), -(-config.data.self_text // per_round), time.perf_counter()
        writer = fast_copy(teacher)
        todo = [i for i in range(n_rounds) if not (target / f"{i:05d}.jsonl").exists()]
        for done, i in enumerate(todo, start=1):
            documents = sample_documents(writer, tok, N_ROWS, config.data.seq_len, seed=config.seed * 1_000_003 + i)
            write_text(target / f"{i:05d}.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
            rate = done * per_round / (time.perf_counter() - started)
            left = (len(todo) - done) * per_round / rate
            console.print(f"self_text: round {i + 1} of {n_rounds}, {rate:,.0f} tokens/s, {left:,.0f} s left", highlight=False)
    dist.barrier()
    return replace(config, data=replace(config.data, text=(*config.data.text, str(target))))


def fast_copy(model: DualBranchModel) -> DualBranchModel:
    """`model` to sample from, rounded to bf16 where the device has units for it: 2.7 times as fast there. Elsewhere itself."""
    return copy.deepcopy(model).bfloat16() if has_bf16_units(model.device) else model


@torch.inference_mode()
def sample_documents(model: DualBranchModel, tok: TokenizerBase, n_rows: int, seq_len: int, seed: int) -> list[str]:
    """Documents of up to `seq_len` tokens that `model` writes on route slow, temperature 1: what `n_rows` rows come to in `seq_len` steps. The last of each
    row is cut where the steps end. The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ends[tok.vocab_size :] = True
    ends[list(tok.control.values())] = True
    openings = [[tok.bos_id, *(tok.encode(text) if text else [])] for text in OPENINGS]
    cache = model.new_cache(n_rows, seq_len)
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    waiting: list[list[int]] = [[] for _ in range(n_rows)]  # of an opening, what is still to be read
    texts: list[str] = []

    def finish(row: int) -> None:
        if len(rows[row]) > SHORTEST:
            texts.append(tok.decode(rows[row]))
        opening = openings[int(torch.randint(len(openings), (), generator=generator))]
        rows[row], waiting[row] = opening[:1], opening[1:]

    for row in range(n_rows):
        finish(row)
    for _ in range(seq_len):
        newest = torch.tensor([row[-1:] for row in rows], device=model.device)
        probs = model(newest, "slow", cache=cache).logits[:, 0].double().softmax(-1)
        chosen = draw(probs, torch.rand(n_rows, dtype=torch.float64, generator=generator)).tolist()
        kept = cache.n_cached.clone()
        for row, token in enumerate(chosen):
            if waiting[row]:
                rows[row].append(waiting[row].pop(0))
            elif ends[token] or len(rows[row]) == seq_len:
                finish(row)
                kept[row] = 0
            else:
                rows[row].append(token)
        cache.truncate(kept)
    for row in range(n_rows):
        finish(row)
    return texts
