"""`torchrun` on CPU (gloo, FSDP2) reaches the losses of one process at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

ROOT = Path(__file__).parents[1]
SETTINGS = ["until=teacher", "data.batch_rows=4"]
SETTINGS += ["tokenizer.n_problems=400", "tokenizer.vocab_size=700", "teacher.steps=6", "teacher.n_assess=4", "save_every=3"]


def losses(tmp_path: Path, name: str, optimizer: str, launcher: list[str], *more: str) -> list[float]:
    settings = [x for s in (*SETTINGS, f"out={tmp_path}", f"name={name}", f"teacher.optim.kind={optimizer}", *more) for x in ("--set", s)]
    command = [sys.executable, *launcher, "train.py", "configs/tiny.yaml", "--resume", *settings]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["stage"] == "teacher"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo backend")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_reach_the_losses_of_one(tmp_path, optimizer):
    one = losses(tmp_path, "one", optimizer, [])
    two = losses(tmp_path, "two", optimizer, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-3), (one, two)
    assert one[-1] < one[0]
