"""Conversations as token ids: prompts for generation, training examples with loss weights, and replies taken apart.

A conversation is `<bos>` and then turns:

    <|system|>text<|end|>      at most one, first
    <|user|>text<|end|>
    <|assistant|>REASONING answer<|end|>      REASONING is <think>trace</think> (thinking) or just </think> (not)

So the token after `<|assistant|>` is the *decision* to think. All text is encoded piece by piece between control tokens
(never across them), hence a turn is an exact extension of the turns before it. `generate.py` and `infer.py` use
`render_prompt` and `split_reply`; training and evaluation use `render_example`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualbranch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dualbranch.data.problem import Problem

TOOL_CALL_TASK = "function_call"
"""The task whose answers are wrapped in `<tool_call> ... </tool_call>`."""


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


def render_prompt(tok: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation up to and including the `<|assistant|>` that asks for the next reply.

    Each message is `{"role": "system" | "user" | "assistant", "content": str}`. An assistant message is given either as
    `"ids"`, the generated ids after its `<|assistant|>` (decision token first; reused verbatim, and a reply that was cut
    is closed), or as `"content"` with an optional `"reasoning"` text.

    Raises ValueError for an empty list, an unknown role, a system message that isn't first, text that isn't str, or a
    conversation whose last message isn't from the user.
    """
    ids, _ = render_messages(tok, messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is from {messages[-1]['role']}, needed one from user to reply to")
    return [*ids, tok.control["<|assistant|>"]]


def render_messages(
    tok: Tokenizer, messages: Sequence[Mapping[str, Any]], decision_weight: float = 0.0
) -> tuple[list[int], list[float]]:
    """The ids of a conversation as it stands, and loss weights that train its assistant messages (as in `render_example`).

    Messages and errors as in `render_prompt`, but any role may be the last.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
    ids, loss_weights = [tok.bos_id], [0.0]
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {type(message).__name__}, needed a dict with role and content")
        role = message.get("role")
        if role == "system" and i > 0:
            raise ValueError(f"{where}: a system message must be the first")
        if role in ("system", "user"):
            turn = [tok.control[f"<|{role}|>"], *tok.encode(_text(message, "content", where)), tok.end_id]
            weights = [0.0] * len(turn)
        elif role == "assistant":
            turn = [tok.control["<|assistant|>"], *_assistant_ids(tok, message, where)]
            weights = [0.0, float(decision_weight)] + [1.0] * (len(turn) - 2)
        else:
            raise ValueError(f"{where}: role is {role!r}, needed system, user or assistant")
        ids += turn
        loss_weights += weights
    return ids, loss_weights


def render_example(
    tok: Tokenizer, problem: "Problem", thinking: bool, decision_weight: float = 0.0
) -> tuple[list[int], list[float]]:
    """One problem as a training document: its ids and `loss_weights` of the same length.

    `loss_weights[i]` weights *predicting* `ids[i]` (`pack` shifts it onto the position before): 0 on bos and the prompt,
    `decision_weight` on the decision token, 1 on trace, the `</think>` after it, answer and `<|end|>`.
    """
    return render_conversation(tok, [problem], [thinking], decision_weight)


def render_conversation(
    tok: Tokenizer, problems: Sequence["Problem"], thinking_flags: Sequence[bool], decision_weight: float = 0.0, answer_weight: float = 1.0
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
    ids, loss_weights = [tok.bos_id], [0.0]
    for problem, thinking in zip(problems, thinking_flags, strict=True):
        prompt = [tok.control["<|user|>"], *tok.encode(problem.prompt), tok.end_id, tok.control["<|assistant|>"]]
        reply = _reply_ids(
            tok,
            problem.trace if thinking else None,
            problem.answer,
            is_tool_call=problem.task == TOOL_CALL_TASK,
        )
        ids += prompt + reply
        n_answer = len(reply) - 1 - reply.index(tok.control["</think>"])
        loss_weights += [0.0] * len(prompt) + [float(decision_weight)] + [1.0] * (len(reply) - 1 - n_answer) + [float(answer_weight)] * n_answer
    return ids, loss_weights


def split_reply(tok: Tokenizer, ids: Sequence[int]) -> Reply:
    """Take a reply apart: `ids` are those generated after `<|assistant|>`, the decision token (forced or chosen) first.

    Works for any ids: a reply cut inside the reasoning has an empty answer, one without a decision token is all answer
    (or reasoning up to `</think>`, if that comes later), and everything from the first `<|end|>` on is ignored.
    """
    ids = list(ids)
    finished = tok.end_id in ids
    if finished:
        ids = ids[: ids.index(tok.end_id)]
    open_think, close_think = tok.control["<think>"], tok.control["</think>"]
    thought = bool(ids) and ids[0] == open_think
    if close_think in ids:
        cut = ids.index(close_think)
        thought = thought or cut > 0
        reasoning, answer = ids[:cut], ids[cut + 1 :]
    elif thought:
        reasoning, answer = ids, []
    else:
        reasoning, answer = [], ids
    tool_call = None
    if tok.control["<tool_call>"] in answer:
        call = answer[answer.index(tok.control["<tool_call>"]) + 1 :]
        if tok.control["</tool_call>"] in call:
            call = call[: call.index(tok.control["</tool_call>"])]
        tool_call = tok.decode(call)
    return Reply(tok.decode(reasoning), tok.decode(answer), tool_call, thought, finished)


def _reply_ids(tok: Tokenizer, reasoning: str | None, answer: str, is_tool_call: bool = False) -> list[int]:
    """Everything after `<|assistant|>`; None for no reasoning. Its first token is the decision token."""
    answer_ids = tok.encode(answer)
    if is_tool_call:
        answer_ids = [tok.control["<tool_call>"], *answer_ids, tok.control["</tool_call>"]]
    thought = [] if reasoning is None else [tok.control["<think>"], *tok.encode(reasoning)]
    return [*thought, tok.control["</think>"], *answer_ids, tok.end_id]


def _assistant_ids(tok: Tokenizer, message: Mapping[str, Any], where: str) -> list[int]:
    if message.get("ids") is None:
        reasoning = _text(message, "reasoning", where) if message.get("reasoning") is not None else None
        return _reply_ids(tok, reasoning, _text(message, "content", where))
    ids = [int(i) for i in message["ids"]]
    if tok.end_id in ids[:-1]:
        raise ValueError(f"{where}: ids go on after <|end|>; give the ids of one reply")
    if ids and ids[-1] == tok.end_id:
        return ids
    # A cut reply: close what is open, keeping the generated ids a prefix.
    for opening, closing in (("<think>", "</think>"), ("<tool_call>", "</tool_call>")):
        if tok.control[opening] in ids and tok.control[closing] not in ids:
            ids.append(tok.control[closing])
    if not ids:
        ids.append(tok.control["</think>"])
    return [*ids, tok.end_id]


def _text(message: Mapping[str, Any], key: str, where: str) -> str:
    text = message.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key} is {type(text).__name__}, needed str")
    return text
