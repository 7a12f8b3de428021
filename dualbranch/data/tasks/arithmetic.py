"""Sums, differences, products, and quotients with remainder, of whole numbers."""

from random import Random

from ..steps import Trace
from .base import Phrases, Task

PHRASES = Phrases(
    en=("What is {e}?", "Compute {e}.", "{e} = ?", "Find the value of {e}."),
    zh=("{e}等于多少？", "计算{e}。", "{e} = ?", "求{e}的值。"),
    new_en=("Please work out {e} for me.", "How much do you get from {e}?"),
    new_zh=("请帮我算一下{e}。", "{e}的结果是几？"),
)
DIVISION = Phrases(
    en=("What is {e} with remainder?", "Compute {e}, quotient and remainder.", "Divide with remainder: {e}."),
    zh=("{e}的商和余数是多少？", "计算{e}，写出商和余数。", "做有余数的除法：{e}。"),
    new_en=("Please work out {e} and tell me what is left over.",),
    new_zh=("请帮我算一下{e}，商几余几？",),
)
# digits of the terms of a sum, how many terms, digits of the two factors, digits of the dividend
SIZES = {"easy": (2, 2, (2, 1), 2), "medium": (3, 2, (3, 1), 3), "hard": (4, 3, (3, 2), 4), "numbers": (5, 3, (4, 2), 5)}


def _number(rng: Random, n_digits: int) -> int:
    low = 10 ** (n_digits - 1)
    return rng.randrange(max(low, 2), 10 * low)


def draw(rng: Random, level: str, lang: str, shift: str | None):
    term_digits, n_terms, factor_digits, dividend_digits = SIZES["numbers" if shift == "numbers" else level]
    trace = Trace()
    kind = rng.choices(("sum", "product", "quotient"), (4, 3, 2))[0]
    if kind == "quotient":
        a, b = _number(rng, dividend_digits), rng.randint(2, 9)
        expression = f"{a} ÷ {b}"
        quotient, rest = trace.divide(a, b)
        answer = f"{quotient} r {rest}" if lang == "en" else f"{quotient}余{rest}"
        return DIVISION.pick(rng, lang, shift).format(e=expression), answer, str(trace), f"{a}÷{b}"
    if kind == "product":
        a, b = (_number(rng, n) for n in factor_digits)
        b += b % 10 == 0  # a factor such as 30 would be an easier problem
        expression, key = f"{a} × {b}", f"{min(a, b)}×{max(a, b)}"
        value = trace.mul(a, b)
    else:
        value = _number(rng, term_digits)
        expression, terms = str(value), [value]
        for _ in range(n_terms - 1):
            term = _number(rng, term_digits)
            if rng.random() < 0.5 and term <= value:
                expression, value = f"{expression} - {term}", trace.sub(value, term)
                terms.append(-term)
            else:
                expression, value = f"{expression} + {term}", trace.add(value, term)
                terms.append(term)
        key = "".join(f"{term:+d}" for term in sorted(terms))  # 2 + 3 and 3 + 2 share a split
    return PHRASES.pick(rng, lang, shift).format(e=expression), str(value), str(trace), key


TASK = Task("arithmetic", ("numbers", "phrasing", "numerals"), draw)
