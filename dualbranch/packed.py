"""Matrices of 4, 8 or 16 bits per weight, at 4 and 8 packed in 32-bit words: a fraction of the memory, and of the bytes that a decoded token reads.

A word holds `PER[bits]` columns of one row, and L = LANES rows are interleaved: field j (from the lowest bits) of word `[n // L, c, n % L]` is row
n's column `j * C + c`, C words to a row; at 4 bits column `8 * c + j`, so that a group of 32 neighbours shares a scale; at 16 a bf16 number is the word.
The vector registers then hold the same columns of many rows. In this shape PyTorch's compiler makes `product` a loop at the memory's speed; without a
compiler it is correct and slow. Bits are never looked at as a number of another type: compiled, such a view goes through memory element by element.

Fields are stored above zero (value + 2^(bits-1)) except the highest, which keeps its sign: one AND and one conversion give a field as a power of two
times its value. Activations stay fp32: nothing is lost but what rounding the weights loses. `precision.py` puts these matrices into a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualbranch.layers import FeedForward, activate
from kernels import has_bf16_units

#: Rows interleaved: as many as an AVX-512 register has fp32 lanes, and as a register of AVX2 takes bf16 numbers.
LANES = 16
#: Columns in a word, by bits per weight.
PER = {4: 8, 8: 4, 16: 1}
#: Columns that share a scale and an offset at 4 bits.
GROUP = 32
#: Most tokens multiplied by the packed words as they are; for more the matrix is unpacked first.
FEW = 8
#: Fewest weights of a matrix at 8 bits of which a compiled loop multiplies two blocks of rows in a turn, where a block takes two registers: memory is then
#: read ahead in two places, and more registers share the activations. (Smaller ones come no sooner, and more code has to.)
LARGE = 1 << 22
#: Most hidden activations of a feed-forward that a CPU computes at once, but for those of HIDDEN_TOKENS tokens: fewer make slow products.
HIDDEN_ELEMENTS = 1 << 20
HIDDEN_TOKENS = 512
#: For PyTorch's compiler: fuse unpacking into the product, however many operators that takes, and a product and a sum into one instruction; and leave
#: attention as it is written (it would make it a call of scaled_dot_product_attention, which takes twice as long for one query).
COMPILE_OPTIONS = {
    "pattern_matcher": False,
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits: `q (N, K)` int32 in [-127, 127] and `scale (N,)`: `weight ~ q * scale`."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().int(), scale


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: `q (N, K)` int32 in [0, 15], `scale, low (N, K / GROUP)` (bf16 numbers as fp32): `weight ~ q * scale + low`. K is a multiple of GROUP."""
    groups = weight.unflatten(1, (-1, GROUP))
    low = groups.amin(-1).bfloat16().float()
    scale = ((groups.amax(-1) - low) / 15).clamp(min=1e-12).bfloat16().float()
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return q.int().flatten(1), scale, low


def split_columns(x: Tensor, bits: int) -> Tensor:
    """`(M, K)` to `(M, K / per, per)`: the columns that a word holds, along the last axis."""
    per = PER[bits]
    return x.unflatten(1, (-1, per)) if bits == 4 else x.unflatten(1, (per, -1)).transpose(1, 2)


def join_columns(pieces: list[Tensor], bits: int, axis: int) -> Tensor:
    """The inverse: `pieces`, one per field, with words along `axis`, to one tensor with columns there."""
    return torch.stack(pieces, axis + 1 if bits == 4 else axis).flatten(axis, axis + 1)


def interleave(q: Tensor, bits: int) -> Tensor:
    """Signed fields `q (N, K)` int32 of `bits` bits, to words `(N / L, K / per, L)` int32."""
    per, mask, half = PER[bits], (1 << bits) - 1, 1 << (bits - 1)
    fields = split_columns(q, bits).unflatten(0, (-1, LANES))
    words = (fields[..., -1] & mask) << (32 - bits)
    for j in range(per - 1):
        words = words | (fields[..., j] + half) << (bits * j)
    return words.transpose(1, 2).contiguous()


def raw_fields(words: Tensor, bits: int) -> list[Tensor]:
    """Each field of int32 `words`, as fp32 of the words' shape: field j times `2^(bits * j)`, all but the last above zero by half their range."""
    return [(words & (((1 << bits) - 1) << (bits * j))).float() for j in range(PER[bits] - 1)] + [(words & -(1 << (32 - bits))).float()]


