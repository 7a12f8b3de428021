"""A smaller conventional model out of a larger one: layers, residual channels, heads and neurons that matter least on calibration text go.

Importance is activation-based (Minitron, Muralidharan et al. 2024; layers as ShortGPT, Men et al. 2024): a layer by how far it turns the residual stream, a
channel by what the matrices that read it get from it, a head and a neuron as in `distill/cut.py`. Heads go in whole groups, with their keys and values.
Output matrices are refitted in closed form, layer by layer on the pruned model's own stream, so that each makes up for what was lost before it. The result is
an untrained model of the same dialect: distil it from the original afterwards (a run's `teacher`), the refit only shortens that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualbranch.accounting import token_cost, total_params
from dualbranch.block import Block
from dualbranch.config import DualBranchConfig
from dualbranch.convert.export import slow_model
from dualbranch.data.packing import Rows
from dualbranch.distill.cut import LayerView, head_importance, layer_views, neuron_importance, ridge, top_heads, view_of
from dualbranch.model import DualBranchModel

_STEPS = 512  # of the search for sizes
_NO_WINDOWS = {"sliding_layers": (), "sliding_window": None, "sliding_rope_theta": None}


@dataclass(frozen=True)
class Importance:
    """`layers (L,)`, `channels (E,)`, `heads (L, H)`, `neurons (L, F)`; each comparable within one row only."""

    layers: Tensor
    channels: Tensor
    heads: Tensor
    neurons: Tensor


@torch.no_grad()
def prune(
    model: DualBranchModel,
    rows: Rows,
    target_share: float | None = 0.35,
    *,
    n_layers: int | None = None,
    d_model: int | None = None,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    refit: bool = True,
) -> tuple[DualBranchModel, dict[str, Any]]:
    """A conventional model with at most `target_share` of the parameters of `model` (of its slow branch, if it has two), and a report.

    `rows`: calibration text, packed (a few thousand tokens; the refit needs more tokens than a layer keeps neurons). Sizes that are given are taken, the
    others are chosen by `choose_sizes`; `target_share` None: only those given shrink. `model` isn't changed. The report is plain JSON: parameters and cost
    before and after, importance of layers and heads, what was kept, and the share of importance that it holds.
    Raises ValueError: a share or size that can't be had, too few tokens, a model without weights that are finite.
    """
    if model.precision != "fp32":
        raise ValueError(f"this model is packed at {model.precision}; prune the one it was quantized from")
    source = slow_model(model)
    given = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    small = choose_sizes(source.config, target_share, **{name: size for name, size in given.items() if size is not None})
    n_tokens, n_inputs = int(rows.real.sum()), max(small.d_ff, small.n_heads * small.head_dim)
    whole = all(getattr(small, name) == getattr(source.config, name) for name in given)
    if refit and not whole and n_tokens < n_inputs:
        raise ValueError(f"rows hold {n_tokens} tokens, fewer than the {n_inputs} inputs of a matrix to refit; give more text, or refit=False")
    importance = measure(source, rows)
    layers = importance.layers.topk(small.n_layers).indices.sort().values.tolist()
    windows = tuple(n for n, i in enumerate(layers) if i in source.config.sliding_layers)
    if windows:
        small = dataclasses.replace(small, **{name: getattr(source.config, name) for name in _NO_WINDOWS if name != "sliding_layers"}, sliding_layers=windows)
    channels = importance.channels.topk(small.d_model).indices.sort().values
    heads = [_kept_heads(importance.heads[i], source.config, small) for i in layers]
    neurons = [importance.neurons[i].topk(small.d_ff).indices.sort().values for i in layers]
    pruned = DualBranchModel.without_weights(small).eval()
    empty = {name: torch.empty(x.shape, dtype=source.dtype, device=source.device) for name, x in pruned.state_dict().items()}
    pruned.load_state_dict(empty, assign=True)
    if whole:
        pruned.load_state_dict(source.state_dict())
    else:
        _fill(pruned, source, rows, layers, channels, heads, neurons, refit)
    return pruned, _report(source.config, small, importance, layers, channels, heads, neurons, target_share)


def choose_sizes(config: DualBranchConfig, target_share: float | None, **given: int) -> DualBranchConfig:
    """The config of the pruned model: at most `target_share` of the parameters, `given` sizes taken as they are.

    Groups of heads and neurons shrink alike, layers by the square root of that share (depth is dearer than width). Channels shrink as heads do, but only
    where that can't be had otherwise, or embedding and head at full width leave less than a third of the parameters to the layers: cut channels are cut
    from every embedding (docs/experiments.md: 4 times the perplexity). Sizes stay multiples that kernels and quantised blocks like. What rounding leaves
    is spent on neurons. Windows are left out: they depend on which layers stay.
    """
    c = dataclasses.replace(config, n_stem=config.n_layers, n_tail=0, **_NO_WINDOWS)
    for name, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= getattr(c, name):
            raise ValueError(f"{name} is {size!r}; it must be an integer in [1, {getattr(c, name)}], the model's own")
    if target_share is None:
        return _shrunk(c, 1.0, given)
    if not 0 < target_share <= 1:
        raise ValueError(f"target_share is {target_share}; it must lie in (0, 1], a share of the model's parameters")
    limit = math.floor(target_share * total_params(c) + 1e-9)
    ends = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    wide = [{"d_model": c.d_model} | given] if 3 * ends <= 2 * limit else []
    for sizes, step in itertools.product([*wide, given], range(_STEPS, -1, -1)):
        small = _shrunk(c, step / _STEPS, sizes)
        if total_params(small) <= limit:
            break
    else:
        raise ValueError(
            f"target_share is {target_share}: {limit:,} parameters, but the smallest model with n_layers = {small.n_layers}, d_model = {small.d_model},"
            f" n_heads = {small.n_heads} and d_ff = {small.d_ff} has {total_params(small):,}; raise it, or give smaller sizes"
        )
    if "d_ff" in given:
        return small
    one_more = total_params(dataclasses.replace(small, d_ff=small.d_ff + 1)) - total_params(small)
    unit = _unit(c.d_ff)
    more = min((limit - total_params(small)) // one_more // unit * unit, c.d_ff - small.d_ff)
    return dataclasses.replace(small, d_ff=small.d_ff + more)


def _unit(size: int) -> int:
    """Sizes are multiples of this: of 32 where they are large enough, as blocks of quantised weights are."""
    return 32 if size >= 256 else 4 if size >= 16 else 1


def _shrunk(c: DualBranchConfig, share: float, given: dict[str, int]) -> DualBranchConfig:
    sizes = {"n_layers": max(1, round(c.n_layers * share**0.5)), "n_kv_heads": max(1, round(c.n_kv_heads * share))} | given
    per_group = c.n_heads // c.n_kv_heads
    if c.n_kv_heads == 1:  # the one group can't go: heads do
        per_group = max(1, round(per_group * share))
    sizes = {"n_heads": sizes["n_kv_heads"] * per_group} | sizes
    if sizes["n_heads"] % sizes["n_kv_heads"] or sizes["n_heads"] // sizes["n_kv_heads"] > c.n_heads // c.n_kv_heads:
        most = c.n_heads // c.n_kv_heads
        raise ValueError(f"n_heads is {sizes['n_heads']}; it must be n_kv_heads = {sizes['n_kv_heads']} times at most {most}: every group keeps as many")
    # A width its heads divide, as `transformers` asks of some families; of the multiples of 32, 16, ... among these the first that aren't too far apart.
    units = [math.lcm(_unit(c.d_model) >> n, sizes["n_heads"]) for n in range(_unit(c.d_model).bit_length())]
    unit = next((u for u in units if 8 * u <= c.d_model), min(units[-1], c.d_model))
    wide = c.d_model if share == 1 else max(unit, int(c.d_model * share) // unit * unit)
    narrow = c.d_ff if share == 1 else max(_unit(c.d_ff), int(c.d_ff * share) // _unit(c.d_ff) * _unit(c.d_ff))
    sizes = {"d_model": min(wide, c.d_model), "d_ff": min(narrow, c.d_ff)} | sizes
    scale = {}
    if math.isclose(c.embed_scale, c.d_model**0.5):  # a family's rule: it stays one, and the embeddings take the difference
        scale["embed_scale"] = sizes["d_model"] ** 0.5
    # With dead channels gone, a norm's mean square grows by this: so must what is added to it.
    eps = c.norm_eps if sizes["d_model"] == c.d_model else min(1.0, c.norm_eps * c.d_model / sizes["d_model"])
    return dataclasses.replace(c, n_stem=sizes["n_layers"], fast_n_heads=sizes["n_kv_heads"], norm_eps=eps, **scale, **sizes)


# ---- importance


@torch.no_grad()
def measure(model: DualBranchModel, rows: Rows) -> Importance:
    """Importance of every part of the dense `model` on packed `rows`.

    A layer: 1 - cosine of the stream entering and leaving it. A channel: mean absolute normed value times the norm of the columns that read it, as a share
    of all channels', summed over what reads it: queries, keys and values, feed-forward, head.
    """
    layers, heads, neurons, out = [], [], [], None
    channels = torch.zeros(model.config.d_model, device=model.device)
    for block, view in layer_views(model, rows):
        mid, _, out, _ = _outputs(block, view)
        layers.append(1 - torch.cosine_similarity(view.x.float(), out.float(), dim=-1).mean())
        heads.append(head_importance(block.slow, view))
        neurons.append(neuron_importance(block.slow, mid))
        readers = torch.cat([block.slow.w_q.weight, block.kv.w_k.weight, block.kv.w_v.weight])
        channels += _read(view.h, readers) + _read(block.slow.ff_norm(mid), torch.cat([block.slow.ff.w_act.weight, block.slow.ff.w_up.weight]))
    channels += _read(model.norm(out), (model.embed if model.head is None else model.head).weight)
    found = Importance(torch.stack(layers), channels, torch.stack(heads), torch.stack(neurons))
    for f in dataclasses.fields(found):
        if not getattr(found, f.name).isfinite().all():
            raise ValueError(f"importance of {f.name} isn't finite: the model or the text holds what it can't compute with")
    return found


def _read(h: Tensor, matrix: Tensor) -> Tensor:
    """`(E,)`: the share each channel has in what `matrix (out, E)` gets from normed inputs `h (N, E)`."""
    share = h.abs().mean(0).float() * matrix.float().norm(dim=0)
    return share / share.sum().clamp(min=1e-12)


def _outputs(block: Block, view: LayerView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream after attention and what the output matrix added to it (before its norm), and the same of the feed-forward. Each `(N, E)`."""
    slow = block.slow
    attended = slow.w_o(slow.attend(view.h, view.tokens, *view.keys))
    mid = view.x + slow.attn_post_norm(attended)
    fed = slow.ff(slow.ff_norm(mid))
    return mid, attended, mid + slow.ff_post_norm(fed), fed


