"""The names that prompts use, each as (English, Chinese). Few on purpose: the vocabulary is small.

`NEW_*` appear only under the "entities" shift.
"""

from random import Random

NAMES = (("Tom", "小明"), ("Anna", "小红"), ("Ben", "小刚"), ("Lucy", "小丽"), ("Sam", "小华"), ("Mia", "小美"),
         ("Jack", "小军"), ("Lily", "小兰"), ("Leo", "小强"), ("Amy", "小芳"), ("Max", "小龙"), ("Eva", "小雪"))
NEW_NAMES = (("Oscar", "阿杰"), ("Nina", "阿梅"), ("Hugo", "阿伟"), ("Zoe", "阿玲"))

ITEMS = (("pen", "笔"), ("book", "书"), ("cup", "杯子"), ("melon", "西瓜"), ("bag", "书包"), ("hat", "帽子"),
         ("lamp", "台灯"), ("toy", "玩具"), ("cake", "蛋糕"), ("ball", "球"), ("shirt", "衬衫"), ("map", "地图"))
NEW_ITEMS = (("kite", "风筝"), ("chair", "椅子"), ("drum", "鼓"), ("rope", "绳子"))

CITIES = (("Paris", "巴黎"), ("London", "伦敦"), ("Rome", "罗马"), ("Beijing", "北京"), ("Shanghai", "上海"),
          ("Tokyo", "东京"), ("Berlin", "柏林"), ("Madrid", "马德里"), ("Cairo", "开罗"), ("Delhi", "德里"),
          ("Sydney", "悉尼"), ("Boston", "波士顿"))
NEW_CITIES = (("Lima", "利马"), ("Oslo", "奥斯陆"), ("Seoul", "首尔"), ("Athens", "雅典"))

_WORDS = {"name": (NAMES, NEW_NAMES), "item": (ITEMS, NEW_ITEMS), "city": (CITIES, NEW_CITIES)}
Word = tuple[str, str]


def draw_words(rng: Random, kind: str, count: int, shift: str | None) -> list[Word]:
    """`count` different words of a kind ("name", "item", "city"); new ones under the "entities" shift."""
    known, new = _WORDS[kind]
    return rng.sample(new if shift == "entities" else known, count)


def in_lang(word: Word, lang: str) -> str:
    return word[lang == "zh"]
