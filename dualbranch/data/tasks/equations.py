"""Linear equations in one unknown, over the integers. One in ten has no integer solution."""

from random import Random

from ..steps import Trace
from .base import NO_SOLUTION, Phrases, Task

PHRASES = Phrases(
    en=("Find the integer x: {e}.", "Solve {e} for an integer x.", "{e}. Which integer is x?"),
    zh=("求整数x：{e}。", "解方程{e}，x是整数。", "{e}，整数x是多少？"),
    new_en=("For which whole number x does {e} hold?",),
    new_zh=("x取哪个整数时{e}成立？",),
)
# largest x, largest constant
SIZES = {"easy": ((1, 12), (1, 30)), "medium": ((5, 60), (10, 200)), "hard": ((10, 150), (10, 400)), "numbers": ((200, 900), (500, 2000))}


def draw(rng: Random, level: str, lang: str, shift: str | None):
    xs, constants = SIZES["numbers" if shift == "numbers" else level]
    factor, x, b = rng.randint(2, 9), rng.randint(*xs), rng.randint(*constants)
    right = rng.randint(2, 9) if level == "hard" else 0  # factor * x = (factor + right) * x - right * x
    product = factor * x
    if shift == "unsolvable" or rng.random() < 0.1:
        product += rng.randint(1, factor - 1)
    minus = level != "easy" and b < product and rng.random() < 0.5
    constant = product - b if minus else product + b
    left = f"{factor + right}x {'-' if minus else '+'} {b}"
    equation = f"{left} = {right}x + {constant}" if right else f"{left} = {constant}"

    trace = Trace()
    if right:
        trace.sub(factor + right, right)
    difference = trace.add(constant, b) if minus else trace.sub(constant, b)
    trace.note(f"{factor}x={difference}")
    solution, rest = trace.divide(difference, factor)
    trace.note(f"{rest}>0 none" if rest else f"x={solution}")
    answer = NO_SOLUTION[lang] if rest else f"x = {solution}"
    return PHRASES.pick(rng, lang, shift).format(e=equation), answer, str(trace), equation.replace(" ", "")


TASK = Task("equations", ("numbers", "phrasing", "unsolvable"), draw)