def unpacked(words: Tensor, scales: Tensor | None, bits: int) -> list[Tensor]:
    """The weights in `words (B, K' / per, ...)`, field by field. `scales`: of the same rows, `(B, 1, ...)` at 8 bits, `(2, B, K' / GROUP, ...)` at 4."""
    if bits == 16:
        return [words.float()]
    half, scale, low = 1 << (bits - 1), scales, 0.0
    if bits == 4:
        low, scale = (x.float().repeat_interleave(GROUP // 8, dim=1) for x in scales)
    values = [f * 2.0 ** (-bits * j) for j, f in enumerate(raw_fields(words, bits))]
    offset = half if bits == 8 else 0  # 4-bit numbers are meant to lie above zero
    return [(f - offset) * scale + low for f in values[:-1]] + [(values[-1] + (half - offset)) * scale + low]


def integers(words: Tensor) -> list[Tensor]:
    """The 8-bit fields of `words`, one after the other, as int8 of the words' shape."""
    return [(((words >> (8 * j)) & 255) - 128).to(torch.int8) for j in range(3)] + [(words >> 24).to(torch.int8)]


def transposed(bits: int, words: Tensor, scales: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole word matrix, unpacked: `(K', N' / L, L)`; at 8 bits to int8, without its scales.

    (Compiled, it would be three times as slow if it joined the rows itself.)
    """
    if dtype == torch.int8:
        return join_columns([p.transpose(0, 1) for p in integers(words)], bits, 0)
    if bits == 8:
        scales = scales.view(-1, 1, LANES)
    return join_columns([p.to(dtype).transpose(0, 1) for p in unpacked(words, scales, bits)], bits, 0)


class PackedMatrix(nn.Module):
    """A matrix `(N, K)` at 16 bits (bf16), 8 (a scale per row) or 4 (groups of 32 columns with scale and offset). fp32 in and out.

    `words (N' / L, K' / per, L)` int32, at 16 bits bf16, with N and K rounded up to multiples of LANES and GROUP; `scales`: at 8 bits `(N',)` fp32,
    at 4 offset and scale `(2, N' / L, K' / GROUP, L)` bf16, at 16 None. A state dict holds bf16 numbers in pairs, as int32, so that nothing converts them.
    """

    def __init__(self, n_rows: int, n_columns: int, bits: int) -> None:
        super().__init__()
        if bits not in (4, 8, 16):
            raise ValueError(f"bits is {bits}; a packed matrix has 4, 8 or 16 bits per weight")
        self.n_rows, self.n_columns, self.bits = n_rows, n_columns, bits
        self.unpack: Callable[[Tensor, Tensor | None, torch.dtype], Tensor] = partial(transposed, bits)
        N, K = -(-n_rows // LANES) * LANES, -(-n_columns // GROUP) * GROUP
        self.register_buffer("words", torch.zeros(N // LANES, K // PER[bits], LANES, dtype=torch.bfloat16 if bits == 16 else torch.int32))
        scales = {4: torch.zeros(2, N // LANES, K // GROUP, LANES, dtype=torch.bfloat16), 8: torch.zeros(N)}
        self.register_buffer("scales", scales.get(bits))

    @torch.no_grad()
    def pack(self, weight: Tensor, groups: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = quantize_groups) -> None:
        """Takes the values of `weight (N, K)`, rounded (at 4 bits by `groups`). Mutates the matrix."""
        N, K = self.words.shape[0] * LANES, self.words.shape[1] * PER[self.bits]
        weight = F.pad(weight.float(), (0, K - weight.shape[1], 0, N - weight.shape[0]))
        if self.bits == 16:
            words = weight.unflatten(0, (-1, LANES)).transpose(1, 2).bfloat16()
        elif self.bits == 8:
            q, self.scales = quantize_rows(weight)
            words = interleave(q, 8)
        else:
            q, scale, low = groups(weight)
            words = interleave(q - 8, 4)
            self.scales = torch.stack([low, scale]).view(2, -1, LANES, K // GROUP).transpose(2, 3).bfloat16().contiguous()
        self.words = words.contiguous()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._bf16_buffers:
            t = destination[prefix + name]
            destination[prefix + name] = t.flatten().view(torch.int32).view(*t.shape[:-1], -1)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name in self._bf16_buffers:
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].view(torch.bfloat16)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse: bool = True) -> PackedMatrix:
        """Moves bf16 numbers between devices as integers, so that no change of dtype touches them."""
        for name in self._bf16_buffers:
            setattr(self, name, getattr(self, name).view(torch.int16))
        super()._apply(fn, recurse)
        for name in self._bf16_buffers:
            setattr(self, name, getattr(self, name).view(torch.bfloat16))
        self.unpack = partial(transposed, self.bits)  # compiled code is for one device
        return self

    @property
    def _bf16_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that hold bf16 numbers."""
        return {4: ("scales",), 8: (), 16: ("words",)}[self.bits]

    def transposed(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, unpacked: `(K, N)`."""
        unpack = partial(transposed, self.bits) if torch.compiler.is_compiling() else self.unpack
        return unpack(self.words, self.scales, dtype).flatten(1)[: self.n_columns, : self.n_rows]

    def integers(self) -> Tensor:
        """The matrix at 8 bits without its scales, padded: `(K', N')` int8."""
        return self.unpack(self.words, self.scales, torch.int8).flatten(1)

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index (...)` int64, unpacked: `(..., K)` fp32."""
        flat = index.flatten()
        block, lane = flat // LANES, flat % LANES
        scales = {4: lambda: self.scales[:, block, :, lane].transpose(0, 1), 8: lambda: self.scales[flat][:, None], 16: lambda: None}[self.bits]()
        values = join_columns(unpacked(self.words[block, :, lane], scales, self.bits), self.bits, 1)
        return values[:, : self.n_columns].view(*index.shape, self.n_columns)

    def product(self, x: Tensor) -> Tensor:
        """`x (M, K) @ matrix^T (K, N)` for few rows, without unpacking: `(M, N)` fp32. Meant to be compiled."""
        x = kept(F.pad(x, (0, self.words.shape[1] * PER[self.bits] - self.n_columns)))
        if self.bits == 16:
            y = _sums([self.words.float()], (x,)).flatten(1)
        else:
            y = self._product_of_bytes(x) if self.bits == 8 else self._product_of_groups(x)
        return y[:, : self.n_rows]

    def _product_of_bytes(self, x: Tensor) -> Tensor:
        """The product of the padded `x (M, K')` at 8 bits: `(M, N')`."""
        n_words, column, scaled = self.words.shape[1], torch.arange(x.shape[1], device=x.device), x
        for j in range(1, PER[8]):  # undoes the power of two of each field
            scaled = torch.where(column < j * n_words, scaled, x * 2.0 ** (-8 * j))
        columns = split_columns(kept(scaled), 8).unbind(2)
        y = torch.cat([torch.cat([_sums(raw_fields(words, 8), columns) for words in rows], 2) for rows in self._in_turns()], 1).flatten(1)
        above = torch.where(column < 3 * n_words, x, 0.0).sum(1, keepdim=True)
        return (y - 128 * above) * self.scales  # all fields but the last are stored 128 too high

    def _in_turns(self) -> list[tuple[Tensor, ...]]:
        """The words at 8 bits as a compiled loop takes them in one turn: one or two runs of blocks of rows, each cut into registers."""
        n_blocks, _, n_lanes = self.words.shape
        lanes = register_lanes()
        two = n_lanes > lanes and self.n_rows * self.n_columns >= LARGE and n_blocks % 2 == 0
        return [rows.split(lanes, 2) for rows in self.words.chunk(2 if two else 1)]

    def _product_of_groups(self, x: Tensor) -> Tensor:
        """As `_product_of_bytes`, at 4 bits. A turn of the loop takes the columns of a group, four at a time: additions in a row wait for each other."""
        per, half = PER[4], 1 << 3
        groups, (low, scale) = x.unflatten(1, (-1, GROUP)), self.scales.float()
        scaled = kept(x * torch.exp2(-4 * (torch.arange(x.shape[1], device=x.device) % per).float()))  # undoes the power of two of each field
        columns = scaled.unflatten(1, (-1, GROUP)).unbind(2)
        fields = [f for words in self.words.unflatten(1, (-1, GROUP // per)).unbind(2) for f in raw_fields(words, 4)]  # each (N' / L, G, L)
        total, missing = kept(groups.sum(-1)), kept(half * groups[..., per - 1 :: per].sum(-1))  # (M, G)
        y = []
        for m in range(len(x)):
            terms = [f * c[m, :, None] for f, c in zip(fields, columns, strict=True)]
            sums = _added([_added(terms[i : i + 4]) for i in range(0, GROUP, 4)])
            y.append(((sums + missing[m, :, None]) * scale + total[m, :, None] * low).sum(1).flatten())
        return torch.stack(y)


def register_lanes() -> int:
    """fp32 lanes of a vector register of this CPU, as PyTorch uses it: 16 with AVX-512; others are taken for AVX2."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _sums(fields: list[Tensor], columns: tuple[Tensor, ...]) -> Tensor:
    """The `fields (B, C, L)` of words, each times its `columns (M, C)`, added up: `(M, B, L)`."""
    return torch.stack([_added([f * c[m, :, None] for f, c in zip(fields, columns, strict=True)]).sum(1) for m in range(len(columns[0]))])


def _added(terms: list[Tensor]) -> Tensor:
    """The sum of `terms`. Python's `sum` would add them to 0, for which compiled code takes an instruction."""
    return reduce(add, terms)


def kept(x: Tensor) -> Tensor:
    """`x`, which is contiguous, stored in memory: a compiled loop that reads it many times then does not compute it as often."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False) -> None:
        super().__init__()
        self.matrix = PackedMatrix(out_features, in_features, bits)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(self.matrix, x)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """`nn.Embedding` with a packed table; `scale` as in `layers.ScaledEmbedding`."""

    def __init__(self, vocab_size: int, d_model: int, bits: int, scale: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.scale = PackedMatrix(vocab_size, d_model, bits), scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.rows(tokens) * self.scale


def product_dtype(n_tokens: int, device: torch.device) -> torch.dtype:
    """What packed matrices are multiplied in: bf16 for many tokens where the device has units for it, else fp32."""
    return torch.bfloat16 if n_tokens > FEW and has_bf16_units(device) else torch.float32


class Normed(nn.Module):
    """RMSNorm of many tokens, to bf16, as a step to compile: read and written once, instead of in six operators."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps).bfloat16()


class ProductNorm(nn.RMSNorm):
    """The RMSNorm `norm`, with its weight, where packed products alone read what it gives: in the dtype in which so many tokens are multiplied, converted
    once. (A few of them that are multiplied alone, as by one branch, are rounded all the same.)

    `step`: `Normed`, or the same compiled."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.step = norm.weight, Normed(norm.eps).forward

    def forward(self, x: Tensor) -> Tensor:
        if product_dtype(x.shape[0], x.device) == torch.float32:
            return super().forward(x)
        return (Normed(self.eps) if torch.compiler.is_compiling() else self.step)(x, self.weight)

    def _apply(self, fn, recurse: bool = True) -> ProductNorm:
        super()._apply(fn, recurse)
        self.step = Normed(self.eps).forward  # compiled code is for one device
        return self


def multiply(matrix: PackedMatrix, x: Tensor) -> Tensor:
    """`x (..., K)` times the transposed matrix: `(..., N)`. In `product_dtype`."""
    flat = x.flatten(0, -2)
    if flat.shape[0] <= FEW and torch.compiler.is_compiling():
        y = matrix.product(flat)
    else:
        y = _product(flat, matrix.transposed(product_dtype(flat.shape[0], x.device)))
    return y.unflatten(0, x.shape[:-1])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x (M, K) @ weight (K, N)` in the dtype of `weight`."""
    more = 0 if torch.compiler.is_compiling() else more_rows(len(x), weight)  # who compiles has seen to it
    x = x.to(weight.dtype)
    return (F.pad(x, (0, 0, 0, more)) @ weight)[: len(x)] if more else x @ weight


def more_rows(n: int, like: Tensor) -> int:
    """How many rows a product of n rows, in the dtype and on the device of `like`, had better have in addition: a multiple of 16, from 256 on of a power of
    two between a sixteenth and an eighth of n. PyTorch's products in bf16 on a CPU keep 0.7 MB for every shape they meet (oneDNN's code), and take longer to
    make it than such rows take."""
    return -n % (1 << max(4, n.bit_length() - 4)) if like.dtype == torch.bfloat16 and like.device.type == "cpu" else 0


class PackedFeedForward(FeedForward):
    """A feed-forward of packed matrices, taken from `ff`. On a CPU, not compiled, many tokens go through in slices, whose hidden activations stay in its
    cache where they fit; those of a long prompt would go to memory and back five times."""

    def __init__(self, ff: FeedForward) -> None:
        nn.Module.__init__(self)
        self.w_act, self.w_up, self.w_down, self.activation = ff.w_act, ff.w_up, ff.w_down, ff.activation

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] <= FEW:
            return super().forward(x)
        n = max(HIDDEN_TOKENS, HIDDEN_ELEMENTS // self.w_act.matrix.n_rows // HIDDEN_TOKENS * HIDDEN_TOKENS)
        if torch.compiler.is_compiling() or x.device.type != "cpu" or len(x) <= n:
            return self.w_down(activate(self.w_act(x), self.activation, inplace=True).mul_(self.w_up(x)))
        act, up, down = (w.matrix.transposed(product_dtype(len(x), x.device)) for w in (self.w_act, self.w_up, self.w_down))
        return torch.cat([_product(activate(_product(part, act), self.activation, inplace=True).mul_(_product(part, up)), down) for part in x.split(n)])


def logits_of(norm: nn.Module, out: nn.Module | Tensor, softcap: float | None, x: Tensor) -> Tensor:
    """Final norm and head, `out` a linear layer or its matrix or, tied, an embedding, packed or not: residual stream `(..., E)` to fp32 `(..., V)`."""
    x = norm(x)
    if isinstance(out, PackedEmbedding):
        logits = multiply(out.matrix, x)
    elif isinstance(out, Tensor):
        logits = F.linear(x, out)
    else:
        logits = F.linear(x, out.weight) if isinstance(out, nn.Embedding) else out(x)
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
