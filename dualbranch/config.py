"""The model's configuration: frozen dataclasses, checked on construction.

Everything here is a number or a name that changes the function the model computes. Training settings live in
`dualbranch.distill.config`. Derived values are properties, so a size stands in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kernels import SparseSpec

#: Refused before anything is allocated; far above every model this library is for.
LIMITS = {
    "vocab_size": 1_000_000, "d_model": 32_768, "n_layers": 512, "n_heads": 512, "d_ff": 262_144, "fast_n_heads": 512, "fast_d_ff": 262_144, "d_gate": 32_768,
    "head_dim": 1_024, "max_seq_len": 2**24,
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained length.

    `linear` divides every frequency by `factor` (Chen et al. 2023). `llama3` divides only the wavelengths longer than
    `original_max_seq_len / low_freq_factor`, with a smooth band up to `high_freq_factor` (Llama 3.1). `yarn` ramps between both
    ends counted in rotations, `beta_slow` to `beta_fast`; `truncate` rounds the ramp's ends outwards to whole pairs (Peng et al. 2023).
    `longrope` divides each frequency by a factor of its own (Ding et al. 2024): `long_factors` if the model's `max_seq_len` exceeds
    `original_max_seq_len`, else `short_factors`, whatever the length of a prompt, so that a key never needs another rotation.

    `attention_factor` multiplies cos and sin under yarn and longrope; None means each paper's own value, computed from `factor`.
    """

    kind: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_seq_len: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor <= 1e6:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must lie in [1, 1e6] (1 = no scaling)")
        if not 2 <= self.original_max_seq_len <= LIMITS["max_seq_len"]:
            raise ValueError(f"rope_scaling.original_max_seq_len is {self.original_max_seq_len}; it must lie in [2, {LIMITS['max_seq_len']}]")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor}), and that 0")
        if self.kind == "yarn" and not (self.beta_fast > 0 and self.beta_slow > 0):
            raise ValueError(f"rope_scaling.beta_fast ({self.beta_fast}) and beta_slow ({self.beta_slow}) must exceed 0")
        if self.attention_factor is not None and not 0 < self.attention_factor <= 1e3:
            raise ValueError(f"rope_scaling.attention_factor is {self.attention_factor}; it must lie in (0, 1000]")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if not all(0 < f <= 1e6 for f in factors):
                raise ValueError(f"rope_scaling.{name} must lie in (0, 1e6]")
            if bool(factors) != (self.kind == "longrope"):
                raise ValueError(f"rope_scaling.{name} {'is missing' if self.kind == 'longrope' else 'has no effect'} with kind {self.kind!r}")

    @property
    def amplitude(self) -> float:
        """By how much cos and sin grow, and so the square root of how much attention scores do."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_seq_len)) if self.factor > 1 else 1.0


@dataclass(frozen=True)
class DualBranchConfig:
    """Sizes and dialect of a dual-branch decoder. Defaults are a toy that runs anywhere.

    Blocks `[0, n_stem)` are always slow and feed the gate; blocks `[n_stem, n_layers - n_tail)` are dual; the last `n_tail` are
    always slow. `n_stem == n_layers` is a conventional dense decoder (a teacher).
    """

    vocab_size: int = 512
    d_model: int = 128
    n_layers: int = 4
    n_stem: int = 1
    n_tail: int = 0
    # slow branch
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    # fast branch: same head_dim and K/V heads
    fast_n_heads: int = 2
    fast_d_ff: int = 64
    sparse: SparseSpec = field(default_factory=SparseSpec)
    # gate: width of its hidden layer
    d_gate: int = 16
    # dialect
    activation: Literal["swiglu", "geglu"] = "swiglu"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_seq_len: int = 2048
    # dialect of some families; the defaults cost nothing
    rotary_dim: int | None = None  # only the first elements of a head rotate; None = all of them
    attn_scale: float | None = None  # of attention scores; None = head_dim ** -0.5
    post_norms: bool = False  # a norm on what attention and feed-forward add to the residual
    embed_scale: float = 1.0  # of embeddings on their way in (a tied head does not see it)
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    # sliding-window layers: the slow branch reads the last `sliding_window` keys, its own included; the fast one `fast_window`
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_rope_theta: float | None = None  # their rotary base, unscaled; None = as in the other layers
    # what `convert.export` leaves of a model for the smallest device: dual blocks without their slow branch, no gate, route fast alone
    fast_only: bool = False

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ValueError(f"{name} is {value}; it must lie in [1, {limit}]")
        for name in ("n_kv_heads", "fast_n_heads", "fast_d_ff", "d_gate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_heads", "fast_n_heads"):
            if getattr(self, name) % self.n_kv_heads:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be even and lie in [2, head_dim = {self.head_dim}]")
        for name in ("short_factors", "long_factors"):
            n = len(getattr(self.rope_scaling, name))
            if n and n != (self.rotary_dim or self.head_dim) // 2:
                raise ValueError(f"rope_scaling.{name} has {n} entries; it needs one per rotating pair, {(self.rotary_dim or self.head_dim) // 2}")
        self._check_numbers()
        if self.n_stem < 1 or self.n_tail < 0 or self.n_stem + self.n_tail > self.n_layers:
            raise ValueError(f"n_stem ({self.n_stem}) must be at least 1 and n_stem + n_tail ({self.n_tail}) at most n_layers ({self.n_layers})")

    def _check_numbers(self) -> None:
        positive = {"norm_eps": 1.0, "rope_theta": 1e12, "sliding_rope_theta": 1e12, "attn_scale": 1e6, "embed_scale": 1e6, "logit_softcap": 1e6}
        for name, limit in positive.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= limit:
                raise ValueError(f"{name} is {value}; it must lie in (0, {limit:g}]")
        if self.rope_theta <= 1 or (self.sliding_rope_theta or 2) <= 1:
            raise ValueError(f"rope_theta ({self.rope_theta}) and sliding_rope_theta ({self.sliding_rope_theta}) must exceed 1")
        layers = self.sliding_layers
        if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < self.n_layers):
            raise ValueError(f"sliding_layers must be ascending indices of layers in [0, {self.n_layers}), got {list(layers)}")
        if bool(layers) != (self.sliding_window is not None):
            raise ValueError(f"sliding_layers ({len(layers)} of them) and sliding_window ({self.sliding_window}) need each other")
        if self.sliding_window is not None and not 1 <= self.sliding_window <= LIMITS["max_seq_len"]:
            raise ValueError(f"sliding_window is {self.sliding_window}; it must lie in [1, {LIMITS['max_seq_len']}]")
        if self.fast_only and self.is_dense:
            raise ValueError("fast_only has no effect on a model without dual blocks")
        if self.sliding_rope_theta is not None and not layers:
            raise ValueError("sliding_rope_theta has no effect without sliding_layers")

    def check_length(self, n_tokens: int) -> None:
        """Raises ValueError where a sequence of `n_tokens` is longer than the model reads."""
        if n_tokens > self.max_seq_len:
            raise ValueError(f"{n_tokens} tokens exceed max_seq_len = {self.max_seq_len}; shorten the prompt or raise it (rope_scaling)")

    @property
    def fast_window(self) -> int | None:
        """What the fast branch of a sliding-window layer reads: as many keys as it would choose elsewhere, but the last ones; never more than the slow one."""
        s = self.sparse
        return None if self.sliding_window is None else min(self.sliding_window, s.n_sinks + s.window + s.n_selected_blocks * s.block_size)

    @property
    def dual_layers(self) -> range:
        """Indices of the blocks that have both branches."""
        return range(self.n_stem, self.n_layers - self.n_tail)

    @property
    def is_dense(self) -> bool:
        """True for a conventional decoder: no dual block, no gate."""
        return len(self.dual_layers) == 0
