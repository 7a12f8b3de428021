"""Clock times, days of the week, dates (within one year that isn't a leap year)."""

from random import Random

from ..steps import Trace
from .base import Phrases, Task

LATER = Phrases(
    en=("It is {t}. What time is it {n} minutes later?", "What time is {n} minutes after {t}?", "A train leaves at {t} and rides {n} minutes. When does it arrive?"),
    zh=("现在是{t}，{n}分钟后是几点？", "{t}再过{n}分钟是几点？", "火车{t}出发，行驶{n}分钟，几点到达？"),
    new_en=("The film starts at {t} and runs for {n} minutes; when is it over?",),
    new_zh=("电影{t}开始，长{n}分钟，几点结束？",),
)
BETWEEN = Phrases(
    en=("How many minutes are there from {t} to {u}?", "It is {t}. How many minutes until {u}?", "A train leaves at {t} and arrives at {u}. How many minutes is that?"),
    zh=("从{t}到{u}有多少分钟？", "现在是{t}，到{u}还有多少分钟？", "火车{t}出发，{u}到达，一共多少分钟？"),
    new_en=("The film starts at {t} and is over at {u}; how many minutes does it run?",),
    new_zh=("电影{t}开始，{u}结束，片长几分钟？",),
)
WEEKDAY = Phrases(
    en=("Today is {d}. What day is it {n} days later?", "What day of the week is {n} days after {d}?", "If today is {d}, which day is it in {n} days?"),
    zh=("今天是{d}，{n}天后是星期几？", "{d}再过{n}天是星期几？", "如果今天是{d}，过{n}天是星期几？"),
    new_en=("{n} days have passed since {d}; name the day.",),
    new_zh=("{d}以后又过了{n}天，那天是星期几？",),
)
DATE = Phrases(
    en=("Not a leap year: what date is {n} days after {d}?", "Today is {d}, not a leap year. What date is it {n} days later?"),
    zh=("平年的{d}，{n}天后是几月几日？", "今天是平年{d}，再过{n}天是几月几日？"),
    new_en=("{n} days have passed since {d} of a common year; give the date.",),
    new_zh=("平年里，{d}以后又过了{n}天，那天是几月几日？",),
)
DAYS = {"en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "zh": tuple("星期" + day for day in "一二三四五六日")}
MONTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# minutes later, minutes between, days for a weekday, days for a date
RANGES = {
    "easy": ((5, 59), (5, 59), (2, 30), (2, 20)),
    "medium": ((60, 240), (60, 400), (30, 200), (20, 50)),
    "hard": ((240, 1300), (400, 1200), (200, 999), (50, 100)),
    "numbers": ((1440, 4000), None, (1000, 9999), (120, 200)),
}


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _later(rng: Random, lang: str, shift: str | None, span):
    start, n = rng.randrange(24 * 60), rng.randint(*span)
    trace, hour, minute = Trace(), start // 60, start % 60
    minutes = n
    if n >= 60:  # 487 = 48 tens + 7, and 6 tens are an hour
        tens, ones = divmod(n, 10)
        hours, rest = trace.divide(tens, 6)
        minutes = rest * 10 + ones
        trace.note(f"{n}m={hours}h{minutes:02d}m")
        hour = trace.add(hour, hours)
    minute = trace.add(minute, minutes)
    if trace.compare(minute, 60) != "<":
        minute, hour = trace.sub(minute, 60), trace.add(hour, 1)
    while trace.compare(hour, 24) != "<":
        hour = trace.sub(hour, 24)
    prompt = LATER.pick(rng, lang, shift).format(t=_clock(start), n=n)
    return prompt, f"{hour:02d}:{minute:02d}", str(trace), f"later|{_clock(start)}|{n}"


def _between(rng: Random, lang: str, shift: str | None, span):
    n = rng.randint(*span)
    start = rng.randrange(24 * 60 - n)
    (hour, minute), (to_hour, to_minute) = divmod(start, 60), divmod(start + n, 60)
    trace = Trace()
    if trace.compare(to_minute, minute) == "<":
        to_hour, to_minute = to_hour - 1, to_minute + 60
        trace.note(f"{to_hour:02d}:{to_minute}")
    value = trace.sub(to_minute, minute)
    hours = trace.sub(to_hour, hour)
    if hours:
        value = trace.add(trace.mul(hours, 6) * 10, value)
    prompt = BETWEEN.pick(rng, lang, shift).format(t=_clock(start), u=_clock(start + n))
    return prompt, str(value), str(trace), f"between|{_clock(start)}|{_clock(start + n)}"


def _weekday(rng: Random, lang: str, shift: str | None, span):
    day, n = rng.randint(1, 7), rng.randint(*span)
    trace = Trace()
    _, rest = trace.divide(n, 7)
    trace.note(f"d{day}")
    later = trace.add(day, rest)
    if later > 7:
        later = trace.sub(later, 7)
    trace.note(f"d{later}")
    names = DAYS[lang]
    return WEEKDAY.pick(rng, lang, shift).format(d=names[day - 1], n=n), names[later - 1], str(trace), f"weekday|{day}|{n}"


def _date(rng: Random, lang: str, shift: str | None, span):
    n = rng.randint(*span)
    month, day = 1, rng.randint(1, 365 - n)  # ends in the same year: the next one may be a leap year
    while day > MONTHS[month - 1]:
        month, day = month + 1, day - MONTHS[month - 1]
    start = f"{month:02d}-{day:02d}"
    trace = Trace()
    day = trace.add(day, n)
    while trace.compare(day, MONTHS[month - 1]) == ">":
        day, month = trace.sub(day, MONTHS[month - 1]), month + 1
        trace.note(f"{month:02d}-{day:02d}")
    return DATE.pick(rng, lang, shift).format(d=start, n=n), f"{month:02d}-{day:02d}", str(trace), f"date|{start}|{n}"


KINDS = (_later, _between, _weekday, _date)


def draw(rng: Random, level: str, lang: str, shift: str | None):
    ranges = RANGES["numbers" if shift == "numbers" else level]
    kind, span = rng.choice([(kind, span) for kind, span in zip(KINDS, ranges, strict=True) if span])
    return kind(rng, lang, shift, span)


TASK = Task("durations", ("numbers", "phrasing"), draw)
