"""The model's configuration: frozen dataclasses, checked on construction.

Everything here is a number or a name that changes the function the model computes. Training settings live in
`dualbranch.distill.config`. Derived values are properties, so a size stands in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kernels import SparseSpec

#: Refused before anything is allocated; far above every model this library is for.
LIMITS = {"vocab_size": 1_000_000, "d_model": 32_768, "n_layers": 512, "n_heads": 512, "d_ff": 262_144, "head_dim": 1_024, "max_seq_len": 2**24}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained length.

    `linear` divides every frequency by `factor` (Chen et al. 2023). `llama3` divides only the wavelengths longer than
    `original_max_seq_len / low_freq_factor`, with a smooth band up to `high_freq_factor` (Llama 3.1). `yarn` ramps between both
    ends counted in rotations, `beta_slow` to `beta_fast`, and scales attention by `0.1 ln(factor) + 1` (Peng et al. 2023).
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_seq_len: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1 (1 = no scaling)")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"rope_scaling.high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})")


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
        if self.n_stem < 1 or self.n_tail < 0 or self.n_stem + self.n_tail > self.n_layers:
            raise ValueError(f"n_stem ({self.n_stem}) must be at least 1 and n_stem + n_tail ({self.n_tail}) at most n_layers ({self.n_layers})")

    @property
    def dual_layers(self) -> range:
        """Indices of the blocks that have both branches."""
        return range(self.n_stem, self.n_layers - self.n_tail)

    @property
    def is_dense(self) -> bool:
        """True for a conventional decoder: no dual block, no gate."""
        return len(self.dual_layers) == 0
