"""Text to token ids and back: a sentencepiece BPE model with byte fallback and fixed control tokens.

Everything that reads or writes text uses `Tokenizer`; `chat.py` puts the control tokens around it. Two promises hold:

- `decode(encode(text)) == text` for every valid Unicode string. Nothing is normalised.
- `encode` never yields a control token. Text that holds the characters `<think>` or `<|end|>` is ordinary text, so a
  user can't forge a turn; only code that asks for `tok.control["<think>"]` gets the control token.

`TokenizerBase` is what all tokenizers share: decoding, streaming, files on disk. Not here: chat formats (`chat.py`), tokenizers of public
checkpoints (`tokenizer_hf.py`).
"""

import codecs
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from dualbranch.storage import write_bytes

# A token's id is its place in this tuple; checkpoints depend on it, so append only.
CONTROL_TOKENS = (
    "<pad>",
    "<bos>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)

_UNK_ID = len(CONTROL_TOKENS)  # sentencepiece demands one; byte fallback means it is never produced
_NEWLINE_ID = _UNK_ID + 1  # always a token of its own, never merged into a longer piece
_N_RESERVED = _NEWLINE_ID + 1 + 256  # control, unk, newline, and one piece for each byte

MIN_VOCAB_SIZE = _N_RESERVED + 16
"""Smallest vocabulary `Tokenizer.train` accepts: the reserved pieces and a few characters."""

_SPACE = "\u2581"  # how sentencepiece writes a space inside pieces; a literal one needs the byte pieces
_RESERVED_IN_TRAINING = str.maketrans({_SPACE: " ", "\u2585": " ", "\0": " "})  # sentencepiece skips such lines
_TRAINING_CHUNK = 1000  # characters; sentencepiece silently skips lines above `max_sentence_length` bytes


class TokenizerBase:
    """What every tokenizer offers; a subclass brings `encode`, and calls `_set_tokens` when it is built. Immutable, picklable.

    Attributes:
        vocab_size: number of ids; ids are in [0, vocab_size).
        control: name -> id of each token that no text encodes to.
        bos_id: starts a document. end_id: ends a reply. pad_id: fills up rows; no text and no turn holds it.
        start_ids: what the model saw before every text; often `(bos_id,)`, often nothing.
        chat_template: the checkpoint's own template text, to recognise its chat format by (`chat.chat_format`); it is never executed.
        thinks: replies open with a decision to think or not, as those of our own models.
        hash: sha256 (hex) of the files; two tokenizers with one hash are the same tokenizer.
    """

    vocab_size: int
    control: dict[str, int]
    bos_id: int
    end_id: int
    pad_id: int
    start_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    thinks: bool = False
    hash: str

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; never a control token. Raises ValueError if `text` isn't a str or holds surrogates."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """File name -> content: what a checkpoint folder carries so that `tokenizer_hf.tokenizer_from_files` makes this tokenizer again."""
        raise NotImplementedError

    def _set_tokens(self, token_bytes: list[bytes], control: dict[str, int], unused: Iterable[int] = (), strips_space: bool = False) -> None:
        """`token_bytes[i]`: what token i writes. `unused` ids write nothing. `strips_space`: the tokenizer puts a space before text of its own,
        which decoding takes away again."""
        self.vocab_size, self.control = len(token_bytes), control
        # The bytes of each token: decoding is a join, and a stream equals the whole by construction.
        self._token_bytes = token_bytes
        self._control_ids = frozenset(control.values()) | frozenset(unused)
        self._text_bytes = [b"" if i in self._control_ids else b for i, b in enumerate(token_bytes)]
        self._strips_space = strips_space

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, hash={self.hash[:12]})"

    def save_files(self, folder: str | os.PathLike) -> None:
        """Write `files` into `folder`, each by temporary name, flush and rename."""
        for name, content in self.files().items():
            write_bytes(Path(folder) / name, content)

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of `ids`. Control tokens vanish, or are spelled out with `skip_control=False`.

        Bytes that aren't UTF-8 become U+FFFD, by Python's rule. Raises ValueError for an id outside the vocabulary.
        """
        return self.written(ids, skip_control).decode("utf-8", errors="replace")

    def written(self, ids: Iterable[int], skip_control: bool = True, opens: bool = True) -> bytes:
        """The bytes that `ids` write; a character may be cut at either end. `opens`: a text begins with them, so a space put before it is left out."""
        table = self._text_bytes if skip_control else self._token_bytes
        text = b"".join([table[self._check(i)] for i in ids])
        return text[opens and self._strips_space and text[:1] == b" " :]

    def stream(self, skip_control: bool = True) -> "TokenStream":
        """A decoder for ids that arrive one at a time; what it returns joins to `decode` of all ids."""
        return TokenStream(self, skip_control)

    def is_control(self, token: int) -> bool:
        """Whether `token` is a control token, or one that writes nothing at all."""
        return token in self._control_ids

    def _check(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary [0, {self.vocab_size})")
        return token


class Tokenizer(TokenizerBase):
    """The tokenizer of our own models. Make one with `Tokenizer.load` or `Tokenizer.train`.

    `control` holds each of `CONTROL_TOKENS`; `model_bytes` is the serialized sentencepiece model, as `save` writes it.
    """

    thinks = True

    def __init__(self, model_bytes: bytes, source: str = "model"):
        """Build from a serialized sentencepiece model. `source` names it in errors.

        Raises ValueError if the bytes aren't a sentencepiece model, or one without our control tokens or byte pieces.
        """
        self._processor = load_processor(model_bytes, source)
        self.model_bytes = model_bytes
        self.hash = hashlib.sha256(model_bytes).hexdigest()
        n_pieces: int = self._processor.GetPieceSize()
        control = {name: i for i, name in enumerate(CONTROL_TOKENS)}
        for name, i in control.items():
            if i >= n_pieces or self._processor.IdToPiece(i) != name or not self._processor.IsControl(i):
                raise ValueError(
                    f"{source}: a sentencepiece model, but not one of dualbranch: token {i} must be the control token"
                    f" {name}; train one with Tokenizer.train"
                )
        self._set_tokens([piece_bytes(self._processor, i) for i in range(n_pieces)], control)
        self.pad_id = control["<pad>"]
        self.bos_id = control["<bos>"]
        self.end_id = control["<|end|>"]
        self.start_ids = (self.bos_id,)
        n_bytes = sum(self._processor.IsByte(i) for i in range(n_pieces))
        if n_bytes != 256:
            raise ValueError(f"{source}: the model has {n_bytes} byte pieces, needed 256 (train with byte fallback)")
        self._literal_space_ids = [self._processor.PieceToId(f"<0x{b:02X}>") for b in _SPACE.encode()]

    def __reduce__(self):
        return Tokenizer, (self.model_bytes,)

    @staticmethod
    def load(path: str | os.PathLike) -> "Tokenizer":
        """The tokenizer in the file at `path`, or in the checkpoint folder at `path` (its `tokenizer.model`).

        Raises ValueError if there is no such file or it isn't one of our tokenizers.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        try:
            model_bytes = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: no tokenizer there ({error.strerror or error})") from error
        return Tokenizer(model_bytes, source=str(path))

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model_bytes}

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to the file `path` (temporary name, flush, rename)."""
        write_bytes(Path(path), self.model_bytes)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike | None = None) -> "Tokenizer":
        """Train a BPE tokenizer of exactly `vocab_size` ids on `texts`, write it to `path` if given, and return it.

        The same texts in the same order give the same bytes. All text is held in memory. When there are more distinct
        characters than half of the free vocabulary, the rarest are left to byte fallback.

        Raises ValueError for a vocabulary below `MIN_VOCAB_SIZE`, no text, or too little text to fill the vocabulary.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one str, needed an iterable of str")
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size is {vocab_size!r}, needed at least {MIN_VOCAB_SIZE}: 256 byte pieces,"
                f" {len(CONTROL_TOKENS)} control tokens, and room for characters"
            )
        lines = [line for text in texts for line in _training_lines(text)]
        if not lines:
            raise ValueError("no text to train a tokenizer on: every text is empty")
        counts = Counter()
        for line in lines:
            counts.update(line)
        room = max(1, (vocab_size - _N_RESERVED) // 2)
        rare = str.maketrans({char: "\n" for char, _ in counts.most_common()[room:]})
        if rare:  # cut lines at rare characters (sentencepiece's own character_coverage stops at 0.98)
            lines = [part for line in lines for part in line.translate(rare).split("\n") if part]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                pad_id=0,
                bos_id=1,
                eos_id=-1,
                unk_id=_UNK_ID,
                pad_piece=CONTROL_TOKENS[0],
                bos_piece=CONTROL_TOKENS[1],
                control_symbols=list(CONTROL_TOKENS[2:]),
                user_defined_symbols=["\n"],
                max_sentence_length=8 * _TRAINING_CHUNK,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            largest = re.search(r"too high .*value <= (\d+)", reason)
            advice = f"this text fills at most {largest[1]}" if largest else f"sentencepiece says: {reason}"
            raise ValueError(
                f"could not train a tokenizer with vocab_size {vocab_size} on {len(lines)} lines, {counts.total()}"
                f" characters: {advice}; give more text or set a smaller vocab_size"
            ) from error
        tokenizer = Tokenizer(model.getvalue(), source="trained model")
        if path is not None:
            tokenizer.save(path)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; never a control token. Raises ValueError if `text` isn't a str or holds surrogates."""
        check_text(text)
        if _SPACE not in text:
            return self._processor.EncodeAsIds(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            if i:
                ids += self._literal_space_ids
            ids += self._processor.EncodeAsIds(part)
        return ids


class TokenStream:
    """Incremental decoder, from `stream` of a tokenizer. Holds back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: TokenizerBase, skip_control: bool):
        self._tokenizer = tokenizer
        self._table = tokenizer._text_bytes if skip_control else tokenizer._token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer._strips_space

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none. Raises ValueError for an id outside the vocabulary."""
        text = self._table[self._tokenizer._check(token)]
        if self._at_start and text:
            self._at_start = False
            text = text[text[:1] == b" " :]
        return self._decoder.decode(text)

    def flush(self) -> str:
        """What is left at the end (U+FFFD for a character that never got complete). The stream can then be reused."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = self._tokenizer._strips_space
        return text


def check_text(text: str) -> None:
    """Raises ValueError if `text` isn't a str that UTF-8 can write."""
    if not isinstance(text, str):
        raise ValueError(f"encode got {type(text).__name__}, needed str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: lone surrogate {text[error.start]!r} at character {error.start}") from error


def load_processor(model_bytes: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece's own object. Raises ValueError if the bytes aren't a model of its."""
    if not model_bytes:
        raise ValueError(f"{source}: the tokenizer file is empty")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(model_bytes)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise ValueError(f"{source}: not a sentencepiece model ({len(model_bytes)} bytes)")
    return processor


def piece_bytes(processor: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    """What a token of a sentencepiece model writes."""
    piece = processor.IdToPiece(token)
    if processor.IsByte(token):  # "<0x1F>"
        return bytes([int(piece[3:5], 16)])
    if processor.IsControl(token) or processor.IsUnknown(token):
        return piece.encode()
    return piece.replace(_SPACE, " ").encode()


def _training_lines(text: str) -> Iterator[str]:
    """Non-empty chunks of `text` without newlines (a token of their own) and without what sentencepiece skips."""
    if not isinstance(text, str):
        raise ValueError(f"texts holds {type(text).__name__}, needed str")
    for line in text.split("\n"):
        line = line.encode("utf-8", errors="replace").decode().translate(_RESERVED_IN_TRAINING)
        for start in range(0, len(line), _TRAINING_CHUNK):
            yield line[start : start + _TRAINING_CHUNK]
