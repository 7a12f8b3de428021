"""Choose a function among the given signatures and fill in its arguments, as JSON.

Only the JSON text is made here; the control tokens around a call belong to the chat format.
The trace names the function, then its arguments: `buy_item item=pen count=3`.
"""

import json
from random import Random

from .base import Phrases, Task
from .words import draw_words, in_lang

# signature -> how a user asks for it
FUNCTIONS = {
    ("get_weather", "city"): Phrases(
        en=("What is the weather in {city}?", "How is the weather in {city}?"), zh=("{city}的天气怎么样？", "查一下{city}的天气。"),
        new_en=("Will I need an umbrella in {city}?",), new_zh=("去{city}要带伞吗？",)),
    ("get_time", "city"): Phrases(
        en=("What time is it in {city}?", "Tell me the time in {city}."), zh=("{city}现在几点？", "查一下{city}的时间。"),
        new_en=("Which hour is it right now over in {city}?",), new_zh=("{city}那边是什么时刻？",)),
    ("set_timer", "minutes"): Phrases(
        en=("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."), zh=("设一个{minutes}分钟的计时器。", "计时{minutes}分钟。"),
        new_en=("Let me know when {minutes} minutes are over.",), new_zh=("{minutes}分钟后提醒我。",)),
    ("set_alarm", "time"): Phrases(
        en=("Set an alarm for {time}.", "Wake me at {time}."), zh=("设一个{time}的闹钟。", "{time}叫醒我。"),
        new_en=("I have to get up at {time}.",), new_zh=("我{time}要起床。",)),
    ("find_price", "item"): Phrases(
        en=("What does a {item} cost?", "Find the price of a {item}."), zh=("一个{item}多少钱？", "查一下{item}的价格。"),
        new_en=("How expensive is one {item}?",), new_zh=("{item}贵不贵？",)),
    ("buy_item", "item", "count"): Phrases(
        en=("Buy {count} {item}s.", "Order {count} {item}s for me."), zh=("买{count}个{item}。", "帮我订{count}个{item}。"),
        new_en=("I would like to have {count} {item}s.",), new_zh=("我想要{count}个{item}。",)),
    ("call_person", "name", "time"): Phrases(
        en=("Call {name} at {time}.", "At {time}, call {name}."), zh=("{time}给{name}打电话。", "给{name}打电话，时间{time}。"),
        new_en=("Ring {name} up when it is {time}.",), new_zh=("到{time}就拨{name}的号码。",)),
    ("send_money", "name", "amount"): Phrases(
        en=("Send {amount} dollars to {name}.", "Pay {name} {amount} dollars."), zh=("给{name}转{amount}元。", "付给{name}{amount}元。"),
        new_en=("{name} should get {amount} dollars from me.",), new_zh=("我欠{name}{amount}元，还一下。",)),
    ("book_train", "city", "date", "count"): Phrases(
        en=("Book {count} train seats to {city} on {date}.", "On {date}, book {count} train seats to {city}."),
        zh=("订{count}张{date}去{city}的火车票。", "{date}去{city}，订{count}张火车票。"),
        new_en=("{count} of us want to ride to {city} on {date}.",), new_zh=("我们{count}个人{date}想坐火车去{city}。",)),
    ("add_event", "name", "date", "time"): Phrases(
        en=("Add a meeting with {name} on {date} at {time}.", "Meet {name} at {time} on {date}."),
        zh=("{date} {time}和{name}开会。", "加一个{date} {time}和{name}的会议。"),
        new_en=("Note down that {name} comes on {date} at {time}.",), new_zh=("记一下，{name}{date} {time}来。",)),
}
FRAMES = Phrases(
    en=("Functions: {f}. {q}", "{q} Functions: {f}.", "Call one of {f}. {q}"),
    zh=("函数：{f}。{q}", "{q}函数：{f}。", "调用其中一个：{f}。{q}"),
    new_en=("The tools you may use are {f}; the user says: {q}",), new_zh=("可用的工具有{f}，用户说：{q}",),
)
ARGS = {"easy": (1,), "medium": (1, 2), "hard": (2, 3)}
OFFERED = {"easy": (2, 2), "medium": (3, 3), "hard": (4, 4)}


def _value(rng: Random, parameter: str, shift: str | None):
    match parameter:
        case "name" | "item" | "city":
            return draw_words(rng, parameter, 1, shift)[0]
        case "time":
            return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        case "date":
            return f"{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        case "count":
            return rng.randint(2, 20)
        case "minutes":
            return rng.randint(2, 300)
        case "amount":
            return rng.randint(5, 999)


def draw(rng: Random, level: str, lang: str, shift: str | None):
    signature = rng.choice([s for s in FUNCTIONS if len(s) - 1 in ARGS[level]])
    offered = [*rng.sample([s for s in FUNCTIONS if s != signature], rng.randint(*OFFERED[level]) - 1), signature]
    rng.shuffle(offered)
    name, *parameters = signature
    values = {parameter: _value(rng, parameter, shift) for parameter in parameters}
    key = f"{name}|{','.join(str(v[0] if isinstance(v, tuple) else v) for v in values.values())}|{','.join(sorted(s[0] for s in offered))}"

    arguments = {parameter: in_lang(value, lang) if isinstance(value, tuple) else value for parameter, value in values.items()}
    question = FUNCTIONS[signature].pick(rng, lang, shift).format(**arguments)
    listed = "; ".join(f"{s[0]}({', '.join(s[1:])})" for s in offered)
    prompt = FRAMES.pick(rng, lang, shift).format(f=listed, q=question)
    trace = " ".join([name, *(f"{parameter}={value}" for parameter, value in arguments.items())])
    return prompt, json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False), trace, key


TASK = Task("function_call", ("entities", "phrasing"), draw)
