"""Order: larger or smaller of two, extremes, sorted lists, k-th in order. All numbers of a problem differ.

The trace inserts one number after the other, `x:list so far`, so that each step only compares pairs:
`asc 347;92:92 347;815:92 347 815`. For an extreme the list keeps its first element only.
"""

from bisect import insort
from random import Random

from .base import Phrases, Task

PHRASES = {
    "min": Phrases(
        en=("Which is the smallest: {x}?", "Find the smallest number: {x}.", "Give the smallest of {x}."),
        zh=("哪个数最小：{x}？", "找出最小的数：{x}。", "{x}中最小的数是几？"),
        new_en=("Among {x}, tell me which number comes lowest.",), new_zh=("下面的数里谁最小？{x}",)),
    "max": Phrases(
        en=("Which is the largest: {x}?", "Find the largest number: {x}.", "Give the largest of {x}."),
        zh=("哪个数最大：{x}？", "找出最大的数：{x}。", "{x}中最大的数是几？"),
        new_en=("Among {x}, tell me which number comes highest.",), new_zh=("下面的数里谁最大？{x}",)),
    "asc": Phrases(
        en=("Sort from small to large: {x}.", "Sort the numbers {x} in ascending order.", "Put in order, smallest first: {x}."),
        zh=("从小到大排列：{x}。", "把{x}从小到大排序。", "按从小到大的顺序写出：{x}。"),
        new_en=("Please line up {x} so that they grow.",), new_zh=("请将下列数由小到大排好：{x}",)),
    "desc": Phrases(
        en=("Sort from large to small: {x}.", "Sort the numbers {x} in descending order.", "Put in order, largest first: {x}."),
        zh=("从大到小排列：{x}。", "把{x}从大到小排序。", "按从大到小的顺序写出：{x}。"),
        new_en=("Please line up {x} so that they shrink.",), new_zh=("请将下列数由大到小排好：{x}",)),
    "kth asc": Phrases(
        en=("Which is the {k} smallest: {x}?", "Find the {k} smallest number: {x}."),
        zh=("哪个数第{k}小：{x}？", "找出第{k}小的数：{x}。"),
        new_en=("Counting from the lowest, which is the {k} of {x}?",), new_zh=("由小到大数，{x}里第{k}个是几？",)),
    "kth desc": Phrases(
        en=("Which is the {k} largest: {x}?", "Find the {k} largest number: {x}."),
        zh=("哪个数第{k}大：{x}？", "找出第{k}大的数：{x}。"),
        new_en=("Counting from the highest, which is the {k} of {x}?",), new_zh=("由大到小数，{x}里第{k}个是几？",)),
}
ORDINALS = {2: "2nd", 3: "3rd", 4: "4th"}
# level: (operations, how many numbers, largest number)
SIZES = {
    "easy": (("min", "max", "min", "max", "asc", "desc"), (2, 3), 999),
    "medium": (("min", "max", "asc", "desc", "kth asc", "kth desc"), (4, 5), 999),
    "hard": (("asc", "desc", "asc", "desc", "kth asc", "kth desc"), (6, 7), 999),
    "numbers": (("asc", "desc", "kth asc", "kth desc"), (5, 7), 9999),
}


def _numbers(rng: Random, count: int, largest: int) -> list[int]:
    """Different numbers, some short, some close to each other so that the first digits decide nothing."""
    numbers: list[int] = []
    while len(numbers) < count:
        digits = rng.choice((len(str(largest)) - 1, len(str(largest)), len(str(largest))))
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if numbers and rng.random() < 0.3:
            near = rng.choice(numbers)
            number = near - near % 10 + number % 10
        if number not in numbers:
            numbers.append(number)
    return numbers


def draw(rng: Random, level: str, lang: str, shift: str | None):
    operations, (fewest, most), largest = SIZES["numbers" if shift == "numbers" else level]
    operation = rng.choice(operations)
    numbers = _numbers(rng, rng.randint(fewest, most), largest)
    down = operation in ("max", "desc", "kth desc")
    keep = 1 if operation in ("min", "max") else len(numbers)
    order: list[int] = []
    steps = []
    for number in numbers:
        insort(order, number, key=(lambda x: -x) if down else None)
        del order[keep:]
        state = " ".join(map(str, order))
        steps.append(f"{number}:{state}" if steps else state)
    trace = f"{operation.split()[-1]} {';'.join(steps)}"
    k, asked = "", operation
    if operation.startswith("kth"):
        rank = rng.randint(2, min(4, len(numbers) - 1))
        trace += "".join(f" #{i + 1} {order[i]}" for i in range(rank))
        answer, asked = str(order[rank - 1]), f"{operation}{rank}"
        k = ORDINALS[rank] if lang == "en" else str(rank)
    else:
        answer = ", ".join(map(str, order))
    listed = ", ".join(map(str, numbers)) if lang == "en" else "、".join(map(str, numbers))
    prompt = PHRASES[operation].pick(rng, lang, shift).format(x=listed, k=k)
    return prompt, answer, trace, f"{asked}|{','.join(map(str, sorted(numbers)))}"


TASK = Task("sorting", ("numbers", "phrasing", "numerals"), draw)
