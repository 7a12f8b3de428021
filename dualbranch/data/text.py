"""The user's own text as training documents: .txt and .jsonl files, or folders of them.

`load_documents` gives plain text (tokenizer training, language modelling); `load_examples` gives token
documents, with conversations in the chat template. Train and valid are split by each document's hash, never by its place, so
adding files moves nothing from one side to the other and copies of a document stay together.

What a document is: one line of a .jsonl file; a .txt file, cut at lines that hold only `<|endoftext|>`, and every
`SECTION` characters or so at a blank line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dualbranch.chat import render_messages
from dualbranch.data.packing import Example
from dualbranch.tokenizer import Tokenizer, TokenizerBase

SUFFIXES = (".txt", ".jsonl")
VALID_SHARE = 0.05
"""Share of documents held out, on average."""
SECTION = 10_000
"""Characters after which a long .txt file is cut at the next blank line."""

Paths = str | os.PathLike | Sequence[str | os.PathLike]
Split = Literal["train", "valid", "all"]


@dataclass(frozen=True)
class Document:
    """Either `text` or a conversation, `messages` as `chat.render_messages` takes them; `source` names file and line."""

    source: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def plain(self) -> str:
        """The document without any template: a conversation's parts on lines of their own."""
        if self.text is not None:
            return self.text
        parts = [part for message in self.messages for part in (message.get("reasoning"), message["content"]) if part]
        return "\n".join(parts)

    @property
    def split(self) -> Split:
        """`"valid"` for a `VALID_SHARE` of all documents, by hash of the text."""
        digest = hashlib.sha256(self.plain.encode()).digest()
        return "valid" if int.from_bytes(digest[:8], "big") < VALID_SHARE * 2**64 else "train"


def read_documents(paths: Paths) -> Iterator[Document]:
    """All documents of the files and folders (searched through, in sorted order) in `paths`, both splits.

    A .jsonl line is an object with `text`; or `question` and `answer` (and `reasoning`); or `messages`, a list of
    `{"role", "content"}`. Files are read as they are reached. Raises ValueError naming file and line: nothing at the path,
    another kind of file, an empty one, not UTF-8, not JSON, other fields.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in map(Path, paths):
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file() and not _hidden(p, path)]
            if not files:
                raise ValueError(f"{path}: no {' or '.join(SUFFIXES)} file in this folder")
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: needed a {' or '.join(SUFFIXES)} file, or a folder of them")
        else:
            files = [path]
        n_documents = 0
        for file in files:
            for document in _read_jsonl(file) if file.suffix == ".jsonl" else _read_txt(file):
                n_documents += 1
                yield document
        if n_documents == 0:
            raise ValueError(f"{path}: is empty, it holds no text")


def load_documents(paths: Paths, split: Split) -> list[str]:
    """The plain text of the documents in `split`; `"valid"` may be empty for a small collection.

    Raises ValueError as `read_documents` does, and if all documents there are fall into `"valid"`.
    """
    return [document.plain for document in _of_split(paths, split)]


def load_examples(tok: Tokenizer, paths: Paths, split: Split, seq_len: int) -> Iterator[Example]:
    """The documents of `split` as (ids, loss_weights), as `pack` takes them.

    Text becomes `windows`. A conversation becomes one document in the chat template, weighted on what the assistant says; it isn't cut,
    so it may be longer than `seq_len`.
    """
    for document in _of_split(paths, split):
        if document.text is None:
            try:
                yield render_messages(tok, document.messages)
            except ValueError as error:
                raise ValueError(f"{document.source}: {error}") from error
        else:
            yield from windows(tok, document.text, seq_len)


def windows(tok: TokenizerBase, text: str, seq_len: int) -> Iterator[Example]:
    """`text` cut in windows of `seq_len` tokens, each opened by what opens every text (`tok.start_ids`); weight 1 on all tokens but the first."""
    start = list(tok.start_ids)
    n = seq_len - len(start)
    if seq_len < 2 or n < 1:
        raise ValueError(f"seq_len is {seq_len}, needed at least {max(2, len(start) + 1)}")
    ids = tok.encode(text)
    for i in range(0, len(ids), n):
        piece = [*start, *ids[i : i + n]]
        yield piece, [0.0] + [1.0] * (len(piece) - 1)


def _of_split(paths: Paths, split: str) -> list[Document]:
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}, needed one of {', '.join(get_args(Split))}")
    documents = list(read_documents(paths))
    if not documents:
        raise ValueError("no text files given")
    chosen = [document for document in documents if split in ("all", document.split)]
    if split == "train" and not chosen:
        raise ValueError(f"all {len(documents)} documents fall into the validation split (by their hash); add more text")
    return chosen


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})") from error


def _read_txt(path: Path) -> Iterator[Document]:
    for part in re.split(r"^<\|endoftext\|>$", _read(path), flags=re.MULTILINE):
        for section in _sections(part):
            if section.strip():
                yield Document(str(path), section.strip("\n"))


def _sections(text: str) -> Iterator[str]:
    """`text` cut at the first blank line, else line end, else anywhere, behind every `SECTION` characters."""
    begin = 0
    while len(text) - begin > 2 * SECTION:
        least, most = begin + SECTION, begin + 2 * SECTION
        end = next((at + 1 for mark in ("\n\n", "\n") if (at := text.find(mark, least, most)) >= 0), least)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got a {type(record).__name__}, needed an object like {{\"text\": ...}}")
        document = _document(record, where)
        try:
            blank = not document.plain.encode().strip()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: not valid Unicode: a lone surrogate escape") from error
        if not blank:
            yield document


def _document(record: dict[str, Any], where: str) -> Document:
    if "text" in record:
        return Document(where, _string(record, "text", where))
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f"{where}: messages must be a non-empty list of objects with role and content")
        return Document(where, messages=tuple(_message(m, i, f"{where}: messages[{i}]") for i, m in enumerate(messages)))
    if "question" in record and "answer" in record:
        answer = {"role": "assistant", "content": _string(record, "answer", where)}
        if record.get("reasoning") is not None:
            answer["reasoning"] = _string(record, "reasoning", where)
        return Document(where, messages=({"role": "user", "content": _string(record, "question", where)}, answer))
    raise ValueError(
        f"{where}: needed a field text, or question and answer, or messages; got {', '.join(map(repr, record)) or 'none'}"
    )


def _message(message: dict[str, Any], i: int, where: str) -> dict[str, str]:
    role = message.get("role")
    if role not in ("system", "user", "assistant") or (role == "system" and i > 0):
        raise ValueError(f"{where}: role is {role!r}, needed user or assistant (or system, first)")
    checked = {"role": role, "content": _string(message, "content", where)}
    if role == "assistant" and message.get("reasoning") is not None:
        checked["reasoning"] = _string(message, "reasoning", where)
    return checked


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"{where}: {key} is {type(record.get(key)).__name__}, needed a string")
    return record[key]
