"""Totals and change. Easy: one product or one sum; medium: two items, several of each; hard: the change as well."""

from random import Random

from ..steps import Trace
from .base import Phrases, Task
from .words import draw_words, in_lang

ONE = Phrases(
    en=("A {a} costs {p} dollars. {w} buys {n} {a}s. What is the total?", "{w} buys {n} {a}s at {p} dollars each. What is the total?",
        "How many dollars are {n} {a}s at {p} dollars each?"),
    zh=("一个{a}{p}元，{w}买了{n}个，一共多少元？", "{w}买{n}个{a}，每个{p}元，一共多少元？", "{a}每个{p}元，{n}个多少元？"),
    new_en=("{w} takes {n} {a}s, paying {p} dollars for each one. How much is that?",),
    new_zh=("{w}拿了{n}个{a}，单价{p}元，要付多少钱？",),
)
PAIR = Phrases(
    en=("A {a} costs {p} dollars and a {b} costs {q} dollars. What is the total?", "{w} buys a {a} for {p} dollars and a {b} for {q} dollars. What is the total?"),
    zh=("一个{a}{p}元，一个{b}{q}元，一共多少元？", "{w}买了一个{a}{p}元，一个{b}{q}元，一共多少元？"),
    new_en=("{w} paid {p} dollars for a {a}, then {q} dollars for a {b}. How much was spent?",),
    new_zh=("{w}先花{p}元买{a}，又花{q}元买{b}，总共花了多少钱？",),
)
BASKET = Phrases(
    en=("{w} buys {n} {a}s at {p} dollars each and {m} {b}s at {q} dollars each. What is the total?",
        "A {a} costs {p} dollars and a {b} costs {q} dollars. {w} buys {n} {a}s and {m} {b}s. What is the total?"),
    zh=("{w}买{n}个{a}，每个{p}元，又买{m}个{b}，每个{q}元，一共多少元？", "一个{a}{p}元，一个{b}{q}元。{w}买了{n}个{a}和{m}个{b}，一共多少元？"),
    new_en=("{n} {a}s at {p} dollars apiece and {m} {b}s at {q} dollars apiece go into the basket of {w}. How much is that?",),
    new_zh=("{w}的篮子里有{n}个{a}（单价{p}元）和{m}个{b}（单价{q}元），要付多少钱？",),
)
CHANGE = Phrases(
    en=("{w} buys {n} {a}s at {p} dollars each and {m} {b}s at {q} dollars each and pays {c} dollars. What is the change?",
        "A {a} costs {p} dollars and a {b} costs {q} dollars. {w} buys {n} {a}s and {m} {b}s and pays {c} dollars. What is the change?"),
    zh=("{w}买{n}个{a}，每个{p}元，又买{m}个{b}，每个{q}元，付了{c}元，找回多少元？", "一个{a}{p}元，一个{b}{q}元。{w}买了{n}个{a}和{m}个{b}，付了{c}元，找回多少元？"),
    new_en=("After giving {c} dollars for {n} {a}s at {p} dollars apiece and {m} {b}s at {q} dollars apiece, how much does {w} get back?",),
    new_zh=("{w}拿{c}元去买{n}个{a}（单价{p}元）和{m}个{b}（单价{q}元），还剩多少钱？",),
)
PRICES = {"easy": (3, 60), "medium": (3, 60), "hard": (11, 99), "numbers": (101, 499)}


def draw(rng: Random, level: str, lang: str, shift: str | None):
    prices = PRICES["numbers" if shift == "numbers" else level]
    p, q, n, m = rng.randint(*prices), rng.randint(*prices), rng.randint(2, 9), rng.randint(2, 9)
    a, b = (in_lang(item, lang) for item in draw_words(rng, "item", 2, shift))
    (who,) = draw_words(rng, "name", 1, shift)
    trace, paid = Trace(), 0
    if level == "easy" and rng.random() < 0.5:
        phrases, key, value = ONE, f"{n}*{p}", trace.mul(p, n)
    elif level == "easy":
        phrases, key, value = PAIR, f"{min(p, q)}+{max(p, q)}", trace.add(p, q)
    else:
        phrases, key = BASKET, "+".join(sorted((f"{n}*{p}", f"{m}*{q}")))
        value = trace.add(trace.mul(p, n), trace.mul(q, m))
        if level == "hard":
            note = rng.choice((100, 500))
            paid = (value // note + 1) * note
            phrases, key, value = CHANGE, f"{paid}-({key})", trace.sub(paid, value)
    prompt = phrases.pick(rng, lang, shift).format(a=a, b=b, w=in_lang(who, lang), n=n, m=m, p=p, q=q, c=paid)
    return prompt, str(value), str(trace), key


TASK = Task("shopping", ("numbers", "entities", "phrasing", "numerals"), draw)
