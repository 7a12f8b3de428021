"""Tokenizers of public checkpoints, with the promises of `tokenizer.py`: text never becomes a control token, streams never cut a character.

Two kinds, by the file that carries them: `BPETokenizer` for `tokenizer.json` (run by the `tokenizers` package), `SentencePieceTokenizer` for a
`tokenizer.model`. Beside either lies `tokenizer_config.json`, reduced to what is used here: the names of special tokens and the chat
template's text. `load_tokenizer` reads a folder, `tokenizer_from_gguf` the metadata of a GGUF file, `tokenizer_from_files` our own checkpoints.

Added tokens that are words of a text (HTML tags, runs of spaces) stay text; those that structure a conversation (special tokens, `<|...|>`,
`<think>`, ...) are control tokens. Text is normalised only where the checkpoint's own tokenizer does so (Qwen: NFC). Not here: chat formats
(`chat.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dualbranch.storage import check_inside, link_root
from dualbranch.tokenizer import CONTROL_TOKENS, Tokenizer, TokenizerBase, check_text, load_processor, piece_bytes

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_MAX_BYTES = 256 * 2**20
_SPACE = "\u2581"

#: Added tokens that no text may spell, though their checkpoints don't call them special.
_CONTROL_NAME = re.compile(
    r"<\|.*\|>|<｜.*｜>|</?(think|tool_call|tool_response|tools)>|<(start|end)_of_(turn|image)>|<unused\d+>|<(pad|bos|eos|unk|mask)>|\[multimodal\]"
)
#: Tokens known to end a reply or a document.
END_NAMES = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|return|>",
)  # fmt: skip
_CONFIG_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "chat_template", "dualbranch_thinks")


class _PublicTokenizer(TokenizerBase):
    """What both kinds share: the ids that a checkpoint's special tokens stand for."""

    _file: str

    def _finish(self, content: bytes, config: Mapping[str, Any]) -> None:
        self._content = content
        self._config = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
        self._config_bytes = (json.dumps(self._config, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
        self.hash = hashlib.sha256(content + self._config_bytes).hexdigest()
        self.chat_template = self._config.get("chat_template")
        self.thinks = bool(self._config.get("dualbranch_thinks"))
        c = self.control
        self.stop_ids = frozenset(c[name] for name in (*END_NAMES, self._config.get("eos_token")) if name in c)
        eos = c.get(self._config.get("eos_token"))
        self.end_id = eos if eos is not None else next((c[name] for name in END_NAMES if name in c), 0)
        bos = c.get(self._config.get("bos_token"))
        # Without a bos of its own, a checkpoint saw documents that end in <|endoftext|> one after the other.
        separators = [c[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in c]
        self.bos_id = self.start_ids[0] if self.start_ids else next(iter(separators), self.end_id if bos is None else bos)
        spoken = {self.bos_id, self.end_id, *self.start_ids, *self.stop_ids}
        pad = c.get(self._config.get("pad_token"))
        free = [i for name, i in c.items() if i not in spoken and re.search("pad|reserved|unused|fim|file|unk|mask|empty", name)]
        self.pad_id = pad if pad is not None and pad not in spoken else next(iter(free), self.end_id)

    def files(self) -> dict[str, bytes]:
        return {self._file: self._content, "tokenizer_config.json": self._config_bytes}

    def __reduce__(self):
        return tokenizer_from_files, (self.files(),)


class BPETokenizer(_PublicTokenizer):
    """A `tokenizer.json`, as `tokenizers` runs it: byte-level (GPT-2 style) or with byte fallback (Llama 2, Gemma)."""

    _file = "tokenizer.json"

    def __init__(self, content: bytes, config: Mapping[str, Any], source: str = "tokenizer.json"):
        """`content`: the file; `config`: what `tokenizer_config.json` says. Raises ValueError, naming `source`, if it can't be used."""
        spec = _json_object(content, source)
        added = spec.get("added_tokens") or []
        try:
            spec["added_tokens"] = [t | {"special": t["special"] or bool(_CONTROL_NAME.fullmatch(t["content"]))} for t in added]
            kind = spec["model"]["type"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source}: not a tokenizer file: {error} is missing or malformed") from error
        if kind != "BPE":
            raise ValueError(f"{source}: a {kind} tokenizer; supported is BPE")
        spec["truncation"] = spec["padding"] = None
        try:
            self._processor = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # what the package raises for any malformed file is Exception itself
            raise ValueError(f"{source}: not a usable tokenizer ({' '.join(str(error).split())[:200]})") from error
        self._processor.encode_special_tokens = True  # a special token's characters in a text are text
        vocab = self._processor.get_vocab(with_added_tokens=True)
        if not vocab or max(vocab.values()) >= 2**22:
            raise ValueError(f"{source}: has {len(vocab)} tokens with ids up to {max(vocab.values(), default=-1)}; needed 1 to {2**22}")
        special = {t["content"]: self._processor.token_to_id(t["content"]) for t in spec["added_tokens"] if t["special"]}
        text_of = _byte_level_bytes if _mentions(spec.get("decoder"), "ByteLevel") else _fallback_bytes
        literal = {t["content"] for t in spec["added_tokens"]}
        token_bytes = [b""] * (max(vocab.values()) + 1)
        for token, i in vocab.items():
            token_bytes[i] = token.encode() if token in literal else text_of(token)
        unused = set(range(len(token_bytes))) - set(vocab.values())
        strips = text_of is _fallback_bytes and (_mentions(spec.get("decoder"), "Strip") or _mentions(spec.get("decoder"), "Metaspace"))
        self._set_tokens(token_bytes, dict(sorted(special.items(), key=lambda item: item[1])), unused, strips)
        self.start_ids = self._start_ids(config)
        self._finish(content, config)

    def _start_ids(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """What the checkpoint's own tokenizer puts before every text."""
        bos = self.control.get(config.get("bos_token"))
        if config.get("add_bos_token") is not None:
            return (bos,) if config["add_bos_token"] and bos is not None else ()
        whole, plain = self._processor.encode("a").ids, self._processor.encode("a", add_special_tokens=False).ids
        n_before = next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), 0)
        return tuple(whole[:n_before])

    def encode(self, text: str) -> list[int]:
        check_text(text)
        ids = self._processor.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(ids):  # a vocabulary that merges its way to a control token: cut where one is spelled
            spelled = "|".join(re.escape(name[1:]) for name in sorted(self.control, key=len, reverse=True))
            cut = re.split(f"(?={spelled})", text)
            ids = [i for part in cut for i in self._processor.encode(part, add_special_tokens=False).ids]
            assert self._control_ids.isdisjoint(ids), "plain text must never yield a control token"
        return ids


class SentencePieceTokenizer(_PublicTokenizer):
    """A public checkpoint's `tokenizer.model`, or the same tokenizer out of a GGUF file."""

    _file = "tokenizer.model"

    def __init__(self, content: bytes, config: Mapping[str, Any], source: str = "tokenizer.model"):
        """`content`: the file; `config`: what `tokenizer_config.json` says. Raises ValueError, naming `source`, if it can't be used."""
        self._processor = p = load_processor(content, source)
        added = sorted((int(key), entry) for key, entry in (config.get("added_tokens_decoder") or {}).items())
        n = p.GetPieceSize()
        if any(i >= n for i, _ in added) or any(_CONTROL_NAME.fullmatch(p.IdToPiece(i)) and not p.IsControl(i) and not p.IsUnknown(i) for i in range(n)):
            content = _mark_control(content, added, source)
            self._processor = p = load_processor(content, source)
            n = p.GetPieceSize()
        control = {p.IdToPiece(i): i for i in range(n) if p.IsControl(i) or p.IsUnknown(i)}
        adds_space = p.EncodeAsPieces("a")[:1][0].startswith(_SPACE)
        self._set_tokens([piece_bytes(p, i) for i in range(n)], control, [i for i in range(n) if p.IsUnused(i)], adds_space)
        literal = [p.PieceToId(f"<0x{b:02X}>") for b in _SPACE.encode()]
        # Where every piece of text gets a space of its own, text isn't cut: a literal U+2581 is then a space, as the model's makers have it.
        self._literal_space_ids = literal if not adds_space and all(p.IsByte(i) for i in literal) else None
        bos = control.get(config.get("bos_token"))
        self.start_ids = (bos,) if bos is not None and config.get("add_bos_token", True) else ()
        self._finish(content, config)

    def encode(self, text: str) -> list[int]:
        check_text(text)
        if _SPACE not in text or self._literal_space_ids is None:
            return self._processor.EncodeAsIds(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):  # the character that stands for a space inside pieces
            ids += (self._literal_space_ids if i else []) + self._processor.EncodeAsIds(part)
        return ids


# ---- where they come from


def load_tokenizer(path: str | os.PathLike) -> TokenizerBase:
    """The tokenizer in the folder `path`, a Hugging Face checkpoint's or our own (`tokenizer.json` first), or in one such file.

    Raises ValueError naming the file if there is none or it can't be used.
    """
    path = Path(path)
    folder, names = (path, FILES) if path.is_dir() else (path.parent, (path.name, "tokenizer_config.json"))
    found = [folder / name for name in (*names, "chat_template.jinja") if (folder / name).is_file()]
    for file in found:
        check_inside(link_root(folder), file)
    files = {file.name: _read(file) for file in found}
    return tokenizer_from_files(files, str(path))


def tokenizer_from_files(files: Mapping[str, bytes], source: str = "tokenizer") -> TokenizerBase:
    """The tokenizer whose `files()` these are, or those of a Hugging Face folder; `source` names the folder in errors.

    A `tokenizer.model` with our control tokens is a `Tokenizer`. Raises ValueError.
    """
    config = _json_object(files["tokenizer_config.json"], f"{source}: tokenizer_config.json") if "tokenizer_config.json" in files else {}
    config = _plain_config(config)
    if "chat_template.jinja" in files:
        config["chat_template"] = files["chat_template.jinja"].decode("utf-8", errors="replace")
    content = files.get("tokenizer.model")
    if content is not None and _is_ours(content):  # an export of ours carries a tokenizer.json too, for other readers
        return Tokenizer(content, f"{source}: tokenizer.model")
    if "tokenizer.json" in files:
        return BPETokenizer(files["tokenizer.json"], config, f"{source}: tokenizer.json")
    if content is None:
        raise ValueError(f"{source}: no tokenizer there, needed tokenizer.json or tokenizer.model")
    return SentencePieceTokenizer(content, config, f"{source}: tokenizer.model")


def _is_ours(content: bytes) -> bool:
    """Whether a sentencepiece model begins with our control tokens."""
    try:
        first = [{n: v for n, v, _ in _fields(value)}[1] for number, value, _ in itertools.islice(_fields(content), len(CONTROL_TOKENS)) if number == 1]
    except (ValueError, KeyError, TypeError):
        return False
    return first == [name.encode() for name in CONTROL_TOKENS]


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str = "GGUF") -> TokenizerBase:
    """The tokenizer that the metadata of a GGUF file describes (`tokenizer.ggml.*`). Raises ValueError naming the field."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if value is None or not isinstance(value, kind):
            raise ValueError(f"{source}: metadata field tokenizer.ggml.{key} is {type(value).__name__}, needed {kind.__name__}")
        return value

    model, pieces = get("model", str), get("tokens", list)
    if not pieces or not all(isinstance(p, str) for p in pieces):
        raise ValueError(f"{source}: metadata field tokenizer.ggml.tokens needs strings")
    types = get("token_type", list, [_NORMAL] * len(pieces))
    if len(types) != len(pieces):
        raise ValueError(f"{source}: metadata field tokenizer.ggml.token_type has {len(types)} items for {len(pieces)} tokens")
    config: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        i = get(f"{key}_token_id", int, -1)
        if 0 <= i < len(pieces):
            config[name] = pieces[i]
            if key in ("bos", "eos"):  # whatever the converter called it
                types[i] = _CONTROL
    pre = get("pre", str, "default")
    config["add_bos_token"] = get("add_bos_token", bool, model == "llama" or pre in _LLAMA3)
    if not isinstance(config["chat_template"], str):
        config["chat_template"] = None
    if model == "llama":
        scores = get("scores", list)
        if len(scores) != len(pieces):
            raise ValueError(f"{source}: metadata field tokenizer.ggml.scores has {len(scores)} items for {len(pieces)} tokens")
        unknown = get("unknown_token_id", int, 0)
        types = [_control_or(kind, piece) for piece, kind in zip(pieces, types, strict=True)]
        if 0 <= unknown < len(types):
            types[unknown] = _UNKNOWN
        table = [(p.replace(" ", _SPACE) if kind == _USER_DEFINED else p, s, kind) for p, s, kind in zip(pieces, scores, types, strict=True)]
        content = _write_model(table, _model_settings(unknown, get("add_space_prefix", bool, True)))
        if _is_ours(content):
            return Tokenizer(content, source)
        return SentencePieceTokenizer(content, config, source)
    if model != "gpt2":
        raise ValueError(f"{source}: metadata field tokenizer.ggml.model is {model!r}, supported: gpt2 (byte-level BPE) and llama (sentencepiece)")
    merges = get("merges", list)
    return BPETokenizer(_byte_level_json(pieces, types, merges, pre, source), config, source)


def gguf_fields(tokenizer: TokenizerBase) -> dict[str, Any]:
    """The inverse of `tokenizer_from_gguf`: `tokenizer.ggml.*` without that prefix, and `chat_template` if there is one; `tokens` and `token_type` have
    `vocab_size` entries. Raises ValueError where GGUF has no words for the tokenizer."""
    files = tokenizer.files()
    config = _hf_config(tokenizer)
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"])
        if not _mentions(spec.get("decoder"), "ByteLevel"):
            raise ValueError("a tokenizer.json with byte fallback can't be written as GGUF; needed the checkpoint's tokenizer.model")
        added = [t["content"] for t in spec.get("added_tokens") or []]
        pieces = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
        types = [_UNUSED] * len(pieces)
        for token, i in (spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec.get("added_tokens") or []}).items():
            pieces[i], types[i] = token, _CONTROL if token in tokenizer.control else _USER_DEFINED if token in added else _NORMAL
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        out = {"model": "gpt2", "pre": _pre_of(spec), "tokens": pieces, "token_type": types, "merges": merges}
    else:
        table, _ = _read_model(files["tokenizer.model"], "tokenizer.model")
        if not _is_bpe(files["tokenizer.model"]):
            raise ValueError("a unigram tokenizer.model can't be written as GGUF's llama tokenizer, which merges pairs; needed one of type BPE")
        pieces = [text.replace(_SPACE, " ") if kind == _USER_DEFINED else text for text, _, kind in table]
        out = {"model": "llama", "pre": "default", "tokens": pieces, "token_type": [kind for _, _, kind in table], "scores": [s for _, s, _ in table]}
        out["add_space_prefix"] = tokenizer._strips_space
        if _UNKNOWN in out["token_type"]:
            out["unknown_token_id"] = out["token_type"].index(_UNKNOWN)
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        if config.get(name) in pieces:
            out[f"{key}_token_id"] = pieces.index(config[name])
    if tokenizer.start_ids:  # of a post-processor, where the config names no bos
        out["bos_token_id"] = tokenizer.start_ids[0]
    return out | {"add_bos_token": bool(tokenizer.start_ids), "chat_template": config.get("chat_template")}


def hf_files(tokenizer: TokenizerBase) -> dict[str, bytes]:
    """The files of a Hugging Face folder that make `transformers` build this tokenizer: a `tokenizer.json`, made out of a `tokenizer.model` where
    there is none (one of type BPE), and a `tokenizer_config.json`. Raises ValueError where a `tokenizer.json` would cut texts otherwise."""
    files = dict(tokenizer.files())
    config = _hf_config(tokenizer)
    if "tokenizer.json" not in files and _is_bpe(files["tokenizer.model"]):
        files["tokenizer.json"] = _fallback_json(files["tokenizer.model"], tokenizer._strips_space, tokenizer.start_ids)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return files | {"tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode()}


#: Our own chat format (`dualbranch.chat`) as a template, for readers that run templates.
OUR_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + ('<think>' if enable_thinking is defined and enable_thinking else '</think>') }}{% endif %}"
)


def _hf_config(tokenizer: TokenizerBase) -> dict[str, Any]:
    """What its `tokenizer_config.json` says, of ours too."""
    files = tokenizer.files()
    if "tokenizer_config.json" in files:
        return json.loads(files["tokenizer_config.json"])
    return {"bos_token": "<bos>", "eos_token": "<|end|>", "pad_token": "<pad>", "add_bos_token": True, "chat_template": OUR_TEMPLATE}


def with_thinking(tokenizer: TokenizerBase, think: str | None = None, close: str | None = None) -> TokenizerBase:
    """`tokenizer` with `<think>` and `</think>` as control tokens and replies that open with the decision to think, like those of our own models.

    The two take the ids of control tokens that the checkpoint has but its chats don't use: `think` and `close` name them, else the last
    two are taken. Nothing else changes, and the vocabulary keeps its size. For training a public model to reason. Raises ValueError where no such tokens are.
    """
    if tokenizer.thinks or {"<think>", "</think>"} <= tokenizer.control.keys():
        raise ValueError("the tokenizer already has <think> and </think>")
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError("only a tokenizer.json can be given thinking tokens")
    from dualbranch.chat import chat_format

    used = {tokenizer.pad_id, tokenizer.bos_id, *chat_format(tokenizer).control_ids()}
    free = [name for name, i in tokenizer.control.items() if i not in used]
    think, close = think or (free[-2] if len(free) >= 2 else None), close or (free[-1] if free else None)
    if think == close or any(name not in free for name in (think, close)):
        raise ValueError(f"needed two control tokens that chats don't use, got {think!r} and {close!r}; free are: {', '.join(free[:20]) or 'none'}")
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    names = {think: "<think>", close: "</think>"}
    spec["added_tokens"] = [t | {"content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    spec["model"]["vocab"] = {names.get(token, token): i for token, i in spec["model"]["vocab"].items()}
    config = json.loads(tokenizer.files()["tokenizer_config.json"]) | {"dualbranch_thinks": True}
    return BPETokenizer(json.dumps(spec, ensure_ascii=False).encode(), config)


# ---- tokenizer.json


#: Aliases of `tokenizer.ggml.pre`.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_RULES = {  # how a text is cut into words before merging: the patterns that the checkpoints' own tokenizer.json carry
    **dict.fromkeys(
        _LLAMA3, _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen"), _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _SUFFIXES + "?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _SUFFIXES + "?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # GPT-2's rule after cutting out every digit
_GPT2 = ("gpt-2", "gpt2")


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _words(pre: Any, source: str) -> dict[str, Any]:
    """The pre-tokenizer that `tokenizer.ggml.pre` names. Raises ValueError for a name that isn't known."""
    if pre in _WORD_RULES:
        split = {"type": "Split", "pattern": {"Regex": _WORD_RULES[pre]}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}
    if pre in _SINGLE_DIGITS:
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}]}
    if pre in _GPT2:
        return _BYTE_LEVEL | {"use_regex": True}
    known = ", ".join((*_WORD_RULES, *_SINGLE_DIGITS, *_GPT2))
    raise ValueError(f"{source}: metadata field tokenizer.ggml.pre is {str(pre)[:40]!r}; how that cuts text into words isn't known here. Known: {known}")


