"""Claims about benchmarks/replies.py, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from dualbranch.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import replies


def test_slow_replies_agree_with_the_slow_branch_and_fast_ones_less(tiny, tmp_path, capsys):
    save_checkpoint(tmp_path, *tiny)
    assert replies.main([str(tmp_path), "--ways", "think", "auto:0.5", "fast", "--max-tokens", "12"]) == 0
    think, auto, fast = json.loads(capsys.readouterr().out.splitlines()[-1])["ways"]
    assert think["slow_share"] == 1 and fast["slow_share"] == 0 < auto["slow_share"] < 1
    assert think["agreement"] > auto["agreement"] > fast["agreement"]
    assert think["surprise"] < fast["surprise"]


def test_loops_counts_runs_that_stood_before():
    assert replies.loops([1, 2, 3]) == 0
    assert replies.loops([1, 2, 3, 4, 5, 6]) == 0
    assert replies.loops([7] * 8) == pytest.approx(4 / 5)


def test_an_unknown_way_ends_before_anything_is_measured(tiny, tmp_path, capsys):
    save_checkpoint(tmp_path, *tiny)
    for way in ("sideways", "auto:2"):
        with pytest.raises(SystemExit):
            replies.main([str(tmp_path), "--ways", "think", way])
    with pytest.raises(SystemExit):
        replies.main([str(tmp_path / "nothing")])
    assert "think" not in capsys.readouterr().out
