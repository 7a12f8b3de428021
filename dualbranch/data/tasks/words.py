"""The names that prompts use, each as (English, Chinese).

Few on purpose: the vocabulary is small. A third of the words drawn is made up on the spot, so that a model has to copy it instead of looking
it up. `NEW_*` appear only under the "entities" shift.
"""

from random import Random
from string import ascii_lowercase

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
_FIXED = frozenset(text for groups in _WORDS.values() for group in groups for word in group for text in word)
Word = tuple[str, str]

INVENTED = 1 / 3  # share of made-up words
WILD = 0.3  # share of those that are made of any letters, so that every letter and byte piece is copied now and then
_ONSETS, _VOWELS, _CODAS = "b d f g h k l m n p r s t v w z ch sh".split(), "a e i o u ai ei".split(), ["", "", "n", "r", "s", "l"]
_HANZI = "安白冰波春达德东方飞福光海和红华江金京静军康可兰乐丽林龙罗马美梦明木宁平奇青秋山石思松天田文西溪心星雪雅阳叶玉月云志中"


def known_words() -> list[str]:
    """Every fixed word in both languages, without those of the "entities" shift."""
    return [text for known, _ in _WORDS.values() for word in known for text in word]


def invent(rng: Random, kind: str) -> Word:
    """A made-up word: mostly one or two syllables, or two or three of a few characters; sometimes any letters, any characters."""
    english = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 2))) + rng.choice(_CODAS)
    chinese = "".join(rng.sample(_HANZI, rng.randint(2, 3)))
    if rng.random() < WILD:
        english = "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 6)))
        chinese = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 3)))
    return english if kind == "item" else english.capitalize(), chinese


def draw_words(rng: Random, kind: str, count: int, shift: str | None) -> list[Word]:
    """`count` words of a kind ("name", "item", "city"), different in both languages; new ones under the "entities" shift.

    No invented word is a fixed one: it would tell of two people of one name, show a word of the shift, or give one text two keys.
    """
    known, new = _WORDS[kind]
    if shift == "entities":
        return rng.sample(new, count)
    words: list[Word] = []
    for word in rng.sample(known, count):
        if rng.random() < INVENTED:
            word, taken = invent(rng, kind), _FIXED.union(*words)
            while not taken.isdisjoint(word):
                word = invent(rng, kind)
        words.append(word)
    return words


def in_lang(word: Word, lang: str) -> str:
    return word[lang == "zh"]
