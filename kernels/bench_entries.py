"""What `bench.py` times: inputs, one entry per op and baseline, and the least work each has to do (bytes, FLOPs).

FLOPs count multiplications and additions of the keys that the rule names, nothing else; bytes count every input and output once. An entry
that does more than that (reads a key twice, computes on a masked one) shows as a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import AttentionPlan, SparseSpec
from kernels.bench_parity import PAGE_SIZE, make_paged

ANCHOR = 64  # correlated inputs: tokens between two random vectors; in between, a straight line


@dataclass(frozen=True)
class Config:
    n: int  # keys
    H: int
    Hk: int
    D: int
    dtype: torch.dtype
    spec: SparseSpec


@dataclass(frozen=True)
class Entry:
    """One call to time. needs: the parity findings (by prefix) that must be right first; baseline entries need none."""

    phase: str
    name: str
    call: Callable[[], object]
    flops: float
    bytes: float
    needs: str | None = None
    graph: bool = True
    inputs: str = "random"
    batch: int = 1


def correlated(shape: tuple[int, int, int, int], generator: torch.Generator, device: str, dtype: torch.dtype) -> Tensor:
    """(B, T, H, D) whose neighbouring tokens are alike, with the variance of randn: lines between random anchors, plus noise."""
    B, T, H, D = shape
    anchors = torch.randn(B, H * D, T // ANCHOR + 2, generator=generator).to(device)
    x = F.interpolate(anchors, size=(T // ANCHOR + 2) * ANCHOR, mode="linear")[..., :T].transpose(1, 2).reshape(shape)
    x = x + 0.3 * torch.randn(shape, generator=generator).to(device)
    return (x / x.std()).to(dtype)


def make(B: int, T: int, c: Config, device: str, kind: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, T, c.H, c.D), (B, c.n, c.Hk, c.D), (B, c.n, c.Hk, c.D))
    if kind == "correlated":
        return tuple(correlated(s, g, device, c.dtype) for s in shapes)
    torch.manual_seed(0)
    return tuple(torch.randn(s, device=device, dtype=c.dtype) for s in shapes)


def keys_read(n: int, spec: SparseSpec) -> int:
    """Keys read by the n queries of a prefix together."""
    dense = min(n, spec.dense_len)
    most = spec.n_sinks + spec.window + spec.n_selected_blocks * spec.block_size
    total = dense * (dense + 1) // 2
    return total + sum(min(t + 1, most) for t in range(dense, min(n, most))) + max(0, n - max(dense, most)) * most


def blocks_scored(n: int, spec: SparseSpec) -> int:
    """(query, block) pairs that selection scores: blocks that are complete and not wholly inside the window."""
    return sum(max(0, (t - spec.window) // spec.block_size + 1) for t in range(spec.dense_len, n))


def distinct_share(block_ids: Tensor, tile: int = 32) -> float:
    """Distinct blocks of `tile` neighbouring queries, of all they chose: 1 = no overlap, 1 / tile = all alike. Cost grows with it."""
    B, T, Hk, M = block_ids.shape
    if 2 * tile > T or M == 0:
        return float("nan")
    n_tiles = max(1, min(8, T // 2 // tile))
    ids = block_ids[:, T // 2 : T // 2 + n_tiles * tile]  # a sample from the middle
    ids = ids.reshape(B, -1, tile, Hk, M).transpose(2, 3).reshape(-1, tile * M).sort(-1).values
    chosen = (ids >= 0).sum(-1)
    distinct = ((ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] >= 0)).sum(-1) + (ids[:, 0] >= 0)
    return (distinct.sum() / chosen.sum().clamp(min=1)).item()


def _both(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)

    def call() -> object:
        out = f(*leaves)
        return torch.autograd.grad(out, leaves, grad)

    return call


def _sdpa(backend: str, is_causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            gqa = q.shape[2] != k.shape[2]
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=is_causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    return call


BASELINES = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION"}


def prefill(c: Config, device: str) -> Iterator[Entry]:
    """Whole prefix of n tokens, batch 1. The plan is built once, as in a model, where all layers share it."""
    n, size = c.n, torch.empty(0, dtype=c.dtype).element_size()
    plan = AttentionPlan(torch.arange(n, device=device)[None], n)
    io = 2 * n * (c.H + c.Hk) * c.D * size  # q, out; k, v
    causal = 4 * c.H * c.D * n * (n + 1) // 2
    sparse = 4 * c.H * c.D * keys_read(n, c.spec)
    scoring = 2 * c.Hk * c.D * blocks_scored(n, c.spec)
    q, k, v = make(1, n, c, device)

    from kernels import triton_ops  # a whole prefix goes to SDPA in `triton_ops.dense_attention`; this times the kernel that all else goes to

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton_ops.attend(q, k, v, None, plan, None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.sparse_attention(q, k, v, plan, c.spec)

    for name, backend in BASELINES.items():
        yield Entry("prefill", f"{name} forward", partial(_sdpa(backend, True), q, k, v), causal, io)
    yield Entry("prefill", "dense forward", partial(dense, q, k, v), causal, io, "dense prefill forward")
    for kind in ("random", "correlated"):
        qi, ki, vi = (q, k, v) if kind == "random" else make(1, n, c, device, kind)
        yield Entry("prefill", "sparse forward", partial(run, qi, ki, vi), sparse + scoring, io, "sparse prefill forward", inputs=kind)
        yield Entry("prefill", "sparse forward + backward", _both(run, qi, ki, vi), 3.5 * sparse + scoring, 4 * io, "sparse prefill", False, kind)
        pooled = kernels.pool_keys(ki, c.spec.block_size)
        ids_bytes = n * c.Hk * c.spec.n_selected_blocks * 8
        bytes_read = n * c.H * c.D * size + pooled.numel() * 4 + ids_bytes
        yield Entry("prefill", "selection alone", lambda a=(qi, pooled): kernels.select_blocks(*a, plan, c.spec), scoring, bytes_read, "selection", inputs=kind)
    yield Entry("prefill", "pooled keys", lambda: kernels.pool_keys(k, c.spec.block_size), 0, n * c.Hk * c.D * (size + 4 / c.spec.block_size), "pooled keys")
    for name, backend in BASELINES.items():
        yield Entry("prefill", f"{name} forward + backward", _both(_sdpa(backend, True), q, k, v), 3.5 * causal, 4 * io, graph=False)
    yield Entry("prefill", "dense forward + backward", _both(dense, q, k, v), 3.5 * causal, 4 * io, "dense prefill", False)


def decode(c: Config, device: str, batch: int, T: int = 1) -> Iterator[Entry]:
    """The last T tokens of `batch` rows of n keys."""
    n, size = c.n, torch.empty(0, dtype=c.dtype).element_size()
    plan = AttentionPlan(torch.arange(n - T, n, device=device).expand(batch, -1).contiguous(), n)
    q, k, v = make(batch, T, c, device)
    pooled = kernels.pool_keys(k, c.spec.block_size)
    name = "decode" if T == 1 else f"verify {T}"
    n_read = min(n, c.spec.n_sinks + c.spec.window + c.spec.n_selected_blocks * c.spec.block_size) if n > c.spec.dense_len else n
    per_key = 2 * c.Hk * c.D  # k and v
    io = 2 * batch * T * c.H * c.D * size
    flops = {"dense": 4 * batch * T * c.H * c.D * n, "sparse": 4 * batch * T * c.H * c.D * n_read + 2 * batch * T * c.Hk * c.D * n // c.spec.block_size}
    scored = 4 * batch * c.Hk * c.D * (n // c.spec.block_size) if n > c.spec.dense_len else 0  # pooled keys are fp32
    keys = {"dense": batch * n, "sparse": batch * T * n_read}
    if T == 1:
        yield Entry(name, "SDPA flash", partial(_sdpa("FLASH_ATTENTION", False), q, k, v), flops["dense"], io + keys["dense"] * per_key * size, batch=batch)
    calls = {
        "dense": lambda: kernels.dense_attention(q, k, v, plan),
        "sparse": lambda: kernels.sparse_attention(q, k, v, plan, c.spec, pooled),
    }
    for rule, call in calls.items():
        total = io + keys[rule] * per_key * size + (scored if rule == "sparse" else 0)
        yield Entry(name, f"{rule} contiguous", _no_grad(call), flops[rule], total, f"{rule} decode contiguous", batch=batch)
    for store in ("paged", "int8"):
        kv = make_paged(k, v, c.spec.block_size, store == "int8", PAGE_SIZE)
        calls = {
            "dense": lambda kv=kv: kernels.paged_dense_attention(q, kv, plan),
            "sparse": lambda kv=kv: kernels.paged_sparse_attention(q, kv, plan, c.spec),
        }
        for rule, call in calls.items():
            total = io + keys[rule] * per_key * (1 if store == "int8" else size) + (scored if rule == "sparse" else 0)
            yield Entry(name, f"{rule} {store}", _no_grad(call), flops[rule], total, f"{rule} decode {store}", batch=batch)


def _no_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def flex(c: Config, device: str) -> Iterator[Entry]:
    """FlexAttention, compiled, over sinks and window: the part of the rule that a static block mask can say. It reads no chosen blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, n_sinks = c.spec.window, c.spec.n_sinks

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < n_sinks))

    q, k, v = (x.transpose(1, 2) for x in make(1, c.n, c, device))
    mask = torch.compile(create_block_mask)(mask_mod, None, None, c.n, c.n, device=device)
    attention = torch.compile(flex_attention)
    read = window + n_sinks
    flops, size = 4 * c.H * c.D * c.n * read, torch.empty(0, dtype=c.dtype).element_size()
    run = partial(attention, q, k, v, block_mask=mask, enable_gqa=c.Hk != c.H)
    yield Entry("prefill", "FlexAttention forward, sinks and window only", run, flops, 2 * c.n * (c.H + c.Hk) * c.D * size)
