"""Claims about benchmarks/distillation.py, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from dualbranch.checkpoint import save_checkpoint
from dualbranch.distill.stages import dense_config
from dualbranch.model import DualBranchModel

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import distillation


def test_every_loss_heals_the_same_start_and_more_words_come_closer_to_all(tiny, tmp_path, monkeypatch, capsys):
    model, tok = tiny
    teacher = DualBranchModel(dense_config(model.config))
    teacher.load_state_dict({name: x for name, x in model.state_dict().items() if ".fast." not in name and not name.startswith("gate.")})
    save_checkpoint(tmp_path / "teacher", teacher, tok)
    (tmp_path / "text.txt").write_text("".join(f"Compute {i} + 356. The answer is {i + 356}.\n\n" for i in range(400)), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"teacher: {{checkpoint: {tmp_path / 'teacher'}}}\n"
        f"model: {{n_stem: 1, n_tail: 0, fast_n_heads: {model.config.fast_n_heads}, fast_d_ff: 16, d_gate: 4}}\n"
        f"data: {{text: [{tmp_path / 'text.txt'}], text_share: 1.0, seq_len: 64, batch_rows: 2}}\nstudent: {{align: 0.0, refit_rows: 4}}\n"
    )
    monkeypatch.setattr(distillation, "KEPT", (4, 64))
    distillation.main(["--config", str(tmp_path / "run.yaml"), "--steps", "6", "--text", str(tmp_path / "text.txt"), "--tokens", "2000", "--threads", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["fast"]) == set(distillation.LOSSES) and all(x != found["start"] for x in found["fast"].values())
    assert len(set(found["fast"].values())) == 3, "each loss is another"
    assert found["cosine_start"]["4"] < found["cosine_start"]["64"] <= 1.0001


def test_a_text_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        distillation.main(["--text", "/nowhere/text.txt"])
    assert "/nowhere/text.txt" in capsys.readouterr().err
