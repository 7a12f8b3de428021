"""One process or many: the few places where `torchrun` makes a difference.

FSDP2 shards every block; every rank takes its rows of the same global batch, so the sum of gradients does not depend on the number of
processes. Full tensors are gathered for checkpoints, which therefore resume on any number of processes.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: How long a process waits for another: one alone samples the teacher's text and solutions, for hours where the model is large.
WAIT = timedelta(days=1)


def init(device: torch.device) -> None:
    """Joins the process group if `torchrun` started us (nccl on GPUs, gloo otherwise)."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Of this process; also after `finish`."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(value: Tensor) -> Tensor:
    """The sum of a scalar over all ranks."""
    if dist.is_initialized():
        value = value.detach().clone()
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank, so that all take the same turn."""
    if not dist.is_initialized():
        return flag
    return bool(total(torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")))


def shard(model: nn.Module) -> nn.Module:
    """Shards `model` in place over all ranks (FSDP2); nothing to do in one process."""
    if not dist.is_initialized():
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "mix")
    return fully_shard(model, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(whole: Tensor, target: Tensor) -> Tensor:
    """`whole`, laid out as `target` is."""
    if not hasattr(target, "device_mesh"):
        return whole.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
