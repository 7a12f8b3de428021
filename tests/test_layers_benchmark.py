"""Claims about benchmarks/layers.py, on tiny layers."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_model

from dualbranch.compiled import unavailable

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import layers


@pytest.mark.slow
@pytest.mark.skipif(unavailable(make_tiny_model(400)) is not None, reason="no C++ compiler")
def test_every_branch_is_timed_at_every_context_by_the_step_it_takes_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    found = layers.main(["--precision", "fp32", "--contexts", "9", "40", "--repeats", "2"], make_tiny_model(400).config)
    assert json.loads(capsys.readouterr().out) == found
    assert [(r["context"], r["step"]) for r in found["results"]] == [(9, "fast"), (9, "slow"), (40, "fast-sparse"), (40, "slow")]
    assert all(r["us"]["median"] > 0 and r["of_bandwidth"] > 0 for r in found["results"])
