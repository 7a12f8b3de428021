"""What a task is: the types every file of this folder uses. Knows nothing of splits or of other tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .numerals import spell_numbers

LEVELS = ("easy", "medium", "hard")
LANGS = ("en", "zh")
SHIFTS = ("numbers", "entities", "phrasing", "numerals", "unsolvable")
NO_SOLUTION = {"en": "no solution", "zh": "无解"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its exact answer and a worked trace ("" if the source has none)."""

    task: str
    level: str
    lang: str
    prompt: str
    answer: str
    trace: str
    key: str  # the content, independent of language and phrasing; decides the split
    shift: str | None = None


@dataclass(frozen=True)
class Phrases:
    """Templates per language; those of `new_*` appear only under the "phrasing" shift."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    new_en: tuple[str, ...]
    new_zh: tuple[str, ...]

    def pick(self, rng: Random, lang: str, shift: str | None) -> str:
        return rng.choice(getattr(self, f"new_{lang}" if shift == "phrasing" else lang))


# (rng, level, lang, shift) -> (prompt, answer, trace, key without the task's name)
Draw = Callable[[Random, str, str, str | None], tuple[str, str, str, str]]


@dataclass(frozen=True)
class Task:
    """A family of problems. `shifts` names the changes it can be tested under, which training never sees."""

    name: str
    shifts: tuple[str, ...]
    draw: Draw

    def make(self, rng: Random, level: str, lang: str, shift: str | None = None) -> Problem:
        """One random problem of any split. ValueError names the valid levels, languages or shifts."""
        check_choice("level", level, LEVELS)
        check_choice("lang", lang, LANGS)
        if shift is not None:
            check_choice(f"shift of task {self.name!r}", shift, self.shifts)
        prompt, answer, trace, key = self.draw(rng, level, lang, shift)
        if shift == "numerals":
            prompt = spell_numbers(prompt, lang)
        return Problem(self.name, level, lang, prompt, answer, trace, f"{self.name}|{key}", shift)


def check_choice(what: str, got: str, valid) -> None:
    if got not in valid:
        raise ValueError(f"unknown {what}: {got!r}; valid: {', '.join(valid)}")
