"""Numbers in words, for the "numerals" shift: 35 -> thirty-five / 三十五."""

import re

_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
          "sixteen seventeen eighteen nineteen").split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_HAN = "零一二三四五六七八九"
_NUMBER = re.compile(r"(?<![\d:])\d+(?![\d:a-z])")  # neither clock times nor "2nd"
_TWO_OF = re.compile(r"(?<![\d第])2(?=个)")


def english(n: int) -> str:
    """n in words, for 0 <= n < 1,000,000."""
    if n < 20:
        return _SMALL[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    unit, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = divmod(n, unit)
    return f"{english(head)} {word}" + (f" {english(rest)}" if rest else "")


def chinese(n: int) -> str:
    """n in Chinese numerals, for 0 <= n < 100,000,000."""
    if n < 10:
        return _HAN[n]
    for unit, word in ((10_000, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= unit:
            head, rest = divmod(n, unit)
            gap = "零" if rest and rest < unit // 10 else ""
            tail = chinese(rest) if rest else ""
            if unit > 10 and 10 <= rest < 20:
                tail = "一" + tail  # 一百一十五, but 十五
            return ("" if unit == 10 and head == 1 else chinese(head)) + word + gap + tail


def spell_numbers(text: str, lang: str) -> str:
    """`text` with each plain integer written in words; two things are 两个 in Chinese, the second is 第二个."""
    if lang == "en":
        return _NUMBER.sub(lambda match: english(int(match[0])), text)
    return _NUMBER.sub(lambda match: chinese(int(match[0])), _TWO_OF.sub("两", text))
