"""Are the Triton kernels right on this device? Called by `bench.py` before it times anything.

Every op is compared with the fp32 reference, values and gradients; the error may be a few times what PyTorch makes in the same dtype with
the same mask, both measured here. Selection may differ from the reference only where two blocks' scores agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import AttentionPlan, PagedKV, SparseSpec, reference
from kernels.paged import dequantize_pages, quantize_pages
from kernels.paged_reference import gather_pages

SPEC = SparseSpec(block_size=16, n_selected_blocks=5, window=70, n_sinks=5, dense_len=130)
FACTOR, FLOOR = 3.0, 1e-5  # allowed: FACTOR times PyTorch's own error, plus FLOOR of the largest value
PAGE_SIZE = 64


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    S: int
    H: int
    Hk: int
    D: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} S{self.S} H{self.H}/{self.Hk} D{self.D} {str(self.dtype).removeprefix('torch.')}"


SHAPES = (
    Shape(1, 1024, 1024, 8, 4, 64),
    Shape(1, 777, 777, 8, 2, 64, torch.float16),
    Shape(2, 300, 600, 7, 1, 128),
    Shape(1, 515, 515, 6, 2, 96),
    Shape(1, 260, 260, 16, 1, 64, torch.float32),
    Shape(1, 200, 300, 4, 1, 256),
    Shape(1, 100, 8192, 4, 2, 64),  # long: selection goes over many tiles of blocks
)
DECODE_SHAPES = (
    Shape(3, 1, 1024, 8, 4, 64),
    Shape(2, 5, 704, 7, 1, 128),
    Shape(1, 16, 512, 8, 2, 64, torch.float16),
    Shape(2, 3, 448, 6, 2, 96),
    Shape(1, 1, 320, 4, 1, 256, torch.float32),
)


@dataclass(frozen=True)
class Finding:
    op: str
    shape: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
    """The last T of S positions ask; row b is shorter by 17 b keys, so rows differ; keys after a row's end are NaN."""
    g = torch.Generator().manual_seed(shape.S)
    q, k, v = (torch.randn(shape.B, n, h, shape.D, generator=g) for n, h in ((shape.T, shape.H), (shape.S, shape.Hk), (shape.S, shape.Hk)))
    q_pos = torch.arange(shape.S - shape.T, shape.S).expand(shape.B, -1) - 17 * torch.arange(shape.B)[:, None]
    if shape.T < shape.S:
        for b in range(1, shape.B):
            k[b, shape.S - 17 * b :], v[b, shape.S - 17 * b :] = float("nan"), float("nan")
    q, k, v = (x.to(device, shape.dtype) for x in (q, k, v))
    return q, k, v, AttentionPlan(q_pos.clamp(min=-1).to(device), shape.S)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What PyTorch computes in q's dtype under mask (B, T, Hk, S): the yardstick for errors."""
    G = q.shape[2] // k.shape[2]
    unseen = ~mask.any(1).transpose(1, 2).unsqueeze(-1)
    k, v = (x.masked_fill(unseen, 0).transpose(1, 2).repeat_interleave(G, 1) for x in (k, v))
    mask = mask.transpose(1, 2).repeat_interleave(G, 1)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def with_grads(f, *tensors: Tensor) -> list[Tensor]:
    """f's result and its gradients, fp32."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = f(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [x.detach().float() for x in (out, *torch.autograd.grad((out * weight).sum(), tensors))]


def compare(op: str, shape: Shape, ours: list[Tensor], theirs: list[Tensor], torchs: list[Tensor]) -> Iterator[Finding]:
    for name, a, b, c in zip(("", " dq", " dk", " dv"), ours, theirs, torchs, strict=False):
        allowed = FACTOR * (c - b).abs().max().item() + FLOOR * max(1.0, b.abs().max().item())
        yield Finding(op + name, str(shape), (a - b).abs().max().item(), allowed)


def selection(q: Tensor, k: Tensor, plan: AttentionPlan, shape: Shape) -> tuple[Tensor, Finding]:
    """The kernels' block_ids, and by how much their summed scores fall short of the reference's, of the largest score."""
    pooled = reference.pool_keys(k, SPEC.block_size)
    ours, theirs = kernels.select_blocks(q, pooled, plan, SPEC), reference.select_blocks(q, pooled, plan, SPEC)
    scores = F.pad(reference.block_scores(q, pooled), (0, 1))  # the last column takes the -1s
    scores = scores.nan_to_num(0)  # blocks nobody may choose can hold NaN keys
    sums = [scores.gather(-1, torch.where(x < 0, scores.shape[-1] - 1, x)).sum(-1) for x in (ours, theirs)]
    same_count = bool(((ours >= 0).sum(-1) == (theirs >= 0).sum(-1)).all())
    error = (sums[0] - sums[1]).abs().max().item() / scores.abs().max().item()
    return ours, Finding("selection", str(shape), error if same_count else float("inf"), 1e-5)


def check_pooling(shape: Shape, device: str) -> Iterator[Finding]:
    _, k, _, _ = inputs(shape, device)
    ours, theirs = (f(k, SPEC.block_size).nan_to_num(0) for f in (kernels.pool_keys, reference.pool_keys))
    yield Finding("pooled keys", str(shape), (ours - theirs).abs().max().item(), 1e-5)


def check_selection(shape: Shape, device: str) -> Iterator[Finding]:
    q, k, _, plan = inputs(shape, device)
    yield selection(q, k, plan, shape)[1]


def check_prefill(rule: str, backward: bool, shape: Shape, device: str) -> Iterator[Finding]:
    q, k, v, plan = inputs(shape, device)
    if rule == "sparse":  # with the kernels' own choice, which may swap blocks of equal score
        mask = reference.sparse_mask(selection(q, k, plan, shape)[0], plan, SPEC)
    else:
        mask = reference.visible_keys(plan).unsqueeze(2).expand(-1, -1, shape.Hk, -1)
    ours = (lambda *x: kernels.sparse_attention(*x, plan, SPEC)) if rule == "sparse" else (lambda *x: kernels.dense_attention(*x, plan))
    theirs = (lambda *x: reference.attend(*x, mask)), (q.float(), k.float(), v.float())
    torchs = (lambda *x: torch_attention(*x, mask)), (q, k, v)
    if not backward:
        with torch.no_grad():
            yield from compare(f"{rule} prefill forward", shape, *([f(*x).float()] for f, x in ((ours, (q, k, v)), theirs, torchs)))
    else:
        yield from compare(f"{rule} prefill backward", shape, *(with_grads(f, *x) for f, x in ((ours, (q, k, v)), theirs, torchs)))


def make_paged(k: Tensor, v: Tensor, block_size: int, int8: bool, page_size: int = PAGE_SIZE, seed: int = 0) -> PagedKV:
    """k, v (B, S, Hk, D), S a multiple of page_size, in pages that lie anywhere."""
    B, S, Hk, D = k.shape
    n = B * S // page_size
    place = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(k.device)
    pages = [torch.empty_like(x).view(n, page_size, Hk, D).index_copy_(0, place, x.reshape(n, page_size, Hk, D)) for x in (k, v)]
    pooled = reference.pool_keys(pages[0].view(1, B * S, Hk, D), block_size).view(n, -1, Hk, D)
    table = place.view(B, -1).int()
    if not int8:
        return PagedKV(*pages, table, pooled)
    (k8, k_scale), (v8, v_scale) = (quantize_pages(x.nan_to_num(0)) for x in pages)
    pooled = reference.pool_keys(dequantize_pages(k8, k_scale).view(1, B * S, Hk, D), block_size).view(n, -1, Hk, D)
    return PagedKV(k8, v8, table, pooled, k_scale, v_scale)


@torch.no_grad()
def check_decode(rule: str, store: str, shape: Shape, device: str) -> Iterator[Finding]:
    q, k, v, plan = inputs(shape, device)
    if store == "contiguous":
        kv, k32, v32, pooled = None, k.float(), v.float(), reference.pool_keys(k, SPEC.block_size)
    else:
        kv = make_paged(k, v, SPEC.block_size, store == "int8")
        k32, v32 = (gather_pages(x, kv.page_table, scale).float() for x, scale in ((kv.k_pages, kv.k_scale), (kv.v_pages, kv.v_scale)))
        pooled = gather_pages(kv.pooled_pages, kv.page_table)
    if rule == "sparse":
        mask = reference.sparse_mask(reference.select_blocks(q, pooled, plan, SPEC), plan, SPEC)
        ours = kernels.sparse_attention(q, k, v, plan, SPEC) if kv is None else kernels.paged_sparse_attention(q, kv, plan, SPEC)
    else:
        mask = reference.visible_keys(plan).unsqueeze(2).expand(-1, -1, shape.Hk, -1)
        ours = kernels.dense_attention(q, k, v, plan) if kv is None else kernels.paged_dense_attention(q, kv, plan)
    torchs = torch_attention(q, k32.to(q.dtype), v32.to(q.dtype), mask)
    yield from compare(f"{rule} decode {store}", shape, [ours.float()], [reference.attend(q.float(), k32, v32, mask)], [torchs.float()])


def check_all(device: str, shapes: tuple[Shape, ...] = SHAPES, decode_shapes: tuple[Shape, ...] = DECODE_SHAPES) -> Iterator[Finding]:
    """Findings of every op on every shape. An op that raises is a finding with an infinite error and its message in `shape`."""
    prefill = {"pooled keys": check_pooling, "selection": check_selection}
    prefill |= {f"{rule} prefill {way}": partial(check_prefill, rule, way == "backward") for way in ("forward", "backward") for rule in ("sparse", "dense")}
    decode = {f"{rule} decode {store}": partial(check_decode, rule, store) for rule in ("sparse", "dense") for store in ("contiguous", "paged", "int8")}
    for checks, some in ((prefill, shapes), (decode, decode_shapes)):
        for op, check in checks.items():
            for shape in some:
                try:
                    yield from check(shape, device)
                except Exception as error:  # any error of any kernel is a finding, and must not hide the findings about the others
                    yield Finding(op, f"{shape}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", float("inf"), 0.0)