def _pre_of(spec: Mapping[str, Any]) -> str:
    """The inverse of `_words`: the name that GGUF has for the way a tokenizer.json cuts text. Raises ValueError if it has none."""

    def cuts(node: Any) -> list[Any]:
        """What of a pre-tokenizer makes a difference."""
        if not isinstance(node, dict):
            return []
        kind = node.get("type")
        if kind == "Sequence":
            return [cut for part in node.get("pretokenizers") or [] for cut in cuts(part)]
        if kind == "Split":
            return [(kind, node.get("pattern", {}).get("Regex"), node.get("behavior"), node.get("invert"))]
        if kind == "ByteLevel":
            return [(kind, node.get("add_prefix_space", True), node.get("use_regex", True))]
        return [(kind, node.get("individual_digits"))]

    found = cuts(spec.get("pre_tokenizer"))
    for pre in (*_WORD_RULES, *_SINGLE_DIGITS, *_GPT2):
        if cuts(_words(pre, "")) == found and bool(spec["model"].get("ignore_merges")) == (pre in _LLAMA3):
            return pre
    raise ValueError("GGUF has no name known here for the way this tokenizer.json cuts text into words; export 'hf' or 'safetensors'")


def _byte_level_json(pieces: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: Any, source: str) -> bytes:
    """The `tokenizer.json` of a byte-level BPE as GGUF describes it."""
    words = _words(pre, source)
    vocab = {piece: i for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind != _UNUSED}
    if len(vocab) != sum(kind != _UNUSED for kind in types):
        raise ValueError(f"{source}: metadata field tokenizer.ggml.tokens holds a token twice")
    added = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": kind == _CONTROL}
        for i, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    pairs = [merge.split(" ", 1) for merge in merges if isinstance(merge, str)]
    if len(pairs) < len(merges) or any(len(pair) != 2 or "" in pair for pair in pairs):
        raise ValueError(f"{source}: metadata field tokenizer.ggml.merges holds an entry that isn't two tokens")
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _LLAMA3,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    return json.dumps(spec, ensure_ascii=False).encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's way of writing bytes as printable characters: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # not written in that alphabet: a token that stands for itself
        return token.encode()


