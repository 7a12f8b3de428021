"""The teacher's answers on disk, so that epochs after the first do not run it: top-k log-probabilities and tail mass per token.

One file per distinct batch, written atomically at the first visit (so an interrupted run resumes), in a folder named by the teacher's
weights: another teacher never reads them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from dualbranch.data.packing import Rows
from dualbranch.distill.losses import truncated_distill_loss, truncated_targets
from dualbranch.storage import CheckpointError
from dualbranch.tensor_file import load_tensors, save_tensors


def weights_hash(model: nn.Module) -> str:
    """Sixteen hex digits that identify the weights."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(p.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class TeacherCache:
    """Top-k targets of `teacher`, stored under `folder/HASH/`. `k` may not exceed the vocabulary."""

    def __init__(self, folder: Path, k: int, teacher: nn.Module) -> None:
        if k > teacher.config.vocab_size:
            raise ValueError(f"student.cache_logits is {k}, more than the vocabulary of {teacher.config.vocab_size}; lower it")
        self.k, self.teacher = k, teacher
        self.folder = folder / f"{weights_hash(teacher)}-top{k}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.n_computed = 0  # batches the teacher had to run

    def targets(self, batch: int, rows: Rows, keep: Tensor) -> tuple[Tensor, Tensor]:
        """`ids (n, k)`, `log_p (n, k + 1)` of the tokens of `rows` where `keep (R, T)`, in order."""
        key = hashlib.sha256(rows.tokens.cpu().numpy().tobytes() + keep.cpu().numpy().tobytes()).hexdigest()[:12]  # of this part of the batch
        path = self.folder / f"{batch:06d}-{key}.safetensors"
        if path.exists():
            try:
                stored = load_tensors(path)
                return stored["ids"].long().to(keep.device), stored["log_p"].float().to(keep.device)
            except (CheckpointError, KeyError):
                path.unlink()  # damaged: compute it again
        self.n_computed += 1
        with torch.no_grad():
            logits = self.teacher(rows.tokens, doc_start=rows.doc_start, logits_at=keep).logits
        ids, log_p = truncated_targets(logits, self.k)
        save_tensors(path, {"ids": ids.int(), "log_p": log_p.half()}, {})
        return ids, log_p.half().float()

    def loss(self, batch: int, rows: Rows, student_logits: Tensor, weights: Tensor) -> Tensor:
        """Sum of the top-k KL over `rows` by `weights (R, T)`; `student_logits (n, V)` of the tokens with a weight, in order."""
        keep = weights > 0
        ids, log_p = self.targets(batch, rows, keep)
        return truncated_distill_loss(ids, log_p, student_logits, weights[keep])
