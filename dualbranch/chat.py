"""Conversations as token ids: prompts for generation, training examples with loss weights, and replies taken apart.

How a model's conversations look is its `ChatFormat`. Ours is `<bos>` and then turns:

    <|system|>text<|end|>      at most one, first
    <|user|>text<|end|>
    <|assistant|>REASONING answer<|end|>      REASONING is <think>trace</think> (thinking) or just </think> (not)

So the token after `<|assistant|>` is the *decision* to think. Public checkpoints bring other formats (ChatML, Qwen 3, Llama 3, Gemma,
Phi-4-mini, Zephyr as TinyLlama has it), recognised by their special tokens and the text of their template, which is never executed. A checkpoint
without a template is a base model: its text is continued as it stands. All text is encoded between control tokens, never across them, hence a turn is an exact
extension of the turns before it. `generate.py` and `infer.py` use `render_prompt` and `split_reply`; training and evaluation use
`render_example`.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dualbranch.tokenizer import Tokenizer, TokenizerBase

if TYPE_CHECKING:
    from dualbranch.data.problem import Problem

TOOL_CALL_TASK = "function_call"
"""The task whose answers are wrapped in `<tool_call> ... </tool_call>`, where the format has these tokens."""

_LLAMA3_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # the dates of Llama 3.2's template where no clock is


@dataclass(frozen=True)
class Opening:
    """What comes before a turn's content: `ids`, then `text` that is encoded together with the content."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class ThinkingFormat:
    """How a reply frames its reasoning: `open`, reasoning, `close`, answer; or `skip`, answer. Our own: <think>, </think>; </think>.

    `open` and `skip` may begin alike; the first token at which they part is the decision to think.
    """

    open: tuple[int, ...]
    close: tuple[int, ...]
    skip: tuple[int, ...]

    @property
    def n_common(self) -> int:
        return _n_common(self.open, self.skip)

    @property
    def decision(self) -> tuple[int, int] | None:
        """The ids that decide for and against thinking, or None where one frame begins with the whole other."""
        k = self.n_common
        return (self.open[k], self.skip[k]) if k < min(len(self.open), len(self.skip)) else None


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are written as ids; make one with `chat_format`.

    Attributes:
        start: before the first turn.
        system, user, assistant: openings of their turns; `system` None: its text goes before the first user's, a blank line between.
        between: text before the opening of every turn but the first, where openings are text and not control tokens (Zephyr).
        end: after every turn; its first token ends a reply, the rest (ChatML's line break) belongs to what follows.
        stops: all ids that end a reply.
        thinking: None where the model has no thinking mode.
        default_system: what the template says where a conversation has no system message.
        system_prefix: what the template puts before any system message, its own included.
        trims: the template strips white space around texts.
        tool_call: opening and closing token of a call, or None.
    """

    name: str
    start: tuple[int, ...]
    user: Opening
    assistant: Opening
    end: tuple[int, ...]
    stops: frozenset[int]
    system: Opening | None = None
    thinking: ThinkingFormat | None = None
    default_system: str | None = None
    system_prefix: str = ""
    trims: bool = False
    between: str = ""
    tool_call: tuple[int, int] | None = None

    def control_ids(self) -> set[int]:
        """Ids that turns of this format may hold besides text (and the text of openings)."""
        openings = [o.ids for o in (self.user, self.assistant, self.system) if o is not None]
        frames = [] if self.thinking is None else [self.thinking.open, self.thinking.close, self.thinking.skip]
        return {i for ids in (self.start, self.end, self.stops, self.tool_call or (), *openings, *frames) for i in ids}


@lru_cache(maxsize=8)
def chat_format(tok: TokenizerBase) -> ChatFormat:
    """The format of the tokenizer's model: ours, or the one its template is recognised as (warns where it isn't, and takes it for a base model)."""
    c, t = tok.control, tok.chat_template
    call = (c["<tool_call>"], c["</tool_call>"]) if {"<tool_call>", "</tool_call>"} <= c.keys() else None
    if isinstance(tok, Tokenizer):
        roles = {role: Opening((c[f"<|{role}|>"],)) for role in ("system", "user", "assistant")}
        thinking = ThinkingFormat((c["<think>"],), (c["</think>"],), (c["</think>"],))
        return ChatFormat("dualbranch", (tok.bos_id,), end=(tok.end_id,), stops=frozenset({tok.end_id}), thinking=thinking, tool_call=call, **roles)
    stops = tok.stop_ids
    plain = ChatFormat("plain", tok.start_ids, Opening(()), Opening(()), (), stops, Opening(()))
    if not t:
        return plain

    def turns(name: str, end: str, after: str = "", **rest: Any) -> ChatFormat:
        thinking = _thinking(tok, t)
        return ChatFormat(name, tok.start_ids, end=(c[end], *tok.encode(after)), stops=stops | {c[end]}, thinking=thinking, tool_call=call, **rest)

    if "<|im_start|>" in t and {"<|im_start|>", "<|im_end|>"} <= c.keys():
        roles = {role: Opening((c["<|im_start|>"],), f"{role}\n") for role in ("system", "user", "assistant")}
        return turns("chatml", "<|im_end|>", "\n", default_system=_default_system(t), **roles)
    if "<|start_header_id|>" in t and {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= c.keys():
        opening = c["<|start_header_id|>"], c["<|end_header_id|>"]
        roles = {role: Opening((opening[0], *tok.encode(role), opening[1]), "\n\n") for role in ("system", "user", "assistant")}
        dated = "Cutting Knowledge Date" in t  # from 3.1 on there is always a system turn
        llama = turns("llama3", "<|eot_id|>", trims=True, default_system="" if dated else None, system_prefix=_LLAMA3_SYSTEM if dated else "", **roles)
        return llama
    if "<start_of_turn>" in t and {"<start_of_turn>", "<end_of_turn>"} <= c.keys():
        roles = {role: Opening((c["<start_of_turn>"],), f"{spelled}\n") for role, spelled in (("user", "user"), ("assistant", "model"))}
        return turns("gemma", "<end_of_turn>", "\n", trims=True, **roles)
    if "<|end|>" in t and {"<|user|>", "<|assistant|>", "<|end|>"} <= c.keys():
        roles = {role: Opening((c[f"<|{role}|>"],)) for role in ("system", "user", "assistant") if f"<|{role}|>" in c}
        return turns("phi", "<|end|>", **roles)
    as_text = all(f"<|{role}|>\n" in t.replace("\\n", "\n") and f"<|{role}|>" not in c for role in ("user", "assistant"))
    if as_text and "eos_token" in t and tok.end_id in stops:
        roles = {role: Opening((), f"<|{role}|>\n") for role in ("system", "user", "assistant")}
        return ChatFormat("zephyr", (), end=(tok.end_id,), stops=stops, thinking=_thinking(tok, t), tool_call=call, between="\n", **roles)
    warnings.warn("the checkpoint's chat template isn't one that is known here; prompts are continued as plain text", stacklevel=2)
    return plain


def _thinking(tok: TokenizerBase, template: str) -> ThinkingFormat | None:
    c = tok.control
    if not {"<think>", "</think>"} <= c.keys():
        return None
    think, close = c["<think>"], c["</think>"]
    if tok.thinks:  # taught by us
        return ThinkingFormat((think,), (close,), (close,))
    always = re.search(r"assistant(?:\\n|\n)<think>", template)  # the template opens the reasoning itself
    if not always and "enable_thinking" not in template:
        return None
    line, blank = tok.encode("\n"), tok.encode("\n\n")  # Qwen 3: lines of their own, and an empty block where it doesn't think
    found = ThinkingFormat((think, *line), (close, *blank), (think, *blank, close, *blank))
    if found.decision is None:
        warnings.warn("the tokenizer writes a blank line as two tokens: an empty reasoning block can't be told from a beginning, thinking is off", stacklevel=3)
        return None
    return found


def _default_system(template: str) -> str | None:
    """The system message that a ChatML template writes out by itself."""
    for opening in re.finditer(r"<\|im_start\|>system(?:\\n|\n)", template):
        before, (text, end, _) = template[: opening.start()], template[opening.end() :].partition("<|im_end|>")
        if not end:
            continue
        if max(map(before.rfind, ("{{", "{%"))) <= max(map(before.rfind, ("}}", "%}"))):  # plain text of the template
            if "{{" not in text and "{%" not in text:
                return text
            continue
        quote = max("'\"", key=before.rfind)  # of the string it stands in
        if not re.search(rf"(?<!\\){quote}", text):
            return re.sub(r"\\(.)", lambda escaped: {"n": "\n", "t": "\t"}.get(escaped[1], escaped[1]), text)
    return None


@dataclass(frozen=True)
class Reply:
    """A generated reply taken apart.

    Attributes:
        reasoning: text inside the reasoning block; "" if there was none.
        answer: all text after the reasoning, control tokens dropped; this is what `verify` is given. "" if the reply was
            cut inside the reasoning.
        tool_call: text of the first `<tool_call>` (up to the end of the reply if it was cut), or None.
        thought: the reply opened a reasoning block.
        finished: the reply was ended by `<|end|>`, so nothing was cut.
    """

    reasoning: str
    answer: str
    tool_call: str | None
    thought: bool
    finished: bool


def render_prompt(tok: TokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation up to and including the opening (`<|assistant|>`) that asks for the next reply.

    Each message is `{"role": "system" | "user" | "assistant", "content": str}`. An assistant message is given either as
    `"ids"`, the generated ids after its opening (decision token first; reused verbatim, and a reply that was cut
    is closed), or as `"content"` with an optional `"reasoning"` text. Where a format has a default system message, it is written too.

    Raises ValueError for an empty list, an unknown role, a system message that isn't first, text that isn't str, reasoning for a model
    that has no thinking mode, or a conversation whose last message isn't from the user.
    """
    ids, _ = render_messages(tok, messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is from {messages[-1]['role']}, needed one from user to reply to")
    return [*ids, *_opening(tok, chat_format(tok).assistant)]


def render_messages(
    tok: TokenizerBase, messages: Sequence[Mapping[str, Any]], decision_weight: float = 0.0
) -> tuple[list[int], list[float]]:
    """The ids of a conversation as it stands, and loss weights that train its assistant messages (as in `render_example`).

    Messages and errors as in `render_prompt`, but any role may be the last.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
    f = chat_format(tok)
    ids, before_user = list(f.start), ""
    first = messages[0]
    has_system = isinstance(first, Mapping) and first.get("role") == "system"
    if f.default_system is not None and not has_system:
        ids += _turn(tok, f.system, f.system_prefix + f.default_system, first=True)
    loss_weights = [0.0] * len(ids)
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {type(message).__name__}, needed a dict with role and content")
        role = message.get("role")
        if role == "system" and i > 0:
            raise ValueError(f"{where}: a system message must be the first")
        if role in ("system", "user"):
            text = _text(message, "content", where)
            text = text.strip() if f.trims else text
            if role == "user":
                turn, before_user = _turn(tok, f.user, before_user + text, first=i == 0), ""
            elif f.system is None:
                turn, before_user = [], text + "\n\n"
            else:
                turn = _turn(tok, f.system, f.system_prefix + text, first=True)
            weights = [0.0] * len(turn)
        elif role == "assistant":
            opening, reply = _opening(tok, f.assistant), _assistant_ids(tok, message, where)
            turn = [*opening, *reply, *f.end[1:]]
            weights = [0.0] * len(opening) + _reply_weights(f, reply, decision_weight, 1.0) + [0.0] * len(f.end[1:])
        else:
            raise ValueError(f"{where}: role is {role!r}, needed system, user or assistant")
        ids += turn
        loss_weights += weights
    return ids, loss_weights


def render_example(
    tok: TokenizerBase, problem: "Problem", thinking: bool, decision_weight: float = 0.0
) -> tuple[list[int], list[float]]:
    """One problem as a training document: its ids and `loss_weights` of the same length.

    `loss_weights[i]` weights *predicting* `ids[i]` (`pack` shifts it onto the position before): 0 on bos and the prompt,
    `decision_weight` on the decision token, 1 on trace, the `</think>` after it, answer and `<|end|>`.
    """
    return render_conversation(tok, [problem], [thinking], decision_weight)


def render_conversation(
    tok: TokenizerBase, problems: Sequence["Problem"], thinking_flags: Sequence[bool], decision_weight: float = 0.0, answer_weight: float = 1.0
) -> tuple[list[int], list[float]]:
    """Several problems as the turns of one document; `ids` and `loss_weights` as in `render_example`.

    `answer_weight` is the weight of what follows `</think>`: an answer is short, and all that counts in the end.

    The document of the first n problems is a prefix of the document of all. Raises ValueError if there is no problem or
    the two sequences differ in length.
    """
    if len(problems) != len(thinking_flags):
        raise ValueError(f"{len(problems)} problems but {len(thinking_flags)} thinking_flags, needed one each")
    if not problems:
        raise ValueError("a conversation needs at least one problem")
    f = chat_format(tok)
    ids: list[int] = []
    loss_weights: list[float] = []
    for problem, thinking in zip(problems, thinking_flags, strict=True):
        if not ids:
            prompt = render_prompt(tok, [{"role": "user", "content": problem.prompt}])
        else:
            prompt = [*f.end[1:], *_turn(tok, f.user, problem.prompt.strip() if f.trims else problem.prompt), *_opening(tok, f.assistant)]
        reply = _reply_ids(
            tok,
            problem.trace if thinking else None,
            problem.answer,
            is_tool_call=problem.task == TOOL_CALL_TASK,
        )
        ids += prompt + reply
        loss_weights += [0.0] * len(prompt) + _reply_weights(f, reply, decision_weight, answer_weight)
    return ids, loss_weights


def split_reply(tok: TokenizerBase, ids: Sequence[int]) -> Reply:
    """Take a reply apart: `ids` are those generated after the opening, the decision token (forced or chosen) first.

    Works for any ids: a reply cut inside the reasoning has an empty answer, one without a decision token is all answer
    (or reasoning up to `</think>`, if that comes later), and everything from the first token that ends a reply on is ignored.
    """
    f, ids = chat_format(tok), list(ids)
    n = next((n for n, i in enumerate(ids) if i in f.stops), None)
    finished = n is not None
    if finished:
        ids = ids[:n]
    thought, reasoning, answer = _split(f.thinking, ids)
    tool_call = None
    if f.tool_call is not None and f.tool_call[0] in answer:
        call = answer[answer.index(f.tool_call[0]) + 1 :]
        if f.tool_call[1] in call:
            call = call[: call.index(f.tool_call[1])]
        tool_call = tok.decode(call)
    return Reply(tok.decode(reasoning), tok.decode(answer), tool_call, thought, finished)


def _split(f: ThinkingFormat | None, ids: list[int]) -> tuple[bool, list[int], list[int]]:
    """Whether `ids`, without what ended them, opened a reasoning block, and the ids of reasoning and answer without their frames."""
    if f is None:
        return False, [], ids
    if len(f.skip) > 1 and ids[: len(f.skip)] == list(f.skip[: len(ids)]):  # an empty block, or the beginning of one
        return False, [], ids[len(f.skip) :]
    opened = bool(ids) and ids[0] == f.open[0]
    if f.close[0] in ids:
        cut = ids.index(f.close[0])
        reasoning, answer = ids[:cut], _without(ids[cut:], f.close)
        opened = opened or cut > 0
    else:
        reasoning, answer = (ids, []) if opened else ([], ids)
    return opened, _without(reasoning, f.open), answer


def _without(ids: list[int], frame: Sequence[int]) -> list[int]:
    """`ids` without the longest beginning of `frame` they begin with."""
    return ids[_n_common(ids, frame) :]


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids `a` and `b` begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opening(tok: TokenizerBase, opening: Opening) -> list[int]:
    return [*opening.ids, *tok.encode(chat_format(tok).between + opening.text)]


def _turn(tok: TokenizerBase, opening: Opening, text: str, first: bool = False) -> list[int]:
    f = chat_format(tok)
    return [*opening.ids, *tok.encode(("" if first else f.between) + opening.text + text), *f.end]


def _reply_text(tok: TokenizerBase, text: str) -> list[int]:
    """`text` behind the opening of a reply: where that is text too, without the space that some tokenizers put before any text."""
    f = chat_format(tok)
    if not f.between or f.thinking is not None:
        return tok.encode(text)
    opening = _opening(tok, f.assistant)
    whole = tok.encode(f.between + f.assistant.text + text)
    return whole[len(opening) :] if whole[: len(opening)] == opening else tok.encode(text)


def _reply_ids(tok: TokenizerBase, reasoning: str | None, answer: str, is_tool_call: bool = False) -> list[int]:
    """Everything after the opening, up to the token that ends it; None for no reasoning."""
    f = chat_format(tok)
    answer_ids = _reply_text(tok, answer.strip() if f.trims else answer)
    if is_tool_call and f.tool_call is not None:
        answer_ids = [f.tool_call[0], *answer_ids, f.tool_call[1]]
    if f.thinking is None:
        if reasoning is not None:
            raise ValueError(f"a reply with reasoning was given, but this model ({f.name} format) has no thinking mode")
        frame: Sequence[int] = ()
    else:
        frame = f.thinking.skip if reasoning is None else [*f.thinking.open, *tok.encode(reasoning), *f.thinking.close]
    return [*frame, *answer_ids, *f.end[:1]]


def _reply_weights(f: ChatFormat, reply: Sequence[int], decision_weight: float, answer_weight: float) -> list[float]:
    """Loss weights of a reply's ids: of the frames that open or skip the reasoning only the decision counts."""
    n, t = len(reply), f.thinking
    if t is None:
        return [float(answer_weight)] * n
    frame = next((x for x in (t.skip, t.open) if tuple(reply[: len(x)]) == x), tuple(reply[:1]))
    k = min(t.n_common, max(len(frame) - 1, 0))
    weights = [float(decision_weight) if i == k else 0.0 for i in range(len(frame))]
    if frame == t.skip:
        return weights + [float(answer_weight)] * (n - len(frame))
    n_reasoning = (reply.index(t.close[0]) + 1 if t.close[0] in reply else n) - len(frame)
    return weights + [1.0] * n_reasoning + [float(answer_weight)] * (n - len(frame) - n_reasoning)


def _assistant_ids(tok: TokenizerBase, message: Mapping[str, Any], where: str) -> list[int]:
    if message.get("ids") is None:
        reasoning = _text(message, "reasoning", where) if message.get("reasoning") is not None else None
        return _reply_ids(tok, reasoning, _text(message, "content", where))
    f, ids = chat_format(tok), [int(i) for i in message["ids"]]
    ends = [n for n, i in enumerate(ids) if i in f.stops]
    if ends and ends[0] < len(ids) - 1:
        raise ValueError(f"{where}: ids go on after {tok.decode([ids[ends[0]]], skip_control=False)}; give the ids of one reply")
    if ids[-1:] == list(f.end[:1]) and ids:
        return ids
    if ends:  # ended by another token than a turn's own: both stand
        return [*ids, *f.end[:1]]
    # A cut reply: close what is open, keeping the generated ids a prefix.
    if f.thinking is not None:
        if not ids:
            ids += f.thinking.skip
        elif f.thinking.open[0] in ids and f.thinking.close[0] not in ids:
            ids += f.thinking.close
    if f.tool_call is not None and f.tool_call[0] in ids and f.tool_call[1] not in ids:
        ids.append(f.tool_call[1])
    return [*ids, *f.end[:1]]


def _text(message: Mapping[str, Any], key: str, where: str) -> str:
    text = message.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key} is {type(text).__name__}, needed str")
    return text
