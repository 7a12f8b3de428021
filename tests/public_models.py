"""Tiny public checkpoints for tests, written here: byte-level tokenizers with the special tokens and templates of well-known families, and GGUF files;
and Hugging Face folders as models, without their tokenizers."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch

from dualbranch import DualBranchModel
from dualbranch.convert import families, huggingface
from dualbranch.tokenizer_hf import _BYTE_OF_CHAR, BPETokenizer, _byte_level_json

CHATML_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named"
    " SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>system\\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'assistant' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: December 2023\\n' }}{{- 'Today Date: ' + date_string + '\\n\\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}"
    "{%- endif -%}{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

#: name -> (pre-tokenizer, special tokens, settings of tokenizer_config.json)
FAMILIES = {
    "smollm2": ("smollm", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<gh_stars>"],
                {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML_SMOLLM2}),
    "qwen2.5": ("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"],
                {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": QWEN25}),
    "qwen3": ("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
              {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": QWEN3}),
    "llama3": ("llama-bpe", ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "add_bos_token": True, "chat_template": LLAMA3}),
    "gemma": ("gpt-2", ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
              {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True, "chat_template": GEMMA}),
    "phi4": ("gpt-4o", ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
             {"bos_token": "<|endoftext|>", "eos_token": "<|end|>", "add_bos_token": False, "chat_template": PHI4}),
    "tinyllama": ("gpt-2", ["<unk>", "<s>", "</s>"],
                  {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "add_bos_token": True, "chat_template": ZEPHYR}),
    "base": ("gpt-2", ["<|endoftext|>"], {"eos_token": "<|endoftext|>", "add_bos_token": False}),
}  # fmt: skip
_MERGES = ["Ġ t", "h e", "Ġt he", "i n", "o n", "e r", "u s", "us er", "a s", "Ċ Ċ", "ä ½", "ä½ ł", "l l", "o w", "Ġ Ġ", "1 2"]


def pieces_of(family: str) -> tuple[list[str], list[int], list[str]]:
    """Tokens, GGUF types and merges: special tokens first, then bytes, then merges."""
    special = FAMILIES[family][1]
    pieces = [*special, *_BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in _MERGES)]
    return pieces, [3] * len(special) + [1] * (len(pieces) - len(special)), list(_MERGES)


def tokenizer_of(family: str) -> BPETokenizer:
    pieces, types, merges = pieces_of(family)
    return BPETokenizer(_byte_level_json(pieces, types, merges, FAMILIES[family][0], "test"), FAMILIES[family][2])


def write_folder(folder, family: str) -> None:
    """The tokenizer's files as a Hugging Face folder has them, so that `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer_of(family)
    tok.save_files(folder)
    config = FAMILIES[family][2] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def import_folder(folder, dtype: torch.dtype = torch.float32, max_seq_len: int | None = None) -> DualBranchModel:
    """The dense model in a Hugging Face folder."""
    return families.build(*huggingface.read_folder(folder), dtype, max_seq_len)


#: arch -> metadata beyond the common, and whether tensors beyond llama's exist
SIZES = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96, "n_layers": 2}


def write_gguf(path, arch: str = "llama", quant: str = "F32", seed: int = 0, family: str = "smollm2", overrides: dict | None = None,
               rope_freqs: np.ndarray | None = None, tied: bool = True) -> dict[str, np.ndarray]:  # fmt: skip
    """A tiny model as a GGUF file; returns its tensors as they were before quantisation, by GGUF name."""
    E, H, Hk, D, F, L = (SIZES[k] for k in ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_layers"))
    rng = np.random.default_rng(seed)
    pieces, types, merges = pieces_of(family)
    w = gguf.GGUFWriter(path, arch)
    fields = {"context_length": 128, "embedding_length": E, "block_count": L, "feed_forward_length": F, "attention.head_count": H,
              "attention.head_count_kv": Hk, "attention.key_length": D, "attention.value_length": D, "rope.dimension_count": D} | (overrides or {})  # fmt: skip
    for key, value in fields.items():
        if isinstance(value, str):
            w.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            w.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, list):
            w.add_array(f"{arch}.{key}", value)
        elif value is not None:
            w.add_uint32(f"{arch}.{key}", value)
    w.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    w.add_float32(f"{arch}.rope.freq_base", 10000.0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(FAMILIES[family][0])
    w.add_token_list(pieces)
    w.add_token_types(types)
    w.add_token_merges(merges)
    config = FAMILIES[family][2]
    w.add_eos_token_id(pieces.index(config["eos_token"]))
    w.add_add_bos_token(config["add_bos_token"])
    if "chat_template" in config:
        w.add_chat_template(config["chat_template"])

    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, norm: bool = False) -> None:
        tensors[name] = (rng.standard_normal(shape) * (0.1 if norm else 0.3) + norm).astype(np.float32)
        kind = gguf.GGMLQuantizationType[quant if len(shape) == 2 else "F32"]
        if kind.name in ("F32", "F16"):
            w.add_tensor(name, tensors[name].astype(np.float16 if kind.name == "F16" else np.float32))
        else:
            w.add_tensor(name, gguf.quantize(tensors[name], kind), raw_dtype=kind)

    add("token_embd.weight", len(pieces), E)
    add("output_norm.weight", E, norm=True)
    if not tied:
        add("output.weight", len(pieces), E)
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = rope_freqs.astype(np.float32)
        w.add_tensor("rope_freqs.weight", tensors["rope_freqs.weight"])
    for i in range(L):
        b = f"blk.{i}."
        if arch == "phi3":
            add(b + "attn_qkv.weight", (H + 2 * Hk) * D, E)
            add(b + "ffn_up.weight", 2 * F, E)
        else:
            for letter, n in (("q", H), ("k", Hk), ("v", Hk)):
                add(f"{b}attn_{letter}.weight", n * D, E)
                if arch == "qwen2":
                    add(f"{b}attn_{letter}.bias", n * D)
            add(b + "ffn_gate.weight", F, E)
            add(b + "ffn_up.weight", F, E)
        add(b + "attn_output.weight", E, H * D)
        add(b + "ffn_down.weight", E, F)
        add(b + "attn_norm.weight", E, norm=True)
        add(b + "ffn_norm.weight", E, norm=True)
        if arch in ("qwen3", "gemma3"):
            add(b + "attn_q_norm.weight", D, norm=True)
            add(b + "attn_k_norm.weight", D, norm=True)
        if arch == "gemma3":
            add(b + "post_attention_norm.weight", E, norm=True)
            add(b + "post_ffw_norm.weight", E, norm=True)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tensors
