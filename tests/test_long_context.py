"""Claims about benchmarks/long_context.py, on a tiny model."""

import sys
from pathlib import Path

import pytest

from dualbranch.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import long_context


@pytest.fixture
def arguments(tiny, tmp_path):
    model, tok = tiny
    save_checkpoint(tmp_path / "model", model, tok)
    (tmp_path / "text.txt").write_text("Compute 478 + 356. The answer is 834. " * 40, encoding="utf-8")
    return [str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--eager", "--steps", "4", "--repeats", "1", "--read", "100"]


def test_contexts_beyond_the_models_own_are_stretched_and_beyond_the_text_filled(arguments):
    rows = long_context.main([*arguments, "--lengths", "24", "100", "600"])
    assert [(r["context"], r["route"]) for r in rows] == [(n, route) for n in (24, 100, 600) for route in ("slow", "fast", "auto")]
    assert all((r["prefill_s"] is None) == (r["context"] == 600) and r["ms_per_token"]["median"] > 0 for r in rows)
    assert {r["slow_share"] for r in rows if r["route"] == "slow"} == {1.0} and {r["slow_share"] for r in rows if r["route"] == "fast"} == {0.0}
    assert rows[0]["cache_bytes"] < rows[3]["cache_bytes"] < rows[6]["cache_bytes"]


def test_decoding_that_is_not_one_pass_is_not_timed(arguments, monkeypatch):
    monkeypatch.setattr(long_context, "DECODE_ERROR", -1.0)
    with pytest.raises(SystemExit, match="24 tokens, route slow: decoded logits differ"):
        long_context.main([*arguments, "--lengths", "24"])
