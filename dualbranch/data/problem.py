"""Problems to train and test on: draw one from a split, verify an answer.

Called by the tokenizer's and the trainer's data streams and by the evaluation. Rendering to tokens is the chat format's.
"""

import json
import re
from hashlib import blake2b
from random import Random

from .tasks import TASKS
from .tasks.base import LANGS, LEVELS, SHIFTS, Problem, Task, check_choice

__all__ = ["LANGS", "LEVELS", "SHIFTS", "SPLITS", "TASKS", "Problem", "Task", "sample_problem", "split_of", "verify"]

SPLITS = ("train", "valid", "test")
_HALF_WIDTH = {0x3000: " ", **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}}
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_N_DRAWS = 2000  # a split holds at least 1 in 20 keys: running out of draws means that a task is broken


def split_of(key: str) -> str:
    """The split that owns a key: train 90 %, valid 5 %, test 5 %, the same in every process and version."""
    slot = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    return "train" if slot < 90 else "valid" if slot < 95 else "test"


def sample_problem(rng: Random, task: str, level: str, lang: str, split: str, shift: str | None = None) -> Problem:
    """A random problem whose key lies in `split`. ValueError names the valid choices."""
    check_choice("task", task, TASKS)
    check_choice("split", split, SPLITS)
    for _ in range(_N_DRAWS):
        problem = TASKS[task].make(rng, level, lang, shift)
        if split_of(problem.key) == split:
            return problem
    raise RuntimeError(f"task {task!r} ({level}, shift {shift}) gave no key of split {split!r} in {_N_DRAWS} draws")


def verify(problem: Problem, text: str) -> bool:
    """Whether `text` is the problem's answer: equal JSON for JSON objects, else equal up to spaces and full-width forms.

    Never raises; anything unreadable is just wrong.
    """
    if not isinstance(text, str):
        return False
    if problem.answer.startswith("{"):
        try:
            wanted = _typed(json.loads(problem.answer))
        except (ValueError, RecursionError):  # a set, say: {1, 2}
            return _plain(text) == _plain(problem.answer)
        try:
            return _typed(json.loads(text)) == wanted
        except (ValueError, RecursionError):
            return False
    return _plain(text) == _plain(problem.answer)


def _plain(text: str) -> str:
    """Half-width, with spaces only between two letters or digits ("4 2" isn't "42")."""
    return _LOOSE_SPACE.sub("", " ".join(text.translate(_HALF_WIDTH).split()))


def _typed(value):
    """JSON with types made visible, since Python holds 1 == True == 1.0."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return type(value).__name__, value
