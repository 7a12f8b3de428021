"""Leaf modules shared by both branches: rotary embedding and the gated feed-forward. Used by `block.py`; knows nothing of routes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.config import DualBranchConfig, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Rotary frequencies `(D/2,)` in radians per token (fp64) and the factor by which cos and sin are multiplied (1 except for YaRN).

    Source: RoFormer (Su et al. 2021), with the stretchings described at `RopeScaling`.
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float64)
    freq = theta ** (-half / head_dim)
    if scaling.kind == "none":
        return freq, 1.0
    if scaling.kind == "linear":
        return freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / freq
        rotations = scaling.original_max_seq_len / wavelength
        smooth = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        return (1 - smooth) * freq / scaling.factor + smooth * freq, 1.0

    def pair_index(rotations: float) -> float:  # the pair that makes this many rotations over the trained length
        return head_dim * math.log(scaling.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_index(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_index(scaling.beta_slow)), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp), 0.1 * math.log(scaling.factor) + 1.0


class Rope(nn.Module):
    """Rotary position table, built on first use and grown by doubling. Never saved."""

    def __init__(self, config: DualBranchConfig) -> None:
        super().__init__()
        self.freq, self.amplitude = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.max_seq_len = config.max_seq_len
        self._table: Tensor | None = None  # (2, n, 1, D) fp32: cos, and sin with its sign

    def forward(self, positions: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
        """What `apply_rope` takes, cos and sin `(..., 1, D)` fp32, at integer `positions (...)`, all below `n_positions`."""
        table = self._table
        if table is None or table.shape[1] < n_positions or table.device != positions.device:
            n = min(max(256, 1 << (n_positions - 1).bit_length()), max(self.max_seq_len, n_positions))
            angle = torch.arange(n, dtype=torch.float64)[:, None] * self.freq[None]
            table = torch.stack([torch.cat([angle.cos(), angle.cos()], 1), torch.cat([-angle.sin(), angle.sin()], 1)]) * self.amplitude
            self._table = table = table[:, :, None].float().to(positions.device)
        return table[0][positions], table[1][positions]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x (N, H, D)`: pairs are (i, i + D/2), the convention of Llama checkpoints.

    `cos (N, 1, D)`, in x's dtype, holds each pair's cosine twice, `sin` its sine, negative in the first half: `x * cos + swapped halves * sin`.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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
        a = self.w_act(x)
        return (F.silu(a) if self.activation == "swiglu" else F.gelu(a, approximate="tanh")) * self.w_up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(self.hidden(x))
