"""Fewer bits per weight: which matrices of a model are packed, and how many bits each gets.

`quantize(model, "int8")`, or by part: `quantize(model, "slow=int8,fast=int4,head=int8")`. Rounding is to nearest, per row at 8 bits and in groups of 32
columns at 4; norms, biases and the gate stay as they are. Plain "int4" leaves embedding and head at 8 bits: at 4 they cost SmolLM2-135M 6.8 % of
perplexity, all other matrices together nothing (they come from 4 bits). The matrices and their products are `packed.py`'s. "int8-dynamic" is int8 whose
feed-forwards round activations too where many tokens go through together (`dynamic.py`): without AMX prompts are read sooner, with it plain int8 is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dualbranch.block import Branch
from dualbranch.dynamic import CALIBRATION_TEXT, DynamicFeedForward, smooth
from dualbranch.layers import FeedForward, ScaledEmbedding
from dualbranch.model import DualBranchModel
from dualbranch.packed import PackedEmbedding, PackedFeedForward, PackedLinear, ProductNorm

if TYPE_CHECKING:
    from dualbranch.tokenizer import TokenizerBase

DYNAMIC = "int8-dynamic"
BITS = {"fp32": 32, "bf16": 16, "int8": 8, DYNAMIC: 8, "int4": 4}
#: What may have a precision of its own: the slow branch with the K/V projections, the fast branch, and embedding with head.
PARTS = ("slow", "fast", "head")


def parse_precision(text: str) -> dict[str, str]:
    """`"int8"` or `"slow=int8,fast=int4"` to a name of `BITS` per part; parts not named stay in fp32. Raises ValueError, naming what is known."""
    if not isinstance(text, str):
        raise ValueError(f"precision is {text!r}, needed a text such as int8")
    if not text.strip():
        raise ValueError(f"precision is empty; write one of {', '.join(BITS)}, or PART=..., for the parts {', '.join(PARTS)}")
    if "=" not in text:
        text = f"slow={text},fast={text},head={'int8' if text.strip() in ('int4', DYNAMIC) else text}"
    names, named = dict.fromkeys(PARTS, "fp32"), set()
    for item in text.split(","):
        part, _, name = (x.strip() for x in item.partition("="))
        if part not in PARTS or name not in BITS:
            raise ValueError(f"precision {name or item!r} is unknown; write one of {', '.join(BITS)}, or PART=..., for the parts {', '.join(PARTS)}")
        if name == DYNAMIC and part == "head":
            raise ValueError(f"precision {item.strip()!r}: the head multiplies one token at a time, and {DYNAMIC} is for many; write head=int8")
        if part in named:
            raise ValueError(f"precision {text!r} names {part} twice; give each part one")
        names[part] = name
        named.add(part)
    return names


def normal_form(text: str) -> str:
    """The one way to write what `text` says of every part: `"int8"` for `"head=int8,fast=int8,slow=int8"`. Raises ValueError as `parse_precision` does."""
    names = parse_precision(text)
    whole = (name for name in BITS if parse_precision(name) == names)
    return next(whole, ",".join(f"{part}={name}" for part, name in names.items() if name != "fp32"))


def quantize(model: DualBranchModel, precision: str, tok: TokenizerBase | None = None) -> DualBranchModel:
    """`model`, its matrices packed at `precision`, what stays as it was in fp32: for inference only. Mutates and returns it. `tok`, its tokenizer, is needed
    for int8-dynamic alone.

    Raises ValueError for an unknown precision, or one of parts that the model doesn't have, a model whose matrices are packed already, and int8-dynamic
    without a tokenizer.
    """
    dynamic = [part for part, name in parse_precision(precision).items() if name == DYNAMIC]
    if dynamic and model.precision == "fp32":
        if tok is None:
            raise ValueError(f"{DYNAMIC} reads a text to find large channels: quantize(model, {precision!r}, tokenizer)")
        n = min(model.config.max_seq_len, 512)
        smooth(model, dynamic, torch.tensor([[tok.bos_id, *tok.encode(CALIBRATION_TEXT)][:n]], device=model.device))
    return _replace_matrices(model, precision, keep_values=True)


def lay_out(model: DualBranchModel, precision: str) -> DualBranchModel:
    """As `quantize`, but the packed matrices hold zeros: a model to load a quantized checkpoint into."""
    return _replace_matrices(model, precision, keep_values=False)


@torch.no_grad()
def unpack_branches(model: DualBranchModel) -> DualBranchModel:
    """`model`, quantized in its branches alone: their matrices in fp32 again, with the values that rounding left. Mutates and returns it."""
    assert isinstance(model.embed, nn.Embedding), "embedding and head are packed too"
    for module in reversed(list(model.blocks.modules())):  # what is inside comes first
        for name, child in list(module.named_children()):
            setattr(module, name, _unpacked(child))
    model.precision = "fp32"
    return model


def _unpacked(module: nn.Module) -> nn.Module:
    """What stands for `module` where nothing is packed; of a feed-forward, its matrices come first."""
    if isinstance(module, PackedLinear):
        weights = {"weight": module.matrix.transposed().T.contiguous()} | ({} if module.bias is None else {"bias": module.bias})
        plain = nn.Linear(*reversed(weights["weight"].shape), module.bias is not None, device="meta")
        plain.load_state_dict(weights, assign=True)
        return plain
    elif isinstance(module, ProductNorm):
        plain = nn.RMSNorm(module.normalized_shape, module.eps, device="meta")
    elif isinstance(module, PackedFeedForward):
        with torch.device("meta"):
            plain = FeedForward(module.w_act.in_features, module.w_act.out_features, module.activation)
    else:
        return module
    plain.load_state_dict(module.state_dict(), assign=True)
    return plain


@torch.no_grad()
def _replace_matrices(model: DualBranchModel, precision: str, keep_values: bool) -> DualBranchModel:
    names = parse_precision(precision)
    bits = {part: BITS[name] for part, name in names.items()}
    if model.precision != "fp32":
        raise ValueError(f"this model is at precision {model.precision} already; quantize the one it was made from")
    if set(bits.values()) == {32}:
        return model.float()
    if model.config.is_dense and bits["slow"] == bits["head"] == 32:
        raise ValueError(f"precision {precision!r} is of the fast branch alone, and the model has none; write {names['fast']}, or slow=...")
    model.requires_grad_(False)
    model.runner = None  # it holds the weights as they were
    for block in model.blocks:
        for module, part in ((block.kv, "slow"), (block.slow, "slow"), (block.fast, "fast")):
            if module is not None:
                _pack_linears(module, bits[part], keep_values)
            if isinstance(module, Branch) and names[part] == DYNAMIC:
                module.ff = DynamicFeedForward(module.ff)
            elif isinstance(module, Branch) and bits[part] < 32:
                module.ff, module.ff_norm = PackedFeedForward(module.ff), ProductNorm(module.ff_norm)
        if bits["slow"] < 32 and (block.fast is None or bits["fast"] < 32):
            block.attn_norm = ProductNorm(block.attn_norm)
    if bits["head"] < 32:
        if model.head is not None:
            model.head = _packed_linear(model.head, bits["head"], keep_values)
        embed = model.embed
        model.embed = PackedEmbedding(*embed.weight.shape, bits["head"], embed.scale if isinstance(embed, ScaledEmbedding) else 1.0)
        if keep_values:
            model.embed.matrix.pack(embed.weight)
    model.precision = normal_form(precision)
    return model.float()  # what is not packed, where it came in half precision: packed products give fp32


def _pack_linears(module: nn.Module, bits: int, keep_values: bool) -> None:
    """Replaces every linear layer below `module`. Mutates it."""
    if bits == 32:
        return
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _packed_linear(child, bits, keep_values))
        else:
            _pack_linears(child, bits, keep_values)


def _packed_linear(linear: nn.Linear, bits: int, keep_values: bool) -> PackedLinear:
    packed = PackedLinear(linear.in_features, linear.out_features, bits, linear.bias is not None)
    if keep_values:
        packed.matrix.pack(linear.weight)
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach().float().clone(), requires_grad=False)  # where the weight is, too
    return packed
