"""The decode step: what one block does to one new token, written so that it compiles to a single loop nest.

`Runner` does for a few new tokens, one by one, what `DualBranchModel.forward` does for any tokens, and returns the same; `model.py` hands such
passes over once `compile_decode` made one. Every layer of a kind runs the same code with its own weights, in place on the cache, however full that is.
`plain_steps` are the pieces as modules; `compiled.py` turns them into machine code, once per machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dualbranch import dynamic, prompt
from dualbranch.block import Block
from dualbranch.cache import KVCache
from dualbranch.packed import FEW, Normed, PackedMatrix, ProductNorm, kept, logits_of, transposed
from dualbranch.prompt import ModuleStep, PromptBlock
from dualbranch.routing import Angles, Decide, Partition
from dualbranch.sparse_prompt import GROUP, MOST_BLOCKS, NONE, best, ranges
from kernels import SparseSpec, has_bf16_units

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel, ModelOutput

#: Into how many pieces the keys of a dense step are cut, at most: for cores to share, and long, so that the C++ compiler fetches ahead in loops over them.
PIECES = 8
#: For up to so many query heads that share keys, a loop sums two halves of the values' columns in a turn: more sums would not fit a CPU's 16 registers.
FEW_HEADS = 3
#: Up to so many new tokens, of one row or one each of several rows, go one by one: that takes less time than one pass of all, which unpacks every packed
#: matrix first (docs/experiments.md, with AVX2). FEW where a CPU has units for bf16, in which a pass takes half as long; FEW_IN_FP32 where nothing is packed.
FEW_OF_A_ROW, FEW_OF_ROWS, FEW_IN_FP32 = 16, 32, 4
#: More keys than any model reads densely by rule.
MANY = 1 << 62


@dataclass(frozen=True)
class NewestToken:
    """The newest token of the only row as a group of queries: the interface of `routing.TokenGroup`, in operators that compile to a few loops.

    It stands at `position (1,)` of a cache whose blocks hold `block_size` slots. `sparse`: whether it is beyond dense_len where its branch reads by a rule.
    `reach`: as `reach_of` says.
    """

    reach: int
    block_size: int
    position: Tensor
    cos: Tensor
    sin: Tensor
    sparse: bool

    def angles(self, sliding: bool) -> Angles:
        """The layer's own, whichever it is."""
        return self.cos, self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, reads: SparseSpec | None) -> Tensor:
        """Attention of `q (1, H, D)` over `k, v (1, Hk, C, D)`, of which slots up to `position` hold tokens: `(1, H, D)`."""
        q, together = q.view(k.shape[1], -1, q.shape[-1]), self.block_size  # (Hk, G, D)
        if not self.sparse:
            n_keys, pieces = self.reach * together, math.gcd(PIECES, together)
            seen = torch.arange(n_keys, device=q.device) <= self.position
            return read(q, *(x[0, :, :n_keys].unflatten(1, (pieces, -1)) for x in (k, v)), seen.view(1, pieces, -1))
        blocks, seen = sparse_blocks(q, pooled, self.reach, self.position, reads)
        head = torch.arange(k.shape[1], device=k.device)[:, None]
        return read(q, *(x[0].unflatten(1, (-1, together))[head, blocks] for x in (k, v)), seen)


