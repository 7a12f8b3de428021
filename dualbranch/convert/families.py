"""Families of public checkpoints: how each one's config and tensors become a dense `DualBranchModel`.

A family is one entry of `FAMILIES`, keyed by the config's `model_type`: defaults of settings that files leave out, which tensor holds which
of our parameters, and two functions for what is special, reading and writing it. Readers (`huggingface.py`, `gguf.py`) give a Hugging Face config
and loaders under Hugging Face names; `build` is their only way in. Nothing is allocated before every name, and every shape that is known, fits the config.

The way out (`hf_config_of`, `hf_tensors`, for `export.py`) uses the same tables. A model's family isn't stored anywhere: it is the first one whose config,
written and read back, is the model's. So a family is chosen only if it says everything the model does, and what can't be said is named.

Not imported: attention or feed-forward biases other than of q, k and v; quantised tensors; encoders of multimodal models.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualbranch.config import LIMITS, DualBranchConfig, RopeScaling
from dualbranch.model import DualBranchModel
from dualbranch.storage import CheckpointError

#: A tensor's loader, called once. If it has a `shape`, that is checked before anything is loaded.
Loader = Callable[[], Tensor]

#: Tensor of a layer -> our parameters of block i that lie in its rows, in that order. Those a model lacks (biases, norms) are left out.
LAYER = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "self_attn.q_proj.weight": ("slow.w_q.weight",),
    "self_attn.k_proj.weight": ("kv.w_k.weight",),
    "self_attn.v_proj.weight": ("kv.w_v.weight",),
    "self_attn.q_proj.bias": ("slow.w_q.bias",),
    "self_attn.k_proj.bias": ("kv.w_k.bias",),
    "self_attn.v_proj.bias": ("kv.w_v.bias",),
    "self_attn.q_norm.weight": ("slow.q_norm.weight",),
    "self_attn.k_norm.weight": ("kv.k_norm.weight",),
    "self_attn.o_proj.weight": ("slow.w_o.weight",),
    "post_attention_layernorm.weight": ("slow.ff_norm.weight",),
    "mlp.gate_proj.weight": ("slow.ff.w_act.weight",),
    "mlp.up_proj.weight": ("slow.ff.w_up.weight",),
    "mlp.down_proj.weight": ("slow.ff.w_down.weight",),
}
GEMMA_LAYER = LAYER | {
    "post_attention_layernorm.weight": ("slow.attn_post_norm.weight",),
    "pre_feedforward_layernorm.weight": ("slow.ff_norm.weight",),
    "post_feedforward_layernorm.weight": ("slow.ff_post_norm.weight",),
}
PHI_LAYER = {name: ours for name, ours in LAYER.items() if not re.search(r"[qkv]_proj|gate_proj|up_proj", name)} | {
    "self_attn.qkv_proj.weight": ("slow.w_q.weight", "kv.w_k.weight", "kv.w_v.weight"),
    "mlp.gate_up_proj.weight": ("slow.ff.w_act.weight", "slow.ff.w_up.weight"),
}


class Settings:
    """A Hugging Face config over its family's defaults, read with suspicion: every getter raises CheckpointError naming the field."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, path: str = "") -> None:
        self.values, self.defaults, self.path = values, defaults or {}, path

    def get(self, name: str) -> Any:
        """As written; null and left out are the default, or None."""
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def bad(self, name: str, needed: str, value: Any = None) -> CheckpointError:
        value = repr(self.get(name) if value is None else value)
        return CheckpointError(f"config: {self.path}{name} is {value if len(value) <= 60 else value[:57] + '...'}, needed {needed}")

    def integer(self, name: str, high: int, low: int = 1, default: int | None = None) -> int:
        value = default if self.get(name) is None else self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, f"an integer in [{low}, {high}]", value)
        return value

    def number(self, name: str, low: float = 0.0, high: float = 1e12, default: float | None = None) -> float:
        """In (low, high]."""
        value = default if self.get(name) is None else self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
            raise self.bad(name, f"a number in ({low:g}, {high:g}]", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name) or False
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def section(self, name: str) -> Settings | None:
        """A mapping inside this one; None if it is left out or empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.bad(name, "a mapping")
        return Settings(value, path=f"{self.path}{name}.") if value else None

    def must_be_off(self, *names: str) -> None:
        for name in names:
            if self.get(name):
                raise self.bad(name, "it left out: not supported")


@dataclass(frozen=True)
class Family:
    """One family. `defaults`: settings its files may leave out. `layer`: as LAYER. `special`: arguments of DualBranchConfig beyond the common
    ones, from the settings and the common ones; `written` is its inverse: settings beyond the common ones, from our config. `architecture`: the class
    of `transformers`. `shifted_norms`: its files hold norm weights minus one. `even_heads`: `transformers` refuses a
    width that isn't a multiple of the heads."""

    special: Callable[[Settings, dict[str, Any]], dict[str, Any]]
    written: Callable[[DualBranchConfig], dict[str, Any]]
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LAYER)
    shifted_norms: bool = False
    even_heads: bool = False


