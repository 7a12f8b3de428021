"""Named fields of a short text as JSON. Hard: the text tells of two people, one is asked about.

The trace lists what was found, `name=Tom age=34`, in the order asked for. Hard ones first name who is asked
about, go through the sentences, `Tom?Anna no;Tom price=5;Tom city=Oslo;Anna no;`, and keep what is said of that person: a look-up by owner and
field at once is what small models don't learn (docs/experiments.md).
"""

import json
from random import Random

from .base import Phrases, Task
from .words import draw_words, in_lang

PERSON = Phrases(
    en=("{name} is {age} and lives in {city}.", "{name}, aged {age}, lives in {city}.", "{name} lives in {city} and is {age} years old."),
    zh=("{name}今年{age}岁，住在{city}。", "{name}住在{city}，今年{age}岁。", "住在{city}的{name}今年{age}岁。"),
    new_en=("At {age}, {name} has moved to {city}.",),
    new_zh=("{age}岁的{name}搬到了{city}。",),
)
PURCHASE = Phrases(
    en=("On {date}, {name} bought a {item} for {price} dollars.", "{name} paid {price} dollars for a {item} on {date}.", "{name} bought a {item} on {date} for {price} dollars."),
    zh=("{date}，{name}花{price}元买了{item}。", "{name}在{date}花{price}元买了{item}。", "{name}在{date}买了{item}，价格{price}元。"),
    new_en=("The {item} that {name} picked on {date} cost {price} dollars.",),
    new_zh=("{name}挑的{item}是{date}买的，标价{price}元。",),
)
REQUEST = Phrases(
    en=("Extract {fields} as JSON: {text}", "{text} Give {fields} as JSON.", "Text: {text} JSON with {fields}:"),
    zh=("提取{fields}，写成JSON：{text}", "{text}用JSON写出{fields}。", "文本：{text}含{fields}的JSON："),
    new_en=("Turn the facts {fields} of this note into a JSON object. {text}",),
    new_zh=("请把下面这段话里的{fields}整理为JSON对象。{text}",),
)
REQUEST_ABOUT = Phrases(
    en=("Extract {fields} of {name} as JSON: {text}", "{text} For {name}, give {fields} as JSON.", "Text: {text} About {name}, JSON with {fields}:"),
    zh=("提取{name}的{fields}，写成JSON：{text}", "{text}用JSON写出{name}的{fields}。", "文本：{text}关于{name}，含{fields}的JSON："),
    new_en=("Turn the facts {fields} that concern {name} into a JSON object. {text}",),
    new_zh=("请把下面这段话里{name}的{fields}整理为JSON对象。{text}",),
)
FIELDS = ("name", "age", "city", "item", "price", "date")


def _people(rng: Random, count: int, shift: str | None) -> list[dict]:
    drawn = {kind: draw_words(rng, kind, count, shift) for kind in ("name", "city", "item")}
    return [{"name": drawn["name"][i], "age": rng.randint(7, 89), "city": drawn["city"][i], "item": drawn["item"][i],
             "price": rng.randint(5, 999), "date": f"{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"} for i in range(count)]


def _facts(person: dict, says: tuple[str, ...], fields: list[str]) -> str:
    return " ".join(f"{field}={person[field]}" for field in says if field in fields) or "-"


def draw(rng: Random, level: str, lang: str, shift: str | None):
    people = _people(rng, 2 if level == "hard" else 1, shift)
    asked = people[0]
    known, count = {"easy": (FIELDS[:3], 2), "medium": (FIELDS, 3), "hard": (FIELDS, rng.randint(4, 5))}[level]
    fields = rng.sample(known, count)
    key = ",".join(sorted(f"{field}={asked[field][0] if isinstance(asked[field], tuple) else asked[field]}" for field in fields))

    told = [{field: in_lang(value, lang) if isinstance(value, tuple) else value for field, value in person.items()} for person in people]
    clauses = ((PERSON, FIELDS[1:3]),) if level == "easy" else ((PERSON, FIELDS[1:3]), (PURCHASE, FIELDS[3:]))
    parts = [(clause.pick(rng, lang, shift).format(**person), person, says) for person in told for clause, says in clauses]
    rng.shuffle(parts)
    request = (REQUEST_ABOUT if level == "hard" else REQUEST).pick(rng, lang, shift)
    prompt = request.format(fields=(", " if lang == "en" else "、").join(fields), name=told[0]["name"],
                            text=(" " if lang == "en" else "").join(sentence for sentence, _, _ in parts))
    found = {field: told[0][field] for field in fields}
    trace = " ".join(f"{field}={value}" for field, value in found.items())
    if level == "hard":
        notes = [f"{person['name']} {_facts(person, says, fields) if person is told[0] else 'no'};" for _, person, says in parts]
        trace = f"{told[0]['name']}?{''.join(notes)}{trace}"
    return prompt, json.dumps(found, ensure_ascii=False), trace, key


TASK = Task("json_extract", ("entities", "phrasing"), draw)