def _fallback_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _mentions(node: Any, kind: str) -> bool:
    """Whether a component of that type is in `node`, a part of a tokenizer.json."""
    if isinstance(node, dict):
        return node.get("type") == kind or any(_mentions(value, kind) for value in node.values())
    return isinstance(node, list) and any(_mentions(value, kind) for value in node)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` with token names as str and one chat template."""
    out = {key: config[key] for key in (*_CONFIG_KEYS, "added_tokens_decoder") if key in config}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if isinstance(out.get(key), dict):
            out[key] = out[key].get("content")
        if not isinstance(out.get(key), (str, type(None))):
            raise ValueError(f"tokenizer_config.json: {key} is {type(out[key]).__name__}, needed a token")
    template = out.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    out["chat_template"] = template if isinstance(template, str) else None
    return out


def _json_object(content: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: got a {type(value).__name__}, needed a JSON object")
    return value


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, refused above {_MAX_BYTES}; this isn't a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror or error})") from error


# ---- tokenizer.model: a protobuf of pieces (field 1) and settings, read and written field by field

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # the same numbers in sentencepiece and in GGUF
_Piece = tuple[str, float, int]  # text, score, type


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _fields(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """(number, value, the bytes of the whole field) of each field of a protobuf message. Raises ValueError where it is cut."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("cut inside a number")
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        begin, key = at, varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if size is None:
                if key & 7 != 2:
                    raise ValueError(f"wire type {key & 7}")
                size = varint()
            if size > len(data) - at:
                raise ValueError("cut inside a field")
            value, at = data[at : at + size], at + size
        yield key >> 3, value, data[begin:at]


def _control_or(kind: int, piece: str) -> int:
    """The type of a piece, where control tokens go by more names than one."""
    return _CONTROL if kind == _UNKNOWN or (kind == _USER_DEFINED and _CONTROL_NAME.fullmatch(piece)) else kind


def _mark_control(content: bytes, added: Sequence[tuple[int, Mapping[str, Any]]], source: str) -> bytes:
    """The model with pieces named like control tokens made control tokens, and `added` tokens (id, entry) behind its own."""
    read, rest = _read_model(content, source)
    pieces = [(text, score, kind if kind == _UNKNOWN else _control_or(kind, text)) for text, score, kind in read]
    try:
        names = {text for text, _, _ in pieces}
        for i, entry in added:
            if i == len(pieces) and entry["content"] not in names:
                pieces.append((entry["content"], 0.0, _CONTROL if entry.get("special") or _CONTROL_NAME.fullmatch(entry["content"]) else _USER_DEFINED))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: added tokens that don't fit the sentencepiece model ({error})") from error
    return _write_model(pieces, rest)


def _read_model(content: bytes, source: str) -> tuple[list[_Piece], bytes]:
    """The pieces of a sentencepiece model, and the bytes of its other fields. Raises ValueError."""
    pieces: list[_Piece] = []
    rest = b""
    try:
        for number, value, raw in _fields(content):
            if number != 1:
                rest += raw
                continue
            piece = {n: v for n, v, _ in _fields(value)}
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, _NORMAL)))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{source}: not a sentencepiece model ({error})") from error
    return pieces, rest


def _is_bpe(content: bytes) -> bool:
    """Whether a sentencepiece model merges pairs (its training settings say type 2), as Llama's and Gemma's do."""
    settings = [dict((n, v) for n, v, _ in _fields(value)) for number, value, _ in _fields(content) if number == 2]
    return bool(settings) and settings[-1].get(3) == 2


def _fallback_json(content: bytes, adds_space: bool, start_ids: Sequence[int]) -> bytes:
    """A `tokenizer.json` that cuts text as the sentencepiece model of type BPE does: merges ordered by the score of what they make, bytes as a fallback."""
    pieces, _ = _read_model(content, "tokenizer.model")
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    score = {text: s for text, s, kind in pieces if kind == _NORMAL}
    merges = [(text[:k], text[k:]) for text in score for k in range(1, len(text)) if text[:k] in score and text[k:] in score]
    merges.sort(key=lambda pair: -score["".join(pair)])  # stable: shorter first parts first
    if adds_space and any(kind == _USER_DEFINED for _, _, kind in pieces):  # a tokenizer.json would put the space before those pieces too
        raise ValueError("this sentencepiece model adds a space to texts and has pieces of a user's own: no tokenizer.json is equal to it; export to gguf")
    special = [(i, text, kind in (_CONTROL, _UNKNOWN)) for i, (text, _, kind) in enumerate(pieces) if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)]
    start = [{"SpecialToken": {"id": pieces[i][0], "type_id": 0}} for i in start_ids]
    starts = {pieces[i][0]: {"id": pieces[i][0], "ids": [i], "tokens": [pieces[i][0]]} for i in start_ids}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": control}
            | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not control}  # others are sought where spaces are _SPACE already
            for i, text, control in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, space]} if adds_space else space,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [*start, whole], "pair": [*start, whole, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": starts
        },
        "decoder": {"type": "Sequence", "decoders": [*back, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else [])]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((text for text, _, kind in pieces if kind == _UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False).encode()


def _write_model(pieces: Sequence[_Piece], rest: bytes) -> bytes:
    def piece(text: str, score: float, kind: int) -> bytes:
        return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)

    return b"".join(_field(1, piece(*p)) for p in pieces) + rest


def _model_settings(unknown_id: int, adds_space: bool) -> bytes:
    """Settings of a BPE model with byte fallback that normalises nothing, as Llama's and Gemma's are."""

    def number(field: int, value: int) -> bytes:
        return _varint(field << 3) + _varint(value)

    absent = (1 << 64) - 1  # -1
    training = number(3, 2) + number(35, 1) + number(40, unknown_id) + b"".join(number(n, absent) for n in (41, 42, 43))
    normalising = _field(1, b"identity") + number(3, int(adds_space)) + number(4, 0) + number(5, 1)
    return _field(2, training) + _field(3, normalising)
