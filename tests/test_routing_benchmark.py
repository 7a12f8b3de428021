"""Claims about benchmarks/routing.py, on a tiny model."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest

from dualbranch.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import routing


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Compute {i} + 356. The answer is {i + 356}.\n" for i in range(200)), encoding="utf-8")
    return str(path)


def test_policies_stand_between_fast_and_slow_at_exact_shares(tiny, tmp_path, text, capsys):
    model, tok = tiny
    save_checkpoint(tmp_path / "model", model, tok)
    found = routing.main([str(tmp_path / "model"), "--text", text, "--window", "64", "--max-tokens", "640", "--shares", "0.25", "--dtype", "float32"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(found))
    (at,) = found["study"]["shares"]
    nll = {name: p["nll"] for name, p in at["policies"].items()}
    gap = nll["random"] - nll["oracle"]  # of a random model it may be negative
    assert at["closed_nats"] == (pytest.approx((nll["random"] - nll["gate"]) / gap) if gap > 0 else None)
    assert "position" not in nll, "it would be learned from the rows it is measured on"
    assert all(math.isclose(p["slow_share"], 0.25, abs_tol=0.01) for name, p in at["policies"].items() if name in ("gate", "oracle", "random"))
    assert at["policies"]["oracle"]["kl"] < at["policies"]["random"]["kl"]
    assert {(c["branch"], c["replaced_by"]) for c in found["ablations"]["cases"]} == {(b, r) for b in ("slow", "fast") for r in ("zero", "mean")}


def test_a_model_without_a_gate_and_a_share_of_nothing_are_refused(tiny, tmp_path, text, capsys):
    model, tok = tiny
    save_checkpoint(tmp_path / "gated", model, tok)
    ungated = copy.deepcopy(model)
    ungated.calibration = None
    save_checkpoint(tmp_path / "ungated", ungated, tok)
    for folder, shares, complaint in (("ungated", "0.5", "no calibrated gate"), ("gated", "0", "between 0 and 1")):
        with pytest.raises(SystemExit):
            routing.main([str(tmp_path / folder), "--text", text, "--shares", shares])
        assert complaint in capsys.readouterr().err
