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
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def losses(tmp_path: Path, name: str, launcher: list[str], *more: str) -> list[float]:
    settings = [x for s in (*SETTINGS, f"out={tmp_path}", f"name={name}", *more) for x in ("--set", s)]
    command = [sys.executable, *launcher, "train.py", "configs/tiny.yaml", "--resume", *settings]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["stage"] == "teacher"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo backend")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_processes_reach_the_losses_of_one(tmp_path, optimizer):
    one = losses(tmp_path, "one", [], f"teacher.optim.kind={optimizer}")
    two = losses(tmp_path, "two", TWO, f"teacher.optim.kind={optimizer}")
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-3), (one, two)
    assert one[-1] < one[0]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo backend")
def test_two_processes_finish_the_whole_pipeline(tmp_path):
    small = ["student.steps=3", "student.refit_rows=4", "gate.rows=4", "gate.steps=5", "gate.calibration_rows=4", "gate.n_problems=4"]
    small += ["evaluation.n_problems=2", "evaluation.n_shifted=0", "evaluation.budgets=[0.3]", "evaluation.routing_rows=4", "evaluation.max_tokens=16"]
    losses(tmp_path, "whole", TWO, "until=report", *small)
    assert (tmp_path / "whole" / "report.md").exists()
