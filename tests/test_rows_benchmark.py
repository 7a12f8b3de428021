"""Claims about benchmarks/rows.py, on a tiny model and uncompiled steps."""

import json
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_model, make_tiny_tokenizer
from strict_steps import strict_steps

from dualbranch.checkpoint import save_checkpoint
from dualbranch.model import DualBranchModel
from dualbranch.precision import quantize
from dualbranch.runner import Runner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import rows


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    def compile_decode(model):
        model.runner = Runner(model, strict_steps(model))
        return True

    monkeypatch.setattr(DualBranchModel, "compile_decode", compile_decode)
    tok = make_tiny_tokenizer()
    save_checkpoint(tmp_path / "int8", quantize(make_tiny_model(tok.vocab_size), "int8"), tok)
    return str(tmp_path / "int8")


def test_rows_and_new_tokens_are_timed_both_ways(checkpoint, capsys):
    found = rows.main([checkpoint, "--rows", "1", "3", "--new", "2", "--context", "20", "--repeats", "2"])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == found and all(f" {r['differ']:.3f} " in shown.err for r in found["results"])
    assert [(r["route"], r["rows"], r["new"]) for r in found["results"]] == [(route, *n) for route in ("slow", "fast") for n in ((1, 1), (3, 1), (1, 2))]
    assert all(r["ms"][way]["median"] > 0 for r in found["results"] for way in rows.WAYS)


def test_nothing_is_timed_where_the_two_ways_differ(checkpoint, monkeypatch):
    made = Runner.__init__

    def spoiled(runner, model, steps):
        made(runner, model, steps)
        logits = runner.logits
        runner.logits = lambda x: logits(x).roll(1, -1)

    monkeypatch.setattr(Runner, "__init__", spoiled)
    with pytest.raises(SystemExit, match="nothing was timed"):
        rows.main([checkpoint, "--rows", "2", "--new", "--context", "20", "--repeats", "1"])


def test_bad_sizes_name_what_to_change(checkpoint, capsys):
    for wrong, said in ((["--rows", "0"], "at least 1"), (["--context", "100000"], "must fit the model")):
        with pytest.raises(SystemExit):
            rows.main([checkpoint, *wrong])
        assert said in capsys.readouterr().err
