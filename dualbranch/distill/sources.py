"""Training batches as pure functions of (seed, step): nothing to save, and a resumed run sees exactly the batches it would have seen."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Sequence

from torch.utils.data import DataLoader

from dualbranch.chat import render_conversation
from dualbranch.data import corpora
from dualbranch.data.packing import Example, Rows, pack
from dualbranch.data.problem import LANGS, LEVELS, Problem, sample_problem, split_of
from dualbranch.data.reasoning_gym import reasoning_gym_problems
from dualbranch.data.tasks import TASKS
from dualbranch.data.text import load_examples, windows
from dualbranch.distill.config import DataConfig
from dualbranch.tokenizer import Tokenizer

#: Weight of the decision token's loss; a document has one of them among about eighty others.
DECISION_WEIGHT = 4.0


@functools.lru_cache(maxsize=4)
def text_documents(tok: Tokenizer, paths: tuple[str, ...], names: tuple[str, ...], split: str, seq_len: int) -> list[Example]:
    """The user's text and the named corpora as documents that fit a row. The user's own text has no test split: its held-out part serves for both."""
    own = "train" if split == "train" else "valid"
    given = list(load_examples(tok, paths, own, seq_len)) if paths else []
    documents = [d for d in given if len(d[0]) <= seq_len]
    if n_long := len(given) - len(documents):
        told = f"{n_long} of {len(given)} conversations of the {own} text are longer than data.seq_len = {seq_len} tokens"
        if not documents and own == "train":  # held-out text may be empty
            raise ValueError(f"{told}; raise it")
        warnings.warn(f"{told} and left out", stacklevel=2)
    for name in names:
        documents += [window for text in corpora.load_corpus(name, split) for window in windows(tok, text, seq_len)]
    return documents


class BatchSource:
    """Packed rows of generated problems and, if configured, of text: the user's, or corpora known by name.

    With `text_share` 1 there are no problems at all: the text is packed once, and every row is seen once before one is seen again.

    `align` is the model's selection block size. `skip`: so many rows of text, in the order they are read, are left out. `needs_thinking`, once
    the teacher has assessed itself, makes half of the documents labelled problems whose decision token counts in the loss.
    """

    def __init__(self, config: DataConfig, tok: Tokenizer, seed: int, align: int, split: str = "train", skip: int = 0) -> None:
        self.config, self.tok, self.seed, self.align, self.split, self.skip = config, tok, seed, align, split, skip
        self.tasks, self.langs = list(config.tasks) or list(TASKS), config.langs or LANGS
        self.needs_thinking: Sequence[bool] = ()
        self.keys: set[str] | None = None  # of the problems drawn, while somebody wants to know (`keys_seen`)
        gym = (p for name in config.reasoning_gym for p in reasoning_gym_problems(name, config.reasoning_gym_size))
        self.gym = [render_conversation(tok, [p], [False]) for p in gym if split_of(p.key) == split]
        self.documents = text_documents(tok, config.text, config.corpora, split, config.seq_len) if config.text_share else []
        solutions = load_examples(tok, config.solutions, "all", config.seq_len) if config.solutions and split == "train" else ()
        self.solutions = [s for s in solutions if len(s[0]) <= config.seq_len]
        if not config.has_problems and not self.documents:
            raise ValueError(f"no document falls into the text's {split} split (by its hash); add more text, or set data.text_share below 1")

    def problem(self, rng: random.Random, progress: float = 1.0) -> Problem:
        """One problem, its level drawn from the curriculum at `progress` in [0, 1] of the training."""
        c = self.config
        done = min(1.0, progress / c.curriculum) if c.curriculum else 1.0
        weights = [a + (b - a) * done for a, b in zip(c.levels_start, c.levels_end, strict=True)]
        level = rng.choices(LEVELS, weights)[0]
        problem = sample_problem(rng, rng.choice(self.tasks), level, rng.choice(self.langs), self.split)
        if self.keys is not None:
            self.keys.add(problem.key)
        return problem

    def assessed_problem(self, i: int) -> Problem:
        """The i-th problem the teacher assesses itself on: always the same, always from the training split."""
        rng = random.Random(f"assess:{self.seed}:{i}")
        return sample_problem(rng, self.tasks[i % len(self.tasks)], rng.choice(LEVELS), rng.choice(self.langs), "train")

    def example(self, rng: random.Random, progress: float = 1.0) -> tuple[list[int], list[float]]:
        """One document: ids and the loss weight of predicting each."""
        c = self.config
        if self.documents and rng.random() < c.text_share:
            return rng.choice(self.documents)
        if self.gym and rng.random() < c.reasoning_gym_share:
            return rng.choice(self.gym)
        if self.needs_thinking and rng.random() < 0.5:
            i = rng.randrange(len(self.needs_thinking))
            return render_conversation(self.tok, [self.assessed_problem(i)], [self.needs_thinking[i]], DECISION_WEIGHT, c.answer_weight)
        if self.solutions:
            if rng.random() < c.thinking:
                return rng.choice(self.solutions)
            return render_conversation(self.tok, [self.problem(rng, progress)], [False], answer_weight=c.answer_weight)
        n_turns = rng.choice((2, 3)) if rng.random() < c.multi_turn else 1
        problems = [self.problem(rng, progress) for _ in range(n_turns)]
        return render_conversation(self.tok, problems, [rng.random() < c.thinking for _ in problems], answer_weight=c.answer_weight)

    def keys_seen(self, n_steps: int, first_decision: int, needs_thinking: Sequence[bool]) -> set[str]:
        """Keys of the generator's problems in all batches of a teacher's training of `n_steps`, which from step `first_decision` on has assessed itself."""
        self.keys = seen = {self.assessed_problem(i).key for i in range(len(needs_thinking))}
        for step in range(n_steps):
            self.needs_thinking = needs_thinking if step >= first_decision else ()
            self.batch(step, progress=step / n_steps)
        self.keys = None
        return seen

    def batch(self, step: int, progress: float = 1.0, n_rows: int | None = None) -> Rows:
        """`n_rows` (default `batch_rows`) packed rows; the same step gives the same rows."""
        rng = random.Random(f"{self.seed}:{self.split}:{step}")
        n_rows, length = n_rows or self.config.batch_rows, self.config.seq_len
        if not self.config.has_problems:
            return self.text_rows(self.skip + step * n_rows, n_rows)
        examples, filled, too_long = [], 0, 0
        while filled < n_rows * -(-length // self.align) * self.align:
            ids, weights = self.example(rng, progress)
            if len(ids) <= length:
                examples.append((ids, weights))
                filled += -(-len(ids) // self.align) * self.align
                continue
            too_long += 1
            if too_long > 100 and too_long > len(examples):
                raise ValueError(f"most documents are longer than data.seq_len = {length} tokens (the last has {len(ids)}); raise it")
        return pack(examples, length, self.align, self.tok.pad_id).map(lambda x: x[:n_rows])


    @functools.cached_property
    def packed(self) -> Rows:
        """All text, packed once; which windows share a row depends on the seed."""
        documents = list(self.documents)
        random.Random(f"{self.seed}:{self.split}:pack").shuffle(documents)
        return pack(documents, self.config.seq_len, self.align, self.tok.pad_id)

    def text_rows(self, first: int, n: int) -> Rows:
        """Rows `[first, first + n)` of an endless sequence in which every epoch is another order of all rows."""
        index, size = [], len(self.packed)
        for epoch in range(first // size, (first + n - 1) // size + 1):
            order = list(range(size))
            random.Random(f"{self.seed}:{self.split}:epoch {epoch}").shuffle(order)
            index += order[max(0, first - epoch * size) : first + n - epoch * size]
        return self.packed.map(lambda x: x[index])


class Prefetcher:
    """`batch(step)`, prepared ahead by `workers` processes. Batches depend on the step alone, so nothing else changes.

    Call `restart` after a change that the processes must see.
    """

    def __init__(self, batch: Callable[[int], Rows], n_steps: int, workers: int) -> None:
        self.batch, self.n_steps, self.workers = batch, n_steps, workers
        self.restart()

    def restart(self) -> None:
        self.next, self.ahead = -1, iter(())

    def __call__(self, step: int) -> Rows:
        if not self.workers:
            return self.batch(step)
        if step != self.next:
            steps = range(step, self.n_steps)
            self.ahead = iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=self.workers, prefetch_factor=4, multiprocessing_context="fork"))
        self.next = step + 1
        return next(self.ahead)

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> Rows:
        return self.batch(step)