def read(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of `q (Hk, G, D)` over those of `k, v (Hk, P, J, D)`, P pieces of J keys each, with `seen (Hk or 1, P, J)`, at least one:
    `(1, Hk * G, D)`, fp32.

    Written as sums, a query head at a time, it compiles to loops that read keys and values once, as they lie, in each piece a KV head after the other (in
    turn, they take twice as long to come from memory). Products of matrices with as few rows as G take twice as long, scaled_dot_product_attention three
    times.
    Cores share the pieces: pieces come first, and scores are stored piece by piece before they are masked, or all keys become one loop, in which nothing
    is fetched ahead. Values are divided by the sum of their weights last, so that the exponentials are a loop for all cores; up to FEW_HEADS query
    heads sum halves of their columns side by side, so that whole lines are read.
    """
    q = kept(q.float() * q.shape[-1] ** -0.5)
    k, v = (x.transpose(0, 1) for x in (k.float(), v.float().masked_fill(~seen[..., None], 0.0)))  # (P, Hk, J, D)
    scores = kept(torch.stack([(q_g[:, None] * k).sum(-1) for q_g in q.unbind(1)], 1))  # (P, G, Hk, J)
    scores = scores.masked_fill(~seen.transpose(0, 1)[:, None], float("-inf"))
    e = kept((scores - scores.amax((0, 3), keepdim=True)).exp())
    columns = v.unflatten(-1, (2 if q.shape[1] <= FEW_HEADS else 1, -1)).unbind(-2)
    parts = kept(torch.stack([torch.stack([(w[..., None] * x).sum(2) for x in columns], 2).flatten(2) for w in e.unbind(1)], 1))  # (P, G, Hk, D)
    return (parts.sum(0) / e.sum((0, 3))[..., None]).transpose(0, 1).flatten(0, 1)[None]


def linear_as_sums(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of one row `x (1, K)`, for the compiler: it makes it a loop at the memory's speed, and F.linear a library's product at a quarter of it."""
    y = (weight * x).sum(-1)[None]
    return y if bias is None else y + bias


def sparse_blocks(q: Tensor, pooled: Tensor, reach: int, position: Tensor, spec: SparseSpec) -> tuple[Tensor, Tensor]:
    """Which keys the query `q (Hk, G, D)` at `position (1,)`, at least dense_len, reads: `blocks (Hk, P)` int64 that hold them, and which of their keys
    count, `seen (Hk, P, block_size)`. No key counts twice. The rule is `kernels.reference`'s (but `topk` may choose either of two equal blocks)."""
    ids = chosen_blocks(q, pooled, reach, position, spec)
    blocks, first, end = ranges(ids, position.expand(len(ids)), spec)
    within = torch.arange(spec.block_size, device=q.device).float()
    return blocks, (within >= first[..., None]) & (within < end[..., None])


def chosen_blocks(q: Tensor, pooled: Tensor, reach: int, position: Tensor, spec: SparseSpec) -> Tensor:
    """The `(Hk, M)` int64 blocks, best first, whose mean keys `pooled (1, N, Hk, D)` suit the query `q (Hk, G, D)` best; -1 where there is no further one.

    As for prompts (`sparse_prompt.Choose`), the best blocks are among the best groups of GROUP. Here a group's blocks lie `reach` apart, so that maxima are
    taken of whole registers."""
    M, W, device, inf = spec.n_selected_blocks, reach, q.device, float("inf")
    if M == 0:
        return torch.empty(len(q), 0, dtype=torch.int64, device=device)
    block = torch.arange(GROUP * W, device=device)
    end = (block.view(GROUP, W).float() + 1) * spec.block_size
    last_end = torch.minimum(position - spec.window + spec.block_size, position + 1).float()  # a block that may be chosen ends there or before
    means = pooled[0][block.clamp(max=pooled.shape[1] - 1)].view(GROUP, W, *pooled.shape[2:]).permute(2, 0, 1, 3)
    scores = (kept(q.sum(1))[:, None, None] * means).sum(-1)
    scores = kept(torch.where((end <= last_end) & (end > spec.n_sinks), scores, -inf).contiguous())  # (Hk, GROUP, W)
    if calls_topk(spec):
        found, chosen = F.pad(scores.flatten(1), (0, M), value=-inf).topk(M, dim=-1)
        return torch.where(found > -inf, chosen, -1)
    of_group = kept(scores.amax(1))
    first = kept(torch.where(scores == of_group[:, None], block.view(GROUP, W).float(), NONE).amin(1))  # of equal blocks the lowest counts
    found, first = best(of_group, first, M, ahead=1)
    members = kept(torch.where(found > -inf, first, 0.0).long() % W)[..., None] + torch.arange(GROUP, device=device) * W  # (Hk, M, GROUP)
    candidates = torch.where(found[..., None] > -inf, scores.flatten(1).gather(1, members.flatten(1)).unflatten(1, (M, GROUP)), -inf)
    found, chosen = best(kept(candidates.flatten(1)), kept(members.flatten(1).float()), M, ahead=1)
    return torch.where(found > -inf, chosen, -1.0).long()


def calls_topk(spec: SparseSpec) -> bool:
    """Whether so many blocks are chosen that a step leaves that to PyTorch's `topk`, a call that keeps all that is in between off the stack."""
    return spec.n_selected_blocks > MOST_BLOCKS


class BlockStep(nn.Module):
    """One layer's work on the newest token, by one branch, with the weights it is given: `block` says only how.

    Called with the layer's `weights` by name, `x (1, E)`, `cos, sin`, the layer's cache `k, v (1, Hk, C, D)` and mean keys `pooled (1, N, Hk, D)`,
    `reach (n,)` whose length alone matters (`reach_of`), and `position (1,)` int64. Writes key, value, the mean key of the selection block the token belongs
    to (meaningful once that is complete), and over `x` what the layer makes of it. `calls_topk`: as the function.
    """

    def __init__(self, block: Block, slow: bool, sparse: bool, block_size: int) -> None:
        super().__init__()
        self.how = (block,)  # in a tuple it is no submodule: its weights are not this module's
        self.slow, self.sparse, self.block_size = slow, sparse, block_size
        self.calls_topk = sparse and calls_topk((block.slow if slow else block.fast).reads)

    def weights_of(self, block: Block) -> dict[str, Tensor]:
        """The tensors of `block` that this step needs."""
        other = "fast." if self.slow else "slow."
        return {name: t.detach() for name, t in (*block.named_parameters(), *block.named_buffers()) if not name.startswith(other)}

    def forward(
        self, weights: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, pooled: Tensor, reach: Tensor, position: Tensor
    ) -> None:
        token = NewestToken(reach.shape[0], self.block_size, position, cos, sin, self.sparse)

        def store(new_k: Tensor, new_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            for cached, new in ((k, new_k), (v, new_v)):
                cached.index_copy_(2, position, new.to(cached.dtype)[None].transpose(1, 2))
            block = position // self.block_size
            own = block * self.block_size + torch.arange(self.block_size, device=x.device)
            pooled.index_copy_(1, block, k[:, :, own].float().mean(2)[:, None])
            return k, v, pooled

        partition = Partition(token if self.slow else None, None if self.slow else token, None, cos, sin)
        x.copy_(functional_call(self.how[0], weights, (x, partition, store)))


def reach_of(position: int, block_size: int, sparse: bool) -> int:
    """How much of the cache a step for a token at `position` looks at: a dense one so many blocks, a sparse one so many times GROUP, some of which may not
    exist."""
    begun = position // block_size + 1
    return -(-begun // GROUP) if sparse else begun


class _Head(nn.Module):
    def __init__(self, model: DualBranchModel) -> None:
        super().__init__()
        self.norm, self.out, self.softcap = model.norm, model.out, model.config.logit_softcap

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.norm, self.out, self.softcap, x)


class Unpack(nn.Module):
    """`packed.transposed` for matrices of any size at one precision, to one dtype."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype

    def forward(self, words: Tensor, scales: Tensor | None = None) -> Tensor:
        return transposed(self.bits, words, scales, self.dtype)


def step_name(block: Block, slow: bool, n_keys: int) -> str:
    """Which step a layer takes by one of its branches as the last of `n_keys` tokens."""
    reads = (block.slow if slow else block.fast).reads
    sparse = reads is not None and n_keys > reads.dense_len
    return ("sliding-" if block.sliding else "") + ("slow" if slow else "fast") + ("-sparse" if sparse else "")


def unpack_name(bits: int, dtype: torch.dtype) -> str:
    return f"unpack{bits}" + {torch.float32: "", torch.bfloat16: "-bf16", torch.int8: "-int8"}[dtype]


def plain_steps(model: DualBranchModel) -> dict[str, nn.Module]:
    """Every step that running `model` may need, uncompiled: of its blocks by name, `embed`, `logits`, those of prompts, `unpackB` of each packed width B,
    where the CPU has units for bf16 also `unpackB-bf16` and the norms before their products, `norm`; of dynamic feed-forwards `unpack8-int8` and theirs."""
    steps: dict[str, nn.Module] = {}
    for block in model.blocks:
        for slow in (True, False):
            if (block.slow if slow else block.fast) is not None:
                for n_keys in (1, MANY):
                    name = step_name(block, slow, n_keys)
                    steps.setdefault(name, BlockStep(block, slow, name.endswith("sparse"), model.config.sparse.block_size))
    steps |= {"embed": ModuleStep(model.embed), "logits": ModuleStep(_Head(model))} | prompt.plain_steps(model)
    for bits in sorted({m.bits for m in model.modules() if isinstance(m, PackedMatrix)}):
        for dtype in (torch.float32, torch.bfloat16)[: 1 + has_bf16_units(model.device)]:
            steps[unpack_name(bits, dtype)] = Unpack(bits, dtype)
    if has_bf16_units(model.device) and any(isinstance(m, ProductNorm) for m in model.modules()):
        steps["norm"] = Normed(model.config.norm_eps)
    if any(isinstance(m, dynamic.DynamicFeedForward) for m in model.modules()):
        steps |= {unpack_name(8, torch.int8): Unpack(8, torch.int8)} | dynamic.plain_steps(model.config.activation)
    return steps


@dataclass
class NewToken:
    """A token on its way through the layers: its residual stream `x (1, E)`, the row of the cache and the slot that it goes into, what a step is told of that
    (`BlockStep`): `reach` of dense and sparse steps, `angles` of layers with and without a sliding window; and which branch it takes, once that is known."""

    x: Tensor
    row: KVCache
    slot: int
    position: Tensor
    reach: dict[bool, Tensor]
    angles: Angles
    sliding: Angles
    slow: bool = True


class Layer(NamedTuple):
    """A layer's weights by one of its branches, and its step up to `dense_len` keys and beyond."""

    weights: dict[str, Tensor]
    dense: Callable
    sparse: Callable
    dense_len: int


def few_tokens(model: DualBranchModel) -> tuple[int, int]:
    """How many new tokens of one row, and of several that get one each, are computed one by one at most."""
    if not model.packs_keys:
        return FEW_IN_FP32, FEW_IN_FP32
    return (FEW, FEW) if has_bf16_units(model.device) else (FEW_OF_A_ROW, FEW_OF_ROWS)


class Runner:
    """Runs few tokens of `model`, one by one, on a CPU in fp32, through `steps`: those of `plain_steps`, or the same compiled. `blocks` are
    the model's, for many tokens. Mutates nothing but that packed matrices unpack themselves by the steps given, and norms before products and dynamic
    feed-forwards run theirs."""

    def __init__(self, model: DualBranchModel, steps: Mapping[str, Callable]) -> None:
        plain, c = plain_steps(model), model.config
        self.model, self.steps = model, steps
        self.few, self.few_of_rows = few_tokens(model)
        self.blocks = [PromptBlock(block, steps) for block in model.blocks]
        self.layers = [{slow: self._layer(block, slow) for slow in (True, False) if (block.slow if slow else block.fast) is not None} for block in model.blocks]
        self.embed = partial(steps["embed"], plain["embed"].weights_of(model.embed))
        self.logits = partial(steps["logits"], plain["logits"].weights_of(_Head(model)))
        for module in model.modules():
            if isinstance(module, PackedMatrix):
                module.unpack = partial(self._unpack, module.bits)
            elif isinstance(module, dynamic.DynamicFeedForward):
                module.steps = {name: steps[name] for name in module.steps}
            elif isinstance(module, ProductNorm) and "norm" in steps:
                module.step = partial(steps["norm"])  # a plain step is a module, and would become a child of this one
        self.scratch = torch.zeros(1, -(-c.max_seq_len // c.sparse.block_size), c.n_kv_heads, c.head_dim)  # mean keys of layers that choose no blocks

    def _layer(self, block: Block, slow: bool) -> Layer:
        """A layer by one of its branches."""
        dense, sparse = (self.steps[step_name(block, slow, n_keys)] for n_keys in (1, MANY))
        reads = (block.slow if slow else block.fast).reads
        return Layer(BlockStep(block, slow, False, 1).weights_of(block), dense, sparse, MANY if reads is None else reads.dense_len)

    def _unpack(self, bits: int, words: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.steps[unpack_name(bits, dtype)](*((words,) if scales is None else (words, scales)))  # compiled, it takes nothing but tensors

    def takes(self, tokens: Tensor, route: str | Tensor, cache: KVCache | None) -> bool:
        """Whether a pass is one for it: a few new tokens of rows cached in the dtype that steps are compiled for, each by one branch, without gradient."""
        if cache is None or cache.dtype != self.model.cache_dtype or (isinstance(route, str) and route == "soft") or torch.is_grad_enabled():
            return False
        return tokens.numel() <= (self.few_of_rows if tokens.shape[1] == 1 else self.few)

    def __call__(self, tokens: Tensor, route: str | Tensor, decide: Decide, cache: KVCache, last_only: bool) -> ModelOutput:
        """As `DualBranchModel.forward` of `tokens (B, T)`: in each layer one after the other, so that weights that fit the processor's cache come from
        memory once. Advances the cache. (What `route` says, `decide` knows.)"""
        from dualbranch.model import ModelOutput

        (B, T), c, model, tokens = tokens.shape, self.model.config, self.model, tokens.long()
        rows = [cache.rows(b, b + 1) for b in range(B)]
        first = [row.next_slot(T) for row in rows]
        c.check_length(max(first) + T)  # all of them fit, or nothing is written
        new = [self._begin(tokens[b, t : t + 1], rows[b], first[b] + t) for b in range(B) for t in range(T)]
        self._through(range(c.n_stem), new)
        g, use_slow = decide(lambda: torch.cat([model.gate(token.x) for token in new]))
        if use_slow is not None:
            for token, slow in zip(new, use_slow.flatten().tolist(), strict=True):
                token.slow = slow
        self._through(range(c.n_stem, c.n_layers), new)
        for token in new:
            token.row.fill_slots(1, token.slow)
        x = torch.cat([token.x for token in new]).view(B, T, -1)
        x = x[:, -1:] if last_only else x
        logits = [self.logits(of_token) for of_token in x.view(-1, 1, x.shape[-1])]
        return ModelOutput((logits[0] if len(logits) == 1 else torch.cat(logits)).view(*x.shape[:2], -1), x, g, use_slow)

    def _begin(self, token: Tensor, row: KVCache, slot: int) -> NewToken:
        """`token (1,)`, for `slot` of the one row `row`."""
        model, size, position = self.model, self.model.config.sparse.block_size, torch.tensor([slot])
        reach = {sparse: self.scratch[0, : reach_of(slot, size, sparse), 0, 0] for sparse in (False, True)}
        angles, sliding = (None if rope is None else rope(position, slot + 1) for rope in (model.rope, model.sliding_rope))
        return NewToken(self.embed(token), row, slot, position, reach, angles, sliding or angles)

    def _through(self, layers: Iterable[int], new: Sequence[NewToken]) -> None:
        """Takes the tokens `new` through `layers`, and writes what each layer keeps of them. Mutates their `x` and the cache."""
        c = self.model.config
        for i in layers:
            for token in new:
                weights, dense, sparse, dense_len = self.layers[i][token.slow or i not in c.dual_layers]
                cos_sin = token.sliding if i in c.sliding_layers else token.angles
                is_sparse = token.slot >= dense_len
                step = sparse if is_sparse else dense
                step(weights, token.x, *cos_sin, *token.row.heads[i], token.row.pooled.get(i, self.scratch), token.reach[is_sparse], token.position)
