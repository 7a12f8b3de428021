"""Leaf modules shared by both branches: rotary embedding, scaled embedding and the gated feed-forward. Used by `block.py`; knows nothing of routes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.config import DualBranchConfig, RopeScaling


def rope_frequencies(n_dims: int, theta: float, scaling: RopeScaling, max_seq_len: int = 0) -> tuple[Tensor, float]:
    """Rotary frequencies of `n_dims` rotating elements, `(n_dims / 2,)` in radians per token (fp64), and the factor by which cos and sin grow.

    `max_seq_len` chooses the factors of longrope. Source: RoFormer (Su et al. 2021), with the stretchings described at `RopeScaling`.
    """
    pairs = torch.arange(n_dims // 2, dtype=torch.float64, device="cpu")  # numbers, also while a model is built on the meta device
    freq = theta ** (-2 * pairs / n_dims)
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    elif scaling.kind == "llama3":
        rotations = scaling.original_max_seq_len * freq / (2 * math.pi)
        smooth = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        freq = (1 - smooth) * freq / scaling.factor + smooth * freq
    elif scaling.kind == "longrope":
        factors = scaling.long_factors if max_seq_len > scaling.original_max_seq_len else scaling.short_factors
        freq = freq / torch.tensor(factors, dtype=torch.float64, device="cpu")
    elif scaling.kind == "yarn":
        low, high = (_pair_that_makes(rotations, n_dims, theta, scaling.original_max_seq_len) for rotations in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, n_dims - 1)
        ramp = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
        freq = freq / scaling.factor * ramp + freq * (1 - ramp)
    return freq, scaling.amplitude


def _pair_that_makes(rotations: float, n_dims: int, theta: float, seq_len: int) -> float:
    """Index, not rounded, of the pair that makes so many rotations over `seq_len` tokens."""
    return n_dims * math.log(seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))


class Rope(nn.Module):
    """Rotary position table, built on first use and grown by doubling. Never saved. `sliding`: of the sliding-window layers."""

    def __init__(self, config: DualBranchConfig, sliding: bool = False) -> None:
        super().__init__()
        theta, scaling = (config.sliding_rope_theta, RopeScaling()) if sliding else (config.rope_theta, config.rope_scaling)
        self.freq, self.amplitude = rope_frequencies(config.rotary_dim or config.head_dim, theta, scaling, config.max_seq_len)
        self.max_seq_len = config.max_seq_len
        self._table: Tensor | None = None  # (2, n, 1, R) fp32: cos, and sin with its sign

    def forward(self, positions: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
        """What `apply_rope` takes, cos and sin `(..., 1, R)` fp32, at integer `positions (...)`, all below `n_positions`."""
        table = self._table
        if table is None or table.shape[1] < n_positions or table.device != positions.device:
            n = min(max(256, 1 << (n_positions - 1).bit_length()), max(self.max_seq_len, n_positions))
            angle = torch.arange(n, dtype=torch.float64)[:, None] * self.freq[None]
            table = torch.stack([torch.cat([angle.cos(), angle.cos()], 1), torch.cat([-angle.sin(), angle.sin()], 1)]) * self.amplitude
            self._table = table = table[:, :, None].float().to(positions.device)
        return table[0][positions], table[1][positions]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R elements of each head of `x (N, H, D)`: pairs are (i, i + R/2), the convention of Llama checkpoints.

    `cos (N, 1, R)`, in x's dtype, holds each pair's cosine twice, `sin` its sine, negative in the first half: `x * cos + swapped halves * sin`.
    """
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat([apply_rope(x[..., :R], cos, sin), x[..., R:]], -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a constant, rounded to their dtype as the models trained with one do."""

    def __init__(self, vocab_size: int, d_model: int, scale: float) -> None:
        super().__init__(vocab_size, d_model)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * torch.tensor(self.scale, dtype=self.weight.dtype)


def activate(x: Tensor, activation: str, inplace: bool = False) -> Tensor:
    """SiLU of swiglu, or GELU (its tanh approximation) of geglu. `inplace`: may overwrite x."""
    return F.silu(x, inplace) if activation == "swiglu" else F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """`w_down(act(w_act x) * w_up x)`: SwiGLU or GeGLU (Shazeer 2020). `(N, E) -> (N, E)`."""

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.w_act = nn.Linear(d_model, d_ff, bias=False)
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)
        self.activation = activation

    def hidden(self, x: Tensor) -> Tensor:
        """Neuron activations `(N, d_ff)`; what importance and the ridge refit look at."""
        return activate(self.w_act(x), self.activation) * self.w_up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(self.hidden(x))
