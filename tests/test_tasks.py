"""Claims about the generated problems: right, verifiable, split without leaks, and traced without a false step."""

import json
import re
import sys
import time
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

from dualbranch.data.problem import LANGS, LEVELS, SHIFTS, SPLITS, TASKS, Problem, sample_problem, split_of, verify
from dualbranch.data.reasoning_gym import reasoning_gym_problems
from dualbranch.data.steps import Trace
from dualbranch.data.tasks import words
from dualbranch.data.tasks.base import Phrases
from dualbranch.data.tasks.numerals import chinese, english, spell_numbers

CELLS = [(task, level, lang) for task in TASKS for level in LEVELS for lang in LANGS]


def draw(seed, split="train", per_cell=1, tasks=TASKS, shift=None):
    rng = Random(seed)
    return [sample_problem(rng, task, level, lang, split, shift)
            for task, level, lang in CELLS if task in tasks for _ in range(per_cell)]


@pytest.fixture(scope="module")
def problems():
    """Some of everything: all cells, and all shifts."""
    shifted = [p for shift in SHIFTS for p in draw(1, "test", 10, [t for t in TASKS if shift in TASKS[t].shifts], shift)]
    return draw(0, per_cell=80) + shifted


# --- an independent solver: from the numbers in the prompt or key, by other means than the tasks' own ---

def solve_arithmetic(p):
    body = p.key.split("|")[1] if p.shift == "numerals" else re.search(r"\d+(?: [+\-×÷] \d+)+", p.prompt)[0]
    if "÷" in body:
        a, b = map(int, body.split("÷"))
        return f"{a // b} r {a % b}" if p.lang == "en" else f"{a // b}余{a % b}"
    return str(eval(body.replace("×", "*")))


def solve_chickens_rabbits(p):
    heads, legs = map(int, p.key.split("|")[1:])
    found = [(heads - fours, fours) for fours in range(heads + 1) if 2 * (heads - fours) + 4 * fours == legs]
    if not found:
        return {"en": "no solution", "zh": "无解"}[p.lang]
    (numbers,) = found
    remaining = iter(numbers)
    return re.sub(r"\d+", lambda _: str(next(remaining)), p.answer)


def solve_shopping(p):
    return str(eval(p.key.split("|")[1]))


def solve_sorting(p):
    operation, listed = p.key.split("|")[1:]
    up = sorted(map(int, listed.split(",")))
    order = up[::-1] if operation in ("desc", "max") or "desc" in operation else up
    if operation.startswith("kth"):
        return str(order[int(operation[-1]) - 1])
    return str(order[0]) if operation in ("min", "max") else ", ".join(map(str, order))


def solve_equations(p):
    left, right = p.key.split("|")[1].split("=")

    def at(side, x):
        return eval(re.sub(r"(\d+)x", rf"\1*{x}", side))

    gap = [at(left, x) - at(right, x) for x in (0, 1)]  # linear in x: zero at gap[0] / (gap[0] - gap[1])
    x, rest = divmod(gap[0], gap[0] - gap[1])
    return {"en": "no solution", "zh": "无解"}[p.lang] if rest else f"x = {x}"


