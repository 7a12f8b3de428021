"""Claims about chat formats of public checkpoints: our rendering equals their templates, turns extend each other, replies come apart."""

from __future__ import annotations

import json
import random

import pytest
from public_models import FAMILIES, QWEN3, QWEN25, tokenizer_of, write_folder, write_gguf
from test_tokenizer_hf import spm_model

from dualbranch import generate, load
from dualbranch.chat import chat_format, render_example, render_messages, render_prompt, split_reply
from dualbranch.conversation import Conversation
from dualbranch.infer import main
from dualbranch.modes import MODES, Phase, ThinkingController, fitted, resolve, token_rules
from dualbranch.sampling import SamplingParams
from dualbranch.tokenizer_hf import SentencePieceTokenizer, hf_files, tokenizer_from_files

CHATS = [name for name in FAMILIES if name != "base"]
USER = {"role": "user", "content": "the user's sum of 12"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "你好 and\nthen?"}],
]


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns"])
def test_prompts_equal_the_template_run_by_transformers(tmp_path, family, messages):
    transformers = pytest.importorskip("transformers", reason="a test dependency")
    tok = tokenizer_of(family)
    write_folder(tmp_path, family)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    got = render_prompt(tok, messages)
    thinking = chat_format(tok).thinking
    if thinking is not None and len(messages) == 3:  # Qwen 3's template forgets the empty block, we keep what was generated
        at = next(i for i in range(len(got)) if tuple(got[i : i + len(thinking.skip)]) == thinking.skip)
        del got[at : at + len(thinking.skip)]
    assert got == ids, (tok.decode(got, skip_control=False), tok.decode(ids, skip_control=False))
    if thinking is not None:
        without = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)
        assert [*ids, *thinking.skip] == without


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns"])
def test_text_openings_get_the_space_that_the_tokenizer_puts_before_a_text_only_where_one_begins(tmp_path, messages):
    """TinyLlama's turns begin with text, and its tokenizer puts a space before whatever stands behind a control token."""
    transformers = pytest.importorskip("transformers", reason="a test dependency")
    config = FAMILIES["tinyllama"][2]
    for name, content in hf_files(SentencePieceTokenizer(spm_model(tmp_path, add_dummy_prefix=True), config)).items():
        if name != "tokenizer.model":
            (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    tok = tokenizer_from_files({name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")})
    assert chat_format(tok).name == "zephyr"
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    got, ids = render_prompt(tok, messages), reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == ids, (tok.decode(got, skip_control=False), tok.decode(ids, skip_control=False))


BOXED = "Reason step by step, and put your final answer within \\\\boxed{}."


@pytest.mark.parametrize(
    "template",
    [
        QWEN25.replace("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", BOXED),
        QWEN25.replace("You are Qwen", "It\\'s Qwen < 3 | {7}"),
        QWEN25.replace("'<|im_start|>system\\nYou are", '"<|im_start|>system\\nIt\'s').replace("assistant.<|im_end|>\\n'", 'assistant.<|im_end|>\\n"'),
        "<|im_start|>system\nIt's {a} \"plain\" text\nof two lines<|im_end|>\n{% for" + QWEN25.partition("{%- for")[2],
    ],
    ids=["boxed", "escaped", "double quotes", "outside"],
)
def test_the_default_system_message_is_the_templates(template):
    jinja2 = pytest.importorskip("jinja2", reason="comes with transformers, a test dependency")
    tok = tokenizer_of("qwen2.5")
    tok.chat_template = template
    written = jinja2.Template(template, keep_trailing_newline=True).render(messages=[USER], add_generation_prompt=True)
    assert written.startswith("<|im_start|>system\n")
    assert tok.decode(render_prompt(tok, [USER]), skip_control=False) == written


def test_a_model_whose_template_opens_the_reasoning_thinks():
    tok = tokenizer_of("qwen3")
    tok.chat_template = QWEN3[: QWEN3.index("{%- if add_generation_prompt")] + "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    thinking = chat_format(tok).thinking
    assert tok.decode(thinking.open, skip_control=False) == "<think>\n"
    reply = split_reply(tok, [*thinking.open, *tok.encode("let me see"), *tok.encode("\n"), *thinking.close, *tok.encode("42"), tok.end_id])
    assert (reply.reasoning.strip(), reply.answer, reply.thought) == ("let me see", "42", True)


def test_formats_are_recognised_and_unknown_ones_are_said():
    names = {family: chat_format(tokenizer_of(family)).name for family in FAMILIES}
    expected = {"smollm2": "chatml", "qwen2.5": "chatml", "qwen3": "chatml", "llama3": "llama3", "gemma": "gemma", "phi4": "phi", "tinyllama": "zephyr"}
    assert names == expected | {"base": "plain"}
    assert [family for family in FAMILIES if chat_format(tokenizer_of(family)).thinking] == ["qwen3"]
    odd = tokenizer_of("smollm2")
    odd.chat_template = "{{ messages }}"
    with pytest.warns(UserWarning, match="chat template"):
        assert chat_format(odd).name == "plain"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_turn_is_an_exact_extension_whatever_was_generated(family):
    tok, rng = tokenizer_of(family), random.Random(0)
    f = chat_format(tok)
    for _ in range(30):
        text = [rng.randrange(10, tok.vocab_size) for _ in range(rng.randrange(4))]
        frame = [] if f.thinking is None else list(rng.choice([f.thinking.open, f.thinking.skip]))
        reply = rng.choice([[], frame, [*frame, *text], [*frame, *text, *f.end[:1]], [*frame, *text, min(f.stops)]])
        first = render_prompt(tok, [USER])
        second = render_prompt(tok, [USER, {"role": "assistant", "ids": reply}, USER])
        assert second[: len(first) + len(reply)] == first + reply


@pytest.mark.parametrize("family", list(FAMILIES))
def test_user_text_cannot_forge_a_turn(family):
    tok = tokenizer_of(family)
    forged = {"role": "user", "content": "".join(tok.control) + "hello"}
    control = [i for i in render_prompt(tok, [forged]) if tok.is_control(i)]
    assert control == [i for i in render_prompt(tok, [{"role": "user", "content": "hello"}]) if tok.is_control(i)]


def test_a_base_model_continues_the_prompt_as_it_stands():
    tok = tokenizer_of("base")
    assert render_prompt(tok, [{"role": "user", "content": "the user "}]) == tok.encode("the user ")


@pytest.mark.parametrize("family", ["qwen3", "smollm2", "gemma"])
@pytest.mark.parametrize("thinking", [True, False])
def test_examples_weigh_the_decision_and_the_answer_and_come_apart_again(family, thinking):
    from types import SimpleNamespace

    tok = tokenizer_of(family)
    f = chat_format(tok)
    problem = SimpleNamespace(task="arithmetic", prompt="What is 2 + 3?", answer="5", trace="2 + 3 = 5")
    if thinking and f.thinking is None:
        with pytest.raises(ValueError, match="no thinking mode"):
            render_example(tok, problem, thinking)
        return
    ids, weights = render_example(tok, problem, thinking, decision_weight=0.5)
    n = len(render_prompt(tok, [{"role": "user", "content": problem.prompt}]))
    assert not any(weights[:n]) and len(ids) == len(weights) and weights.count(0.5) == (f.thinking is not None)
    reply = split_reply(tok, ids[n:])
    assert (reply.answer, reply.reasoning, reply.thought, reply.finished) == ("5", problem.trace if thinking else "", thinking, True)
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": "5"} | ({"reasoning": problem.trace} if thinking else {})]
    assert render_messages(tok, messages, 0.5)[0] == [*ids, *f.end[1:]]


def play(tok, mode, room, seed, p_think):
    rng, rules = random.Random(seed), token_rules(tok, tok.vocab_size + 3)
    controller, ids, framed = ThinkingController(rules, mode, room), [], []
    while controller.phase is not Phase.DONE:
        token = controller.forced(p_think if controller.undecided else None)
        if token is None:
            allowed = [i for i, banned in enumerate(rules.banned[controller.rule].tolist()) if not banned]
            tempting = [i for i in allowed if tok.is_control(i)]
            token = rng.choice(tempting if tempting and rng.random() < 0.2 else allowed)
        ids.append(token)
        controller.advance(token)
        framed.append(controller.framing)
    return ids, framed, controller


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_reply_is_well_formed_within_budget_and_never_empty(family):
    tok = tokenizer_of(family)
    f, rules = chat_format(tok), token_rules(tok, tok.vocab_size + 3)
    for seed in range(60):
        rng = random.Random(seed)
        name, room, budget = rng.choice(list(MODES)), rng.randrange(rules.min_room, 60), rng.choice([None, 0, 1, 5])
        mode = resolve(name, thinking_budget=None if name == "fast" or f.thinking is None else budget)
        ids, framed, controller = play(tok, fitted(mode, tok), room, seed, rng.random())
        reply = split_reply(tok, ids)
        assert len(ids) <= room and reply.answer.strip() and reply.thought == controller.thought and reply.finished == controller.finished
        assert reply.thought <= (f.thinking is not None and name != "fast")
        text = [i for i, frame in zip(ids, framed, strict=True) if not frame]
        assert len(text) == controller.n_think + controller.n_answer + reply.finished
        assert tok.decode(text[: controller.n_think]) == reply.reasoning and tok.decode(text[controller.n_think :]) == reply.answer
        if mode.thinking_budget is not None:
            assert controller.n_think <= mode.thinking_budget


def test_a_model_without_thinking_mode_answers_and_says_so(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf")
    loaded = load(tmp_path / "m.gguf")
    got = generate(loaded, "hello", "think", max_tokens=6)
    assert not got.thought and got.answer.strip() and all(got.use_slow)
    for knobs in ({"mode": "fast", "thinking": "on"}, {"mode": "think", "thinking": "on"}, {"mode": "think", "thinking_budget": 5}):
        with pytest.raises(ValueError, match="no thinking mode"):
            generate(loaded, "hello", **knobs)
    assert main(["--model", str(tmp_path / "m.gguf"), "--mode", "think", "--prompt", "hello", "--max-tokens", "6"]) == 0
    said = capsys.readouterr()
    assert said.err.count("no thinking mode") == 1 and said.out.strip() and "one branch" not in said.err
    assert main(["--model", str(tmp_path / "m.gguf"), "--budget", "0.2", "--prompt", "hello", "--max-tokens", "6"]) == 0
    assert "one branch, a dense model's: mode auto with budget 0.2 computes every token in it" in capsys.readouterr().err


def test_a_conversation_with_a_public_model_reuses_every_token(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen3", family="qwen3")
    conversation = Conversation(load(tmp_path / "m.gguf"))
    for n, mode in enumerate(("think", "auto", "fast")):
        before = len(conversation.ids)
        events = list(conversation.stream("the sum", mode, SamplingParams(max_tokens=24)))
        generation = events[-1].generation
        assert conversation.n_reused >= before - 1 and bool(n) == bool(conversation.n_reused)
        assert "".join(e.piece for e in events if e.phase == "think") == generation.reasoning
        assert "".join(e.piece for e in events if e.phase == "answer") == generation.answer
        if mode != "auto":
            assert generation.thought == (mode == "think")


def test_a_public_model_survives_our_own_checkpoint(tmp_path):
    from dualbranch import save_checkpoint

    write_gguf(tmp_path / "m.gguf", "qwen3", family="qwen3")
    loaded = load(tmp_path / "m.gguf")
    save_checkpoint(tmp_path / "ours", loaded.model, loaded.tokenizer)
    again = load(tmp_path / "ours")
    assert again.tokenizer.hash == loaded.tokenizer.hash and not (tmp_path / "ours/tokenizer.model").exists()
    assert generate(again, "hello", "think", max_tokens=20).ids == generate(loaded, "hello", "think", max_tokens=20).ids


def test_a_hugging_face_folder_loads_with_its_tokenizer_and_format(tmp_path):
    transformers = pytest.importorskip("transformers", reason="a test dependency")
    import torch

    tok = tokenizer_of("qwen2.5")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=tok.vocab_size + 5, max_position_embeddings=256, **sizes)).eval()
    model.save_pretrained(tmp_path)
    write_folder(tmp_path, "qwen2.5")
    loaded = load(tmp_path)
    assert loaded.tokenizer.encode("the user") == tok.encode("the user") and chat_format(loaded.tokenizer).name == "chatml"
    ids = torch.tensor([render_prompt(loaded.tokenizer, [USER])])
    with torch.inference_mode():
        assert torch.allclose(loaded.model(ids, "slow").logits, model(ids).logits, atol=1e-4)
    assert generate(loaded, "hello", "think", max_tokens=5).answer.strip()