# ---- what families share


def _rope(s: Settings, params: Settings | None, common: dict[str, Any], max_seq_len: int | None) -> dict[str, Any]:
    """Rotary arguments, and the context: `params` is a rope_scaling or rope_parameters mapping. Follows transformers' reading of old and new files."""
    params = params or Settings({})
    context = s.integer("max_position_embeddings", LIMITS["max_seq_len"])
    share = params.number("partial_rotary_factor", high=1.0, default=s.number("partial_rotary_factor", high=1.0, default=1.0))
    n_rotary = int(common["head_dim"] * share)
    if n_rotary % 2 or n_rotary < 2:
        raise s.bad("partial_rotary_factor", f"one that makes an even number of head_dim = {common['head_dim']} rotate, not {n_rotary}")
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = {"default": "none", "su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "yarn" and s.get("model_type") == "phi3":  # its first files said so
        kind = "longrope"
    scaling: dict[str, Any] = {"kind": kind}
    if kind in ("llama3", "yarn", "longrope"):
        where = s if s.get("original_max_position_embeddings") is not None else params
        original = scaling["original_max_seq_len"] = where.integer("original_max_position_embeddings", LIMITS["max_seq_len"], 2, context)
        ratio = max(1.0, context / original)
        scaling["factor"] = params.number("factor", high=1e6, default=None if kind == "llama3" else ratio)
    if kind == "linear":
        scaling["factor"] = params.number("factor", high=1e6)
    elif kind == "llama3":
        scaling |= {name: params.number(name, high=1e6) for name in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        context = max(context, round(scaling["factor"] * original))  # switched on by hand, it stands beside the context of before
        scaling |= {"beta_fast": params.number("beta_fast", default=32.0), "beta_slow": params.number("beta_slow", default=1.0)}
        scaling["truncate"] = params.get("truncate") is None or params.flag("truncate")
        if params.get("mscale") and params.get("mscale_all_dim"):
            grown, base = (0.1 * params.number(name, high=1e3) * math.log(scaling["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
            scaling["attention_factor"] = grown / base
    elif kind == "longrope":
        for name in ("short", "long"):
            factors = params.get(f"{name}_factor")
            if not isinstance(factors, (list, tuple)) or not all(type(x) in (int, float) and 0 < x <= 1e6 for x in factors):
                raise params.bad(f"{name}_factor", "a list of numbers in (0, 1e6]")
            scaling[f"{name}_factors"] = tuple(float(x) for x in factors)
        scaling["factor"] = max(1.0, scaling["factor"])
        context = original if max_seq_len is None else context  # within it the short factors serve every prompt, as transformers has it
    elif kind != "none":
        raise params.bad("rope_type", "one of default, linear, llama3, yarn, longrope", kind)
    if kind in ("yarn", "longrope") and params.get("attention_factor") is not None:
        scaling["attention_factor"] = params.number("attention_factor", high=1e3)
    if max_seq_len is not None and not 1 <= max_seq_len <= context:
        raise ValueError(f"max_seq_len was asked to be {max_seq_len}; this model was made for at most {context} tokens")
    theta = params.number("rope_theta", low=1.0, default=s.number("rope_theta", low=1.0, default=10_000.0))
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(**scaling),
        "rotary_dim": None if n_rotary == common["head_dim"] else n_rotary,
        "max_seq_len": max_seq_len or context,
    }


def _flat_rope(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    """One rotary embedding for all layers."""
    params = s.section("rope_scaling") or s.section("rope_parameters")
    for name in ("full_attention", "sliding_attention"):
        if params is not None and params.get(name) is not None:
            raise params.bad(name, "it left out: this family has one rotary embedding for all layers")
    return _rope(s, params, common, common["max_seq_len"])


def _sliding(s: Settings, common: dict[str, Any], default: Callable[[int], bool]) -> tuple[int, ...]:
    """Indices of the sliding-window layers: as `layer_types` says, else those for which `default` holds."""
    n, types = common["n_layers"], s.get("layer_types")
    if types is None:
        return tuple(i for i in range(n) if default(i))
    if not isinstance(types, (list, tuple)) or len(types) != n or not all(t in ("full_attention", "sliding_attention") for t in types):
        raise s.bad("layer_types", f"full_attention or sliding_attention for each of {n} layers")
    return tuple(i for i, t in enumerate(types) if t == "sliding_attention")


_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def _activation(s: Settings, name: str) -> str:
    if s.get(name) not in tuple(_ACTIVATIONS):
        raise s.bad(name, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[s.get(name)]


def _written_activation(c: DualBranchConfig) -> str:
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == c.activation)


def _written_rope(c: DualBranchConfig, phi: bool = False) -> dict[str, Any]:
    """The inverse of `_rope`, with the names that files have had from the start, which every reader knows. What only Phi's readers know
    (heads that rotate in part, longrope) is left out for the others, so that their config isn't the model's."""
    r, context = c.rope_scaling, c.max_seq_len
    out: dict[str, Any] = {"rope_theta": c.rope_theta}
    if c.rotary_dim is not None and phi:
        share = c.rotary_dim / c.head_dim
        out["partial_rotary_factor"] = share if int(c.head_dim * share) == c.rotary_dim else math.nextafter(share, 1)
    scaling: dict[str, Any] = {"rope_type": r.kind}
    if r.kind in ("llama3", "yarn"):
        scaling |= {"factor": r.factor, "original_max_position_embeddings": r.original_max_seq_len}
        context = max(context, r.original_max_seq_len)
    if r.kind == "linear":
        scaling["factor"] = r.factor
    elif r.kind == "llama3":
        scaling |= {"low_freq_factor": r.low_freq_factor, "high_freq_factor": r.high_freq_factor}
    elif r.kind == "yarn":
        scaling |= {"beta_fast": r.beta_fast, "beta_slow": r.beta_slow, "truncate": r.truncate}
    elif r.kind == "longrope":  # its factor is the ratio of two lengths
        scaling |= {"type": "longrope", "short_factor": list(r.short_factors), "long_factor": list(r.long_factors)}
        out["original_max_position_embeddings"] = r.original_max_seq_len
        context = max(context, round(r.factor * r.original_max_seq_len))
        if not math.isclose(r.factor, context / r.original_max_seq_len):
            scaling["factor"] = r.factor
    if r.attention_factor is not None:
        scaling["attention_factor"] = r.attention_factor
    known = r.kind != "none" and (phi or r.kind != "longrope")
    return out | {"rope_scaling": scaling if known else None, "max_position_embeddings": context}


def _written_layer_types(c: DualBranchConfig) -> list[str]:
    return ["sliding_attention" if i in c.sliding_layers else "full_attention" for i in range(c.n_layers)]


# ---- families


def _llama(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    s.must_be_off("attention_bias", "mlp_bias")
    return {"activation": _activation(s, "hidden_act"), **_flat_rope(s, common)}


def _llama_written(c: DualBranchConfig) -> dict[str, Any]:
    return {"hidden_act": _written_activation(c), "attention_bias": False, "mlp_bias": False, **_written_rope(c)}


def _qwen(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    s.must_be_off("attention_bias")
    out = {"activation": _activation(s, "hidden_act"), **_flat_rope(s, common)}
    window = s.integer("sliding_window", LIMITS["max_seq_len"]) if s.flag("use_sliding_window") and s.get("sliding_window") is not None else None
    first = s.integer("max_window_layers", LIMITS["n_layers"], 0) if window else 0
    layers = _sliding(s, common, lambda i: window is not None and i >= first)
    if layers and window is None:
        raise s.bad("layer_types", "no sliding_attention where use_sliding_window is off")
    return out | ({"sliding_layers": layers, "sliding_window": window} if layers else {})


def _qwen2(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen(s, common)}


def _qwen3(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True, **_qwen(s, common)}


def _qwen_written(c: DualBranchConfig) -> dict[str, Any]:
    out = {"hidden_act": _written_activation(c), **_written_rope(c), "use_sliding_window": bool(c.sliding_layers), "sliding_window": c.sliding_window}
    return out | ({"layer_types": _written_layer_types(c)} if c.sliding_layers else {})


def _qwen3_written(c: DualBranchConfig) -> dict[str, Any]:
    return {"attention_bias": False, **_qwen_written(c)}


def _phi3(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    out = {"activation": _activation(s, "hidden_act"), **_flat_rope(s, common)}
    window = None if s.get("sliding_window") is None else s.integer("sliding_window", 2**31)
    if window is not None and window < out["max_seq_len"]:  # Phi-4-mini's window is wider than its context
        out |= {"sliding_layers": tuple(range(common["n_layers"])), "sliding_window": window}
    return out


def _phi3_written(c: DualBranchConfig) -> dict[str, Any]:
    out = {"hidden_act": _written_activation(c), "attention_bias": False, "original_max_position_embeddings": c.max_seq_len, **_written_rope(c, phi=True)}
    return out | {"sliding_window": c.sliding_window}


def _gemma3(s: Settings, common: dict[str, Any]) -> dict[str, Any]:
    s.must_be_off("attention_bias", "use_bidirectional_attention")
    if s.get("attn_logit_softcapping") is not None:
        warnings.warn("attn_logit_softcapping has no effect: no Gemma 3 was trained with it, and transformers does not apply it either", stacklevel=4)
    by_kind, scaling = s.section("rope_parameters"), s.section("rope_scaling")
    params, local = (by_kind.section(name) for name in ("full_attention", "sliding_attention")) if by_kind else (None, None)
    if by_kind and params is local is None:
        raise s.bad("rope_parameters", "full_attention and sliding_attention in it")
    if scaling:  # the older name; where both are, transformers puts it over the newer one
        params = Settings({**(params.values if params else {}), **scaling.values}, path=scaling.path)
    local = local or Settings({})
    kind = local.get("rope_type") or local.get("type") or "default"
    if kind != "default":
        raise local.bad("rope_type", "default: the rotary embedding of sliding-window layers is not scaled", kind)
    out = {"qk_norm": True, "post_norms": True, "embed_scale": common["d_model"] ** 0.5, "activation": _activation(s, "hidden_activation")}
    out |= _rope(s, params, common, common["max_seq_len"])
    scale = s.number("query_pre_attn_scalar", high=1e6) ** -0.5
    out["attn_scale"] = None if scale == common["head_dim"] ** -0.5 else scale
    out["logit_softcap"] = None if s.get("final_logit_softcapping") is None else s.number("final_logit_softcapping", high=1e6)
    pattern = s.integer("sliding_window_pattern", LIMITS["n_layers"])
    if layers := _sliding(s, common, lambda i: (i + 1) % pattern != 0):
        theta = local.number("rope_theta", low=1.0, default=s.number("rope_local_base_freq", low=1.0))
        out |= {"sliding_layers": layers, "sliding_window": s.integer("sliding_window", LIMITS["max_seq_len"]), "sliding_rope_theta": theta}
    return out


def _gemma3_written(c: DualBranchConfig) -> dict[str, Any]:
    scalar = c.head_dim if c.attn_scale is None else c.attn_scale**-2
    return {
        "hidden_activation": _written_activation(c),
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": c.logit_softcap,
        "layer_types": _written_layer_types(c),
        "sliding_window": c.sliding_window or 4096,
        "rope_local_base_freq": c.sliding_rope_theta or 10_000.0,
        **_written_rope(c),
    }


_COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
_GEMMA3 = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip

#: model_type -> family. Another family is another entry.
FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _llama_written, "LlamaForCausalLM", _COMMON | {"max_position_embeddings": 2048}, even_heads=True),
    "qwen2": Family(_qwen2, _qwen_written, "Qwen2ForCausalLM", _COMMON | {"max_position_embeddings": 32_768, "max_window_layers": 28}),
    "qwen3": Family(_qwen3, _qwen3_written, "Qwen3ForCausalLM", _COMMON | {"max_position_embeddings": 32_768, "max_window_layers": 28, "head_dim": 128}),
    "phi3": Family(_phi3, _phi3_written, "Phi3ForCausalLM", _COMMON | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}, PHI_LAYER),
    "gemma3_text": Family(_gemma3, _gemma3_written, "Gemma3ForCausalLM", _GEMMA3, GEMMA_LAYER, shifted_norms=True, even_heads=True),
}


# ---- the way in


def text_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: of a multimodal Gemma 3 its `text_config`, else the whole."""
    if hf_config.get("model_type") != "gemma3":
        return hf_config
    inner = hf_config.get("text_config")
    if not isinstance(inner, Mapping):
        raise CheckpointError("config: text_config is missing; a gemma3 config needs one")
    tied = hf_config.get("tie_word_embeddings")
    return {**inner, "model_type": "gemma3_text", **({} if tied is None else {"tie_word_embeddings": tied})}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Raises CheckpointError for a model_type that isn't known."""
    name = text_config(hf_config).get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"config: model_type is {name!r}; known are {', '.join(FAMILIES)} and gemma3")
    return FAMILIES[name]


def config_of(hf_config: Mapping[str, Any], max_seq_len: int | None = None) -> DualBranchConfig:
    """The dense config of a Hugging Face config. Raises CheckpointError naming the field at fault.

    `max_seq_len`: context to prepare for, at most the model's own. None: the model's own; with longrope scaling the length up to
    which the model was trained, because past it every frequency changes (`RopeScaling`).
    """
    family = family_of(hf_config)
    s = Settings(text_config(hf_config), family.defaults)
    s.must_be_off("quantization_config")
    n_heads = s.integer("num_attention_heads", LIMITS["n_heads"])
    n_kv_heads = s.integer("num_key_value_heads", LIMITS["n_heads"], default=n_heads)
    d_model, d_ff = s.integer("hidden_size", LIMITS["d_model"]), s.integer("intermediate_size", LIMITS["d_ff"])
    n_layers = s.integer("num_hidden_layers", LIMITS["n_layers"])
    common = {
        "vocab_size": s.integer("vocab_size", LIMITS["vocab_size"]),
        "d_model": d_model,
        "n_layers": n_layers,
        "n_stem": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": s.integer("head_dim", LIMITS["head_dim"], default=d_model // n_heads),
        "d_ff": d_ff,
        "fast_n_heads": n_kv_heads,  # of no effect in a dense model
        "fast_d_ff": max(1, d_ff // 8),
        "norm_eps": s.number("rms_norm_eps", high=1.0),
        "tie_embeddings": s.flag("tie_word_embeddings"),
        "max_seq_len": max_seq_len,
    }
    if n_heads % n_kv_heads:
        raise s.bad("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    try:
        return DualBranchConfig(**common | family.special(s, common))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config: {error}") from error


def tensor_names(family: Family, config: DualBranchConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> names of our parameters in its rows, for a dense model. `shapes`: our parameters of block 0 and outside blocks."""
    names: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("embed.weight",), "model.norm.weight": ("norm.weight",)}
    if not config.tie_embeddings:
        names["lm_head.weight"] = ("head.weight",)
    layer = {theirs: ours for theirs, ours in family.layer.items() if all(f"blocks.0.{x}" in shapes for x in ours)}
    for i in range(config.n_layers):
        names |= {f"model.layers.{i}.{theirs}": tuple(f"blocks.{i}.{x}" for x in ours) for theirs, ours in layer.items()}
    return names


def build(
    hf_config: Mapping[str, Any], tensors: Mapping[str, Loader], dtype: torch.dtype = torch.float32, max_seq_len: int | None = None
) -> DualBranchModel:
    """The dense model (eval mode, on the CPU) of a Hugging Face config and of loaders under Hugging Face names. `max_seq_len`: see `config_of`.

    Tensors are loaded one at a time and copied, so the peak is the model and its largest tensor. Raises CheckpointError naming the field or
    tensor: a config that isn't understood, tensors missing, left over or of wrong shape.
    """
    config, family = config_of(hf_config, max_seq_len), family_of(hf_config)
    tensors = _language_model(tensors)
    one_layer = dataclasses.replace(config, n_layers=1, n_stem=1, sliding_layers=(), sliding_window=None, sliding_rope_theta=None)
    shapes = {name: tuple(x.shape) for name, x in DualBranchModel.without_weights(one_layer).state_dict().items()}  # all layers have the same
    names = tensor_names(family, config, shapes)
    _check_names(names, tensors, config)
    of_block = re.compile(r"^blocks\.\d+\.")
    rows = {name: [shapes[of_block.sub("blocks.0.", x)] for x in ours] for name, ours in names.items()}
    expected = {name: (sum(x[0] for x in parts), *parts[0][1:]) for name, parts in rows.items()}
    for name, shape in expected.items():
        _check_shape(name, getattr(tensors[name], "shape", shape), shape)
    weights = {}
    for name, ours in names.items():
        tensor = tensors[name]()
        _check_shape(name, tensor.shape, expected[name])
        shift = family.shifted_norms and name.endswith("norm.weight")
        for our_name, part in zip(ours, tensor.split([x[0] for x in rows[name]]), strict=True):
            weights[our_name] = torch.empty(part.shape, dtype=dtype).copy_(part.float() + 1 if shift else part)
    model = DualBranchModel.without_weights(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ---- the way out

#: Settings that make no difference to what a dense model computes.
_IDLE = ("n_stem", "n_tail", "fast_n_heads", "fast_d_ff", "sparse", "d_gate")


def hf_config_of(config: DualBranchConfig, family: str | None = None) -> dict[str, Any]:
    """The Hugging Face config (`config.json` as a dict) of a dense model: of `family`, a `model_type`, if it fits, else of the first that does.

    It fits if `config_of` gives `config` back. Raises ValueError naming the fields that the nearest family can't express.
    """
    if not config.is_dense:
        raise ValueError("no public family has two branches; export one of them (branch='slow')")
    nearest: tuple[int, str, str] | None = None
    for name in sorted(FAMILIES, key=lambda x: x != family):  # stable: `family` first, the others in their order
        try:
            written = _written(config, name)
            read = config_of(written, config.max_seq_len)
        except ValueError as error:
            differing, n = str(error), len(dataclasses.fields(config))
        else:
            found = differences(config, read)
            if not found:
                return written
            differing, n = ", ".join(found), len(found)
        if nearest is None or n < nearest[0]:
            nearest = (n, name, differing)
    raise ValueError(f"no Hugging Face family can express this model; {nearest[1]}, the nearest, can't say: {nearest[2]}; export it as 'safetensors'")


def _written(c: DualBranchConfig, family: str) -> dict[str, Any]:
    if FAMILIES[family].even_heads and c.d_model % c.n_heads:
        raise ValueError(f"d_model = {c.d_model}, which isn't a multiple of n_heads = {c.n_heads}")
    return {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        **FAMILIES[family].written(c),
    }


def differences(config: Any, read: Any, tolerance: float = 1e-12) -> list[str]:
    """In which fields two configs of dense models (or parts of them) mean other functions, as `field = value (read as value)`; floats may
    differ by the relative `tolerance`."""
    found = []
    for f in dataclasses.fields(config):
        a, b = getattr(config, f.name), getattr(read, f.name)
        if dataclasses.is_dataclass(a) and f.name not in _IDLE:
            found += [f"{f.name}.{x}" for x in differences(a, b, tolerance)]
        elif f.name not in _IDLE and not _equal(a, b, tolerance):
            found.append(f"{f.name} = {str(a)[:80]} (read as {str(b)[:80]})")
    return found


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return math.isclose(a, b, rel_tol=tolerance) if isinstance(a, float) and isinstance(b, float) else a == b


def hf_tensors(model: DualBranchModel, hf_config: Mapping[str, Any]) -> dict[str, Loader]:
    """The inverse of `build`: Hugging Face name -> loader of the tensor, in fp32 where it isn't the model's own parameter.

    `model` is dense, `hf_config` its `hf_config_of`. Loaders make one tensor at a time; one that needs no change shares the model's memory.
    """
    family, parameters = family_of(hf_config), model.state_dict()

    def load(name: str, ours: tuple[str, ...]) -> Tensor:
        tensor = parameters[ours[0]] if len(ours) == 1 else torch.cat([parameters[x] for x in ours])
        return tensor.float() - 1 if family.shifted_norms and name.endswith("norm.weight") else tensor

    shapes = {name: tuple(x.shape) for name, x in parameters.items()}
    return {name: partial(load, name, ours) for name, ours in tensor_names(family, model.config, shapes).items()}


# ---- checks


def _language_model(tensors: Mapping[str, Loader]) -> dict[str, Loader]:
    """The tensors under the names of a text-only model; those of other parts of a multimodal model are left out."""
    prefixes = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
    if not any(name.startswith(tuple(prefixes)) for name in tensors):
        return dict(tensors)
    renamed = {}
    for name, load in tensors.items():
        for prefix, ours in prefixes.items():
            if name.startswith(prefix):
                renamed[ours + name.removeprefix(prefix)] = load
                break
        else:
            if name.startswith("lm_head."):
                renamed[name] = load
    return renamed


def _check_names(names: Mapping[str, Any], tensors: Mapping[str, Loader], config: DualBranchConfig) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing{f', and {len(missing) - 1} more' if missing[1:] else ''}; the config asks for them")
    left_over = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings:  # a copy of the embedding, which transformers doesn't read either
        left_over = [name for name in left_over if name != "lm_head.weight"]
    if left_over:
        more = f", and {len(left_over) - 1} more" if left_over[1:] else ""
        raise CheckpointError(f"tensor {min(left_over)} is not part of the model that the config describes{more}")


def _check_shape(name: str, got: tuple[int, ...], needed: tuple[int, ...]) -> None:
    if tuple(got) != needed:
        raise CheckpointError(f"tensor {name} has shape {list(got)}, the config asks for {list(needed)}")