def _kept_heads(importance: Tensor, c: DualBranchConfig, small: DualBranchConfig) -> tuple[Tensor, Tensor]:
    """Which groups and which heads a layer keeps: the best groups, and as many of the best heads in each. Ascending indices."""
    per_group = c.n_heads // c.n_kv_heads
    groups = importance.view(c.n_kv_heads, per_group).sum(1).topk(small.n_kv_heads).indices.sort().values
    members = (groups[:, None] * per_group + torch.arange(per_group, device=groups.device)).flatten()
    return groups, members[top_heads(importance[members], small.n_kv_heads, small.n_heads)]


# ---- the smaller model


def _elements(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _rms(x: Tensor, eps: float) -> Tensor:
    return (x.float().square().mean(-1, keepdim=True) + eps).sqrt()


def _fill_norm(target: nn.Module, source: nn.Module, x: Tensor, full: Tensor, channels: Tensor) -> None:
    """The weights of the kept channels, times how much larger the root mean square of the pruned `x (N, E')` is than that of `full (N, E)`, on average."""
    if isinstance(source, nn.RMSNorm):
        target.weight.copy_(source.weight[channels] * (_rms(x, target.eps) / _rms(full, source.eps)).mean())


class _Layer:
    """One kept layer, half filled: everything but the feed-forward's output matrix, whose goal is where the next kept layer begins."""

    def __init__(self, target: Block, block: Block, view: LayerView, x: Tensor, rows: Rows, kept: tuple[Tensor, Tensor, Tensor, Tensor], refit: bool) -> None:
        self.channels, groups, heads, neurons = kept
        self.target, self.block, self.refit = target, block, refit
        slow, new, c = block.slow, target.slow, self.channels
        head_dim = slow.w_q.out_features // slow.n_heads
        _fill_norm(target.attn_norm, block.attn_norm, x, view.x, c)
        for to, source, which in ((new.w_q, slow.w_q, heads), (target.kv.w_k, block.kv.w_k, groups), (target.kv.w_v, block.kv.w_v, groups)):
            self._copy(to, source, _elements(which, head_dim))
        new.q_norm.load_state_dict(slow.q_norm.state_dict())
        target.kv.k_norm.load_state_dict(block.kv.k_norm.state_dict())
        mid, attended, _, self.fed = _outputs(block, view)
        seen = view_of(target, x, view.tokens, rows)
        y = new.attend(seen.h, seen.tokens, *seen.keys)
        goal = mid[:, c] - x if isinstance(slow.attn_post_norm, nn.Identity) else attended[:, c]
        self._write(new.w_o, slow.w_o.weight[c][:, _elements(heads, head_dim)], y, goal, mid)
        added = new.w_o(y)
        _fill_norm(new.attn_post_norm, slow.attn_post_norm, added, attended, c)
        self.mid = x + new.attn_post_norm(added)
        _fill_norm(new.ff_norm, slow.ff_norm, self.mid, mid, c)
        for name in ("w_act", "w_up"):
            self._copy(getattr(new.ff, name), getattr(slow.ff, name), neurons)
        self.hidden, self.neurons = new.ff.hidden(new.ff_norm(self.mid)), neurons

    def finish(self, goal: Tensor) -> Tensor:
        """Fills the rest so that the layer ends as near as it can to `goal (N, E)`, the original's stream; returns the pruned stream `(N, E')`."""
        slow, new, c = self.block.slow, self.target.slow, self.channels
        wanted = goal[:, c] - self.mid if isinstance(slow.ff_post_norm, nn.Identity) else self.fed[:, c]
        self._write(new.ff.w_down, slow.ff.w_down.weight[c][:, self.neurons], self.hidden, wanted, goal)
        added = new.ff.w_down(self.hidden)
        _fill_norm(new.ff_post_norm, slow.ff_post_norm, added, self.fed, c)
        return self.mid + new.ff_post_norm(added)

    def _copy(self, target: nn.Linear, source: nn.Linear, rows: Tensor) -> None:
        target.weight.copy_(source.weight[rows][:, self.channels])
        if source.bias is not None:
            target.bias.copy_(source.bias[rows])

    def _write(self, target: nn.Linear, cut: Tensor, inputs: Tensor, outputs: Tensor, stream: Tensor) -> None:
        """The output matrix: cut out of the original's, or fitted. Tokens count by how the next norm sees them, not by the length of their stream."""
        weight = 1 / _rms(stream, 1e-12)
        target.weight.copy_(ridge(inputs * weight, outputs * weight) if self.refit else cut)


def _fill(
    pruned: DualBranchModel, source: DualBranchModel, rows: Rows, layers: list[int], channels: Tensor, heads: list, neurons: list[Tensor], refit: bool
) -> None:
    """Gives `pruned` its weights. Mutates it."""
    scale = source.config.embed_scale / pruned.config.embed_scale
    pruned.embed.weight.copy_(source.embed.weight[:, channels] * scale)
    if source.head is not None:
        pruned.head.weight.copy_(source.head.weight[:, channels])
    x, open_layer, n, final = pruned.embed(rows.tokens[rows.real]), None, 0, None
    for i, (block, view) in enumerate(layer_views(source, rows)):
        if i == len(source.blocks) - 1:
            final = _outputs(block, view)[2]
        if i in layers:
            x = x if open_layer is None else open_layer.finish(view.x)
            open_layer = _Layer(pruned.blocks[n], block, view, x, rows, (channels, *heads[n], neurons[n]), refit)
            n += 1
    x = open_layer.finish(final)
    _fill_norm(pruned.norm, source.norm, x, final, channels)
    if source.head is None:  # the tied head sees the rescaled embeddings too
        pruned.norm.weight.div_(scale)


def _report(
    c: DualBranchConfig, small: DualBranchConfig, importance: Importance, layers: list[int], channels: Tensor, heads: list, neurons: list[Tensor],
    target_share: float | None,
) -> dict[str, Any]:  # fmt: skip
    def costs(config: DualBranchConfig) -> dict[str, Any]:
        cost = token_cost(config, "slow", 0, 4)
        sizes = {name: getattr(config, name) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")}
        return {"params": cost.params, "params_read": cost.params_read, "flops": cost.flops, "kv_bytes": cost.kv_bytes} | sizes

    def share(values: Tensor, kept: Tensor | list[int]) -> float:
        return float(values[kept].sum() / values.sum().clamp(min=1e-30))

    return {
        "target_share": target_share,
        "share": total_params(small) / total_params(c),
        "before": costs(c),
        "after": costs(small),
        "layers": {"importance": importance.layers.tolist(), "kept": layers},
        "channels": {"kept": channels.tolist(), "share_kept": share(importance.channels, channels)},
        "heads": [
            {"layer": i, "importance": importance.heads[i].tolist(), "kept": kept.tolist(), "groups_kept": groups.tolist()}
            for i, (groups, kept) in zip(layers, heads, strict=True)
        ],
        "neurons": [{"layer": i, "share_kept": share(importance.neurons[i], kept)} for i, kept in zip(layers, neurons, strict=True)],
    }