def solve_durations(p):
    from datetime import date, datetime, timedelta

    kind, start, end = p.key.split("|")[1:]
    if kind == "later":
        return (datetime.strptime(start, "%H:%M") + timedelta(minutes=int(end))).strftime("%H:%M")
    if kind == "between":
        minutes = datetime.strptime(end, "%H:%M") - datetime.strptime(start, "%H:%M")
        return str(int(minutes.total_seconds()) // 60)
    if kind == "date":
        return (date.fromisoformat(f"2023-{start}") + timedelta(days=int(end))).strftime("%m-%d")
    day = date(2024, 1, int(start)) + timedelta(days=int(end))  # 2024-01-01 is a Monday
    return day.strftime("%A") if p.lang == "en" else "星期" + "一二三四五六日"[day.weekday()]


SOLVERS = {name.removeprefix("solve_"): f for name, f in list(globals().items()) if name.startswith("solve_")}


def test_answers_agree_with_an_independent_solver(problems):
    checked = Counter()
    for p in problems:
        if p.task in SOLVERS:
            assert SOLVERS[p.task](p) == p.answer, p
            checked[p.task] += 1
    assert set(checked) == set(SOLVERS) and sum(checked.values()) > 2500, checked


def test_prompt_tells_what_the_json_answer_needs(problems):
    for p in (p for p in problems if p.task in ("json_extract", "function_call")):
        answer = json.loads(p.answer)
        assert p.answer == json.dumps(answer, ensure_ascii=False)
        fields = answer if p.task == "json_extract" else answer["arguments"]
        for field, value in fields.items():
            assert field in p.prompt and str(value) in p.prompt and f"{field}={value}" in p.trace, p
        if p.task == "json_extract":
            assert (", " if p.lang == "en" else "、").join(fields) in p.prompt, p
        if p.task == "function_call":
            assert f"{answer['name']}({', '.join(fields)})" in p.prompt, p


def test_hard_extraction_takes_the_asked_person_of_two():
    for p in draw(5, per_cell=100, tasks=["json_extract"]):
        if p.level == "hard" and p.lang == "en":
            answer = json.loads(p.answer)
            sentences = re.findall(r"[^.:]+\.", p.prompt)
            name = re.search(r"of (\w+) as|For (\w+),|About (\w+),", p.prompt)
            name = next(filter(None, name.groups()))
            own = " ".join(s for s in sentences if re.search(rf"\b{name}\b(?!,? (?:give|JSON))", s))
            assert all(str(v) in own for v in answer.values()), p


# --- traces ---

def value(expression):
    return eval(re.sub(r"\b0+(?=\d)", "", expression))


def test_every_step_of_every_trace_is_true(problems):
    assert len(problems) >= 3000
    n_steps = 0
    for p in problems:
        if p.task in ("json_extract", "function_call"):
            continue
        for chain in re.findall(r"(?<![\w:])\d+(?:[-+*%]\d+)+(?:=[-+*%\d]+)+|(?<=[:;])\d+(?:[-+*%]\d+)+(?:=[-+*%\d]+)+", p.trace):
            sides = chain.split("=")
            assert len({value(side) for side in sides}) == 1, (chain, p)
            n_steps += 1
        for a, sign, b in re.findall(r"(?<!\S)(\d+)([<>=])(\d+)(?!\S)", p.trace):
            assert value(f"{a}{'==' if sign == '=' else sign}{b}"), p
        for a, sign, b, columns in re.findall(r"(\d+)([-+*/])(\d+):(\S+)", p.trace):
            written = columns.split("|")[-1]
            assert int(written) == value(f"{a}{'//' if sign == '/' else sign}{b}") and written == str(int(written)), p
    assert n_steps > 10_000, n_steps


def test_steps_compute_what_they_return():
    rng = Random(3)
    for _ in range(3000):
        a, b = sorted((rng.randrange(10 ** rng.randint(1, 5)) for _ in range(2)), reverse=True)
        digit, pair = rng.randint(1, 9), rng.randrange(1, 100)
        trace = Trace()
        got = trace.add(a, b), trace.sub(a, b), trace.mul(a, pair), trace.divide(a, digit)
        assert got == (a + b, a - b, a * pair, divmod(a, digit))


def test_trace_ends_with_the_answer(problems):
    for p in problems:
        if p.task in ("arithmetic", "shopping", "equations") and "÷" not in p.prompt and p.answer[0] not in "n无":
            assert re.split(r"[|=]", p.trace)[-1] == p.answer.removeprefix("x = ") or p.shift == "numerals", p


def test_no_solution_is_one_in_ten_and_the_trace_says_none():
    for task in ("chickens_rabbits", "equations"):
        drawn = draw(7, per_cell=300, tasks=[task])
        none = [p for p in drawn if p.answer in ("no solution", "无解")]
        assert 0.06 < len(none) / len(drawn) < 0.14, (task, len(none), len(drawn))
        assert all(p.trace.endswith("none") for p in none) and all("none" not in p.trace for p in drawn if p not in none)
        assert all(p.answer in ("no solution", "无解") for p in draw(8, "test", 20, [task], "unsolvable"))


def test_documents_are_short():
    for task in TASKS:
        drawn = draw(9, per_cell=200, tasks=[task])
        for p in drawn:
            assert 0 < len(p.trace) <= 240 and len(p.prompt) <= 240 and len(p.answer) <= 130, (len(p.trace), len(p.prompt), p)
        assert sum(len(p.prompt + p.trace + p.answer) for p in drawn) / len(drawn) < 220


# --- verify ---

def test_verify_accepts_the_answer_in_any_spacing_or_width(problems):
    for p in problems:
        assert verify(p, p.answer) and verify(p, f"  {p.answer}\n"), p
        if not p.answer.startswith("{"):
            assert verify(p, "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in p.answer)), p
        else:
            assert verify(p, json.dumps(dict(reversed(json.loads(p.answer).items())), indent=1)), p


def test_verify_rejects_perturbed_answers(problems):
    rng = Random(4)
    for p in problems:
        i = rng.randrange(len(p.answer))
        for wrong in (p.answer[:i] + ("7" if p.answer[i] != "7" else "8") + p.answer[i + 1:], p.answer + "1", p.answer[:-1], p.answer * 2):
            assert not verify(p, wrong), (wrong, p)


@pytest.mark.parametrize("garbage", ["", "{", "[" * 100_000, '{"a": ', "\ud800", "null", "NaN", "9" * 5000, None, 42, b"{}"])
def test_verify_never_raises_on_garbage(garbage):
    assert not any(verify(p, garbage) for p in draw(2))


def test_verify_keeps_digits_and_json_types_apart():
    number = Problem("t", "easy", "en", "", "42", "", "k")
    record = Problem("t", "easy", "en", "", '{"n": 1}', "", "k")
    assert not verify(number, "4 2") and not verify(number, "4²") and verify(number, "４２")
    assert not verify(record, '{"n": true}') and not verify(record, '{"n": "1"}') and not verify(record, '{"n": 1, "m": 2}')


def test_an_answer_in_braces_that_is_no_json_is_compared_as_text():
    answer = Problem("t", "easy", "en", "", "{1, 2}", "", "k")
    assert verify(answer, "{1,2}") and not verify(answer, "{1, 3}") and not verify(answer, '{"1": 2}')


# --- splits, shifts, determinism ---

def test_no_test_key_or_prompt_is_among_training_ones():
    train, test = draw(10, "train", 420), draw(11, "test", 105)
    assert len(train) > 20_000 and len(test) > 5_000
    assert not {p.key for p in train} & {p.key for p in test}
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert all(split_of(p.key) == "test" for p in test)


def test_split_shares_are_90_5_5_and_fixed():
    shares = Counter(split_of(f"key {i}") for i in range(20_000))
    assert abs(shares["train"] - 18_000) < 200 and abs(shares["valid"] - 1000) < 150 and set(shares) == set(SPLITS)
    assert [split_of(k) for k in ("arithmetic|12+34", "chickens_rabbits|35|94")] == ["train", "test"]


def test_held_out_phrasings_are_disjoint_from_training_ones():
    n_families = 0
    for task in TASKS.values():
        module = sys.modules[task.draw.__module__]
        for found in vars(module).values():
            for family in found.values() if isinstance(found, dict) else [found]:
                if isinstance(family, Phrases):
                    n_families += 1
                    for lang in LANGS:
                        known, new = set(getattr(family, lang)), set(getattr(family, f"new_{lang}"))
                        assert new and len(known) >= 2 and not known & new, family
    assert n_families >= 20


def test_shifts_differ_from_training():
    train = draw(12, per_cell=150)
    prompts = {p.prompt for p in train}
    for shift in SHIFTS:
        shifted = draw(13, "test", 20, [t for t in TASKS if shift in TASKS[t].shifts], shift)
        assert shifted and all(p.shift == shift for p in shifted) and not {p.prompt for p in shifted} & prompts

    def largest(drawn):
        return sum(max(map(int, re.findall(r"\d+", p.prompt))) for p in drawn) / len(drawn)

    for task in (t for t in TASKS if "numbers" in TASKS[t].shifts):
        hard = [p for p in train if p.task == task and p.level == "hard"]
        assert largest(draw(14, "test", 50, [task], "numbers")) > 1.5 * largest(hard), task


def test_words_of_a_problem_differ_and_invented_ones_are_never_fixed_ones(monkeypatch):
    made = iter([("Ben", "安雅"), ("Nina", "安雅"), ("Mu", "罗马"), ("Mu", "安雅"), ("Mu", "安"), ("Ko", "安雅"), ("Ko", "星")])
    monkeypatch.setattr(words, "INVENTED", 1.0)
    monkeypatch.setattr(words, "invent", lambda rng, kind: next(made))
    assert words.draw_words(Random(0), "name", 2, None) == [("Mu", "安雅"), ("Ko", "星")]


def test_numerals_shift_leaves_no_digits_in_prompts_but_ordinals():
    for task in (t for t in TASKS if "numerals" in TASKS[t].shifts):
        for p in draw(15, "test", 20, [task], "numerals"):
            assert not re.search(r"\d", re.sub(r"2nd|3rd|4th", "", p.prompt)) and verify(p, p.answer), p


def test_number_words():
    assert [english(n) for n in (0, 35, 110, 4018)] == ["zero", "thirty-five", "one hundred ten", "four thousand eighteen"]
    assert [chinese(n) for n in (0, 10, 15, 35, 105, 115, 1005, 1050, 1110, 20018)] == [
        "零", "十", "十五", "三十五", "一百零五", "一百一十五", "一千零五", "一千零五十", "一千一百一十", "二万零一十八"]


def test_two_things_are_counted_as_chinese_does():
    assert spell_numbers("买2个杯子和12个球，第2个人付22元", "zh") == "买两个杯子和十二个球，第二个人付二十二元"
    prompts = [p.prompt for p in draw(16, "test", 150, ["shopping"], "numerals") if p.lang == "zh"]
    assert any("两个" in text for text in prompts) and not any("二个" in text for text in prompts)


def test_same_seed_same_problems():
    assert draw(21) == draw(21) != draw(22)


def test_both_languages_are_what_they_say(problems):
    for p in problems:
        assert (p.lang == "zh" or not re.search(r"[\u4e00-\u9fff]", p.prompt + p.trace + p.answer)), p
    assert sum(bool(re.search(r"[\u4e00-\u9fff]", p.prompt)) for p in problems if p.lang == "zh") > 1000


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_each_level_has_enough_keys(task, level):
    rng = Random(0)
    n_keys = len({TASKS[task].make(rng, level, "en").key for _ in range(6000)})
    small = task == "chickens_rabbits" and level == "easy"  # few pairs of small numbers exist
    assert n_keys >= (900 if small else 1500), n_keys


@pytest.mark.parametrize("change, named", [
    ({"task": "poetry"}, "chickens_rabbits"), ({"level": "extreme"}, "easy, medium, hard"), ({"lang": "fr"}, "en, zh"),
    ({"split": "dev"}, "train, valid, test"), ({"shift": "unsolvable"}, "numbers, phrasing, numerals")])
def test_unknown_choices_raise_and_name_the_valid_ones(change, named):
    arguments = {"task": "arithmetic", "level": "easy", "lang": "en", "split": "train", "shift": None} | change
    with pytest.raises(ValueError, match=named):
        sample_problem(Random(0), **arguments)


def test_at_least_3000_problems_per_second_with_a_wide_margin_for_slow_machines():
    start = time.process_time()
    n = len(draw(30, per_cell=60))
    rate = n / (time.process_time() - start)
    assert rate > 3000, f"{rate:.0f} problems/s"


# --- the optional source ---

def test_reasoning_gym_problems_have_no_trace_and_verify(monkeypatch):
    entries = [{"question": "1+1?", "answer": "2"}, {"question": "?", "answer": None}]
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=lambda name, size, seed: entries))
    (problem,) = reasoning_gym_problems("basic_arithmetic", size=2)
    assert problem.trace == "" and verify(problem, "2") and not verify(problem, "3")


def test_missing_reasoning_gym_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        next(reasoning_gym_problems("basic_arithmetic", size=1))
