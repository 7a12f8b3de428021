"""鸡兔同笼: two kinds of animals with 2 and 4 legs, heads and legs are counted. One in ten has no solution."""

from random import Random

from ..steps import Trace
from .base import NO_SOLUTION, Phrases, Task

PHRASES = Phrases(
    en=("A farm has {a} and {b}: {h} heads and {l} legs. How many of each?",
        "{h} heads and {l} legs in a cage of {a} and {b}. How many of each?",
        "There are {h} {a} and {b} with {l} legs in all. How many {a} and {b}?"),
    zh=("{a}{b}同笼，共{h}个头，{l}条腿。{a}和{b}各有多少只？", "笼子里有{a}和{b}，共{h}只，{l}条腿。{a}{b}各几只？",
        "有{a}和{b}共{h}只，腿共{l}条。{a}和{b}各有几只？"),
    new_en=("I counted {l} legs but only {h} heads among my {a} and {b}; tell me both numbers.",),
    new_zh=("从上面数有{h}个头，从下面数有{l}只脚，问{a}、{b}各几何？",),
)
PAIRS = ((("chickens", "rabbits"), ("鸡", "兔")), (("ducks", "cows"), ("鸭", "牛")), (("birds", "dogs"), ("鸟", "狗")))
NEW_PAIRS = ((("geese", "sheep"), ("鹅", "羊")), (("pigeons", "cats"), ("鸽子", "猫")), (("swans", "horses"), ("天鹅", "马")))
HEADS = {"easy": (3, 40), "medium": (30, 99), "hard": (100, 250), "numbers": (300, 999)}


def _impossible_legs(rng: Random, heads: int) -> int:
    """A number of legs that is odd, too small, or too large."""
    kind = rng.choice(("odd", "few", "many"))
    if kind == "odd":
        return 2 * rng.randrange(heads, 2 * heads) + 1
    if kind == "few":
        return 2 * rng.randrange(heads // 2, heads)
    return 2 * rng.randint(2 * heads + 1, 3 * heads)


def solve(heads: int, legs: int) -> tuple[int, int, str] | tuple[None, None, str]:
    """(two-legged, four-legged, trace), the first two None if there is no solution."""
    trace = Trace()
    trace.note(f"{legs}%2={legs % 2}")
    if legs % 2 == 0:
        base = trace.mul(heads, 2)  # legs if every animal had two
        if trace.compare(legs, base) != "<":
            fours, _ = trace.divide(trace.sub(legs, base), 2)
            if trace.compare(fours, heads) != ">":
                return trace.sub(heads, fours), fours, str(trace)
    trace.note("none")
    return None, None, str(trace)


def draw(rng: Random, level: str, lang: str, shift: str | None):
    heads = rng.randint(*HEADS["numbers" if shift == "numbers" else level])
    legs = 2 * heads + 2 * rng.randint(1, heads - 1)
    if shift == "unsolvable" or rng.random() < 0.1:
        legs = _impossible_legs(rng, heads)
    a, b = rng.choice(NEW_PAIRS if shift == "entities" else PAIRS)[lang == "zh"]
    twos, fours, trace = solve(heads, legs)
    if twos is None:
        answer = NO_SOLUTION[lang]
    else:
        answer = f"{a} {twos}, {b} {fours}" if lang == "en" else f"{a}{twos}只，{b}{fours}只"
    return PHRASES.pick(rng, lang, shift).format(a=a, b=b, h=heads, l=legs), answer, trace, f"{heads}|{legs}"


TASK = Task("chickens_rabbits", ("numbers", "entities", "phrasing", "numerals", "unsolvable"), draw)
