"""Recall at distance: the question says how far back its answer stands, and a model that copies scores where one that can't see so far does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model

from dualbranch.checkpoint import save_checkpoint
from dualbranch.cli import main as cli
from dualbranch.recall import OWNERS, PASSWORDS, ask, distances_within, recall, recall_rows

TEXTS = ["the sum of two numbers is what three people take after apples are left. " * 40, "how many apples are left? " * 30]


def test_a_question_repeats_a_sentence_that_stands_at_its_distance(tiny):
    tok = tiny[1]
    for distance in (150, 400):
        questions = ask(tok, TEXTS, distance, 12)
        for q in questions:
            end = tok.decode(q.tokens[-60:].tolist())
            asked = end.rsplit("\n\n", 1)[1]
            owner, password = asked.split("'s password is ")
            assert owner in OWNERS and password in PASSWORDS
            n = len(tok.encode(f"\n\n{asked}"))
            given = q.tokens[len(q.tokens) - n - distance :]
            assert tok.decode(given[: n + 2].tolist()).startswith(f"\n\n{asked}."), "the sentence begins `distance` tokens before the question"
            assert password.endswith(tok.decode(q.tokens[-q.n_answer :].tolist()).strip())
            assert tok.decode(q.tokens.tolist()).count("password is") == 4, "two others stand beside it"


def test_questions_depend_on_the_seed_alone(tiny):
    tok = tiny[1]
    a, b, other = (ask(tok, TEXTS, 200, 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x.tokens, y.tokens) for x, y in zip(a, other, strict=True))


class Copier:
    """Completes a sentence by what followed its beginning the last time, on route fast only if that is less than `reach` tokens ago."""

    gate, calibration, device = object(), object(), torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach, self.config = reach, SimpleNamespace(max_seq_len=1000, fast_only=False)

    def __call__(self, tokens, route, budget=None, logits_at=None):
        ids, logits = tokens[0].tolist(), torch.zeros(int(logits_at.sum()), 500)
        for row, at in enumerate(logits_at[0].nonzero().flatten().tolist()):
            key = ids[at - 14 : at + 1]
            for back in range(at - 1, 14, -1):
                if ids[back - 14 : back + 1] == key:
                    if route == "slow" or at - back < self.reach:
                        logits[row, ids[back + 1]] = 20.0
                    break
        use_slow = None if route == "slow" else torch.full(tokens.shape, route == "auto") & (torch.arange(tokens.shape[1]) % 2 == 0)
        return SimpleNamespace(logits=logits, use_slow=use_slow)


def test_what_a_route_can_not_see_it_does_not_recall(tiny):
    records = recall(Copier(300), tiny[1], TEXTS, [0.5], [200, 400], n=6)
    by = {(r["route"], r["distance"]): r for r in records}
    assert by["slow", 200]["accuracy"] == by["slow", 400]["accuracy"] == by["fast", 200]["accuracy"] == 1
    assert by["fast", 400]["accuracy"] == 0 and by["fast", 400]["nll"] > 5 > 0.1 > by["fast", 200]["nll"]
    assert by["slow", 200]["slow_share"] == 1 and by["fast", 200]["slow_share"] == 0 and abs(by["auto", 200]["slow_share"] - 0.5) < 0.01
    head, rows = recall_rows(records)
    assert head == ["route", "200 tokens", "400 tokens"] and [row[0] for row in rows] == ["slow", "fast", "auto 0.5"] and rows[1][2].startswith("0% (")


def test_recall_refuses_what_does_not_fit(tiny):
    model, tok = tiny
    with pytest.raises(ValueError, match="max_seq_len is 256"):
        recall(model, tok, TEXTS, [], [400], n=1)
    with pytest.raises(ValueError, match="needs some text"):
        ask(tok, [""], 100, 1)
    for distances, n in (([150], 0), ([0], 1), ([-100], 1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            recall(model, tok, TEXTS, [], distances, n=n)
    assert len(ask(tok, ["short"], 100, 1)[0].tokens) > 130
    assert distances_within(8192) == (256, 1024, 2048, 4096) and distances_within(2048) == (256, 1024) and distances_within(128) == ()


def test_the_command_measures_every_route(tiny, tmp_path, capsys):
    tok = tiny[1]
    save_checkpoint(tmp_path / "m", make_tiny_model(tok.vocab_size, max_seq_len=512), tok)
    (tmp_path / "t.txt").write_text(" ".join(TEXTS))
    model, text, options = str(tmp_path / "m"), str(tmp_path / "t.txt"), ["--distances", "150", "300", "--n-problems", "2", "--budgets", "0.5"]
    assert cli(["eval", model, "--on", "recall", text, *options]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("slow", "fast", "auto 0.5", "150 tokens", "300 tokens"))


def test_a_fast_branch_alone_is_evaluated_on_the_route_it_has(tiny, tmp_path, capsys):
    tok = tiny[1]
    save_checkpoint(tmp_path / "m", make_tiny_model(tok.vocab_size), tok)
    assert cli(["export", str(tmp_path / "m"), "--branch", "fast", "--out", str(tmp_path / "f")]) == 0
    (tmp_path / "t.txt").write_text(" ".join(TEXTS))
    fast, text = str(tmp_path / "f"), str(tmp_path / "t.txt")
    capsys.readouterr()
    assert cli(["eval", fast, "--on", "recall", text, "--distances", "100", "--n-problems", "1"]) == 0
    assert cli(["eval", fast, "--on", "tasks", "arithmetic", "--n-problems", "1", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "  fast " in out and "fast, thinking on" in out and "slow," not in out
    assert cli(["eval", fast, "--on", "recall", text]) != 0 and "give --distances" in capsys.readouterr().err
