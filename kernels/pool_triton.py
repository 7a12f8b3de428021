"""Pooled keys: the mean of each complete block, one kernel. Called by `triton_ops.py`.

A block's keys are added one after the other in fp32, so its mean does not depend on which other blocks are pooled with it,
and a cache may append block by block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pool_kernel(
    k, pooled,  # (B, S, HK, D) by strides; (B, N, HK, D) fp32
    k_sb, k_ss, k_sh, N, HK,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    h, b = tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BD)
    mask = (n < N)[:, None] & (d < D)[None, :]
    ptrs = k + b.to(tl.int64) * k_sb + h * k_sh + (n * BLOCK)[:, None] * k_ss + d[None, :]  # (BN, BD)
    total = tl.zeros((BN, BD), tl.float32)
    for i in range(BLOCK):
        total += tl.load(ptrs + i * k_ss, mask=mask, other=0.0).to(tl.float32)
    out = pooled + ((b.to(tl.int64) * N + n)[:, None] * HK + h) * D + d[None, :]
    tl.store(out, tl.div_rn(total, tl.full((BN, BD), BLOCK, tl.float32)), mask=mask)


def launch_config(head_dim: int) -> dict:
    return {"BN": 16 if head_dim <= 64 else 8, "num_warps": 4, "num_stages": 2}


def pool_keys(k: Tensor, block_size: int) -> Tensor:
    """Mean of each complete block: k (B, S, Hk, D) -> (B, S // block_size, Hk, D), in fp32."""
    k = k.detach()
    B, S, Hk, D = k.shape
    N = S // block_size
    k = k if k.stride(3) == 1 else k.contiguous()
    pooled = torch.empty(B, N, Hk, D, dtype=torch.float32, device=k.device)
    if pooled.numel():
        config = launch_config(D)
        grid = (triton.cdiv(N, config["BN"]), Hk, B)
        pool_kernel[grid](k, pooled, *k.stride()[:3], N, Hk, D=D, BD=triton.next_power_of_2(D), BLOCK=block_size, **config)
    return pooled


def aot_cases(target: str):
    """(kernel, signature, constexprs, options, label) of what `kernels.aot` compiles ahead of time."""
    for head_dim in (64, 96, 128, 256):
        for dtype in ("bf16", "fp16", "fp32") if head_dim == 64 else ("bf16",):
            config = launch_config(head_dim)
            signature = {"k": f"*{dtype}", "pooled": "*fp32"} | dict.fromkeys(("k_sb", "k_ss", "k_sh", "N", "HK"), "i32")
            constexprs = {"D": head_dim, "BD": triton.next_power_of_2(head_dim), "BLOCK": 16, "BN": config["BN"]}
            yield pool_kernel, signature, constexprs, {x: config[x] for x in ("num_warps", "num_stages")}, f"pool {dtype} d{head_dim}"
