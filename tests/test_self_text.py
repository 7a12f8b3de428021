"""Text that the teacher writes itself: each document as if written alone, the same again after a stop, and data like any other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model

from dualbranch.cache import KVCache
from dualbranch.chat import chat_format, render_prompt
from dualbranch.checkpoint import save_checkpoint
from dualbranch.convert.export import slow_model
from dualbranch.distill import pipeline, self_text
from dualbranch.distill.config import DataConfig, RunConfig, TeacherConfig
from dualbranch.distill.sources import BatchSource
from dualbranch.model import DualBranchModel, ModelOutput


@pytest.fixture(scope="module")
def teacher(tiny) -> DualBranchModel:
    return slow_model(make_tiny_model(tiny[1].vocab_size, n_layers=3))


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(self_text, "N_ROWS", 8)
    monkeypatch.setattr(self_text, "SHORTEST", 4)


def run_config(**data) -> RunConfig:
    return RunConfig(data=DataConfig(text_share=1.0, seq_len=32, batch_rows=2, **data))


@torch.no_grad()
def test_a_document_is_what_the_model_writes_alone_however_its_row_began(teacher, tiny, few, monkeypatch):
    tok = tiny[1]
    monkeypatch.setattr(self_text, "draw", lambda probs, u: probs.argmax(-1))

    def greedy(ids: list[int]) -> list[int]:
        n = len(ids)
        while len(ids) < 64:
            token = int(teacher(torch.tensor([ids])).logits[0, -1].argmax())
            if tok.is_control(token):
                break
            ids.append(token)
        return ids[n:]

    documents = [d for seed, n in enumerate((24, 40, 56)) for d in self_text.sample_documents(teacher, tok, 8, n, seed)]
    starts = [[tok.bos_id, *(tok.encode(opening) if opening else [])] for opening in self_text.OPENINGS]
    alone = [tok.decode([*ids, *greedy([*ids])]) for ids in starts]
    texts = [d["text"] for d in documents if "text" in d]
    wrong = [text for text in texts if not any(whole.startswith(text.rstrip("\ufffd")) for whole in alone)]
    assert len(texts) >= 12 and not wrong, f"{len(wrong)} of {len(texts)} documents are no continuation of an opening: {wrong[:2]}"


@torch.no_grad()
def test_a_conversation_is_the_users_words_and_the_reply_to_them(tiny, few, monkeypatch):
    """A model that writes one letter three times, then ends the turn, whatever it reads."""
    tok, turns = tiny[1], []
    letter, prompt = tok.encode("a")[-1], render_prompt(tok, [{"role": "user", "content": ""}])

    class Writer:
        config, device = make_tiny_model(tok.vocab_size).config, torch.device("cpu")

        def new_cache(self, n_rows, seq_len):
            self.read = [[] for _ in range(n_rows)]
            return KVCache(self.config, n_rows, seq_len)

        def __call__(self, newest, route, cache):
            logits = torch.zeros(len(newest), 1, self.config.vocab_size)
            for row, token in enumerate(newest[:, 0].tolist()):
                self.read[row] = [*self.read[row][: int(cache.n_cached[row])], token]
                logits[row, 0, tok.end_id if self.read[row][-3:] == [letter] * 3 else letter] = 1.0
            cache.n_cached += 1
            turns.append([*self.read])
            return ModelOutput(logits, logits, None, None)

    monkeypatch.setattr(self_text, "draw", lambda probs, u: probs.argmax(-1))
    found = [d["messages"] for d in self_text.sample_documents(Writer(), tok, 8, 60, seed=0) if "messages" in d]
    words = tok.decode([letter] * 3)
    assert len(found) >= 8 and [{"role": "user", "content": words}, {"role": "assistant", "content": words}] in found
    for user, reply in found:
        assert user == {"role": "user", "content": words} and words.startswith(reply["content"]) and reply["content"]
    whole = render_prompt(tok, [{"role": "user", "content": words}])
    skip = [*chat_format(tok).thinking.skip]
    assert any(row[: len(whole) + len(skip)] == [*whole, *skip] for rows in turns for row in rows), "the reply is written where a prompt asks for one"
    assert len(whole) == len(prompt) + 3


def test_models_without_a_chat_format_write_texts_alone(tiny, monkeypatch):
    assert len(self_text.openings_of(tiny[1])) == 2 * len(self_text.OPENINGS)
    monkeypatch.setattr(self_text, "chat_format", lambda tok: replace(chat_format(tok), name="plain"))
    assert not any(d.turns for d in self_text.openings_of(tiny[1]))


def test_documents_depend_on_the_seed_and_are_drawn_not_chosen(teacher, tiny, few):
    a, b, other = (self_text.sample_documents(teacher, tiny[1], 8, 32, seed) for seed in (0, 0, 1))
    assert a == b != other and len(set(map(str, a))) > len(a) // 2


def test_a_run_cut_short_goes_on_with_the_next_round(teacher, tiny, few, tmp_path):
    config = run_config(self_text=3 * 8 * 32)
    self_text.with_self_text(config, tmp_path, teacher, tiny[1])
    files = sorted((tmp_path / "self_text").iterdir())
    assert [f.name for f in files] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    before = [f.read_bytes() for f in files]
    files[1].unlink()
    files[0].write_text(json.dumps({"text": "left as it is"}) + "\n")
    self_text.with_self_text(config, tmp_path, teacher, tiny[1])
    assert files[1].read_bytes() == before[1] and "left as it is" in files[0].read_text()


def test_self_written_text_is_split_by_document_and_packed(teacher, tiny, few, tmp_path):
    config = self_text.with_self_text(run_config(self_text=24 * 8 * 32), tmp_path, teacher, tiny[1])
    train, valid = (BatchSource(config.data, tiny[1], 0, 16, split) for split in ("train", "valid"))
    assert len(train.documents) > 8 * len(valid.documents) > 0
    assert not {tuple(ids) for ids, _ in train.documents} & {tuple(ids) for ids, _ in valid.documents if len(ids) > 8}
    assert train.batch(0).tokens.shape == (2, 32)
    assert self_text.with_self_text(RunConfig(), tmp_path, teacher, tiny[1]) == RunConfig(), "nothing is sampled unasked"


def test_the_pipeline_gives_the_student_its_teachers_text(teacher, tiny, few, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def student(config, *_):
        assert [p.endswith("self_text") for p in config.data.text] == [True]
        raise Enough

    save_checkpoint(tmp_path / "teacher", teacher, tiny[1])
    monkeypatch.setattr(pipeline, "make_student", student)
    config = run_config(self_text=24 * 8 * 32)
    config = replace(config, out=str(tmp_path), name="run", model=teacher.config, teacher=TeacherConfig(checkpoint=str(tmp_path / "teacher")))
    with pytest.raises(Enough):
        pipeline.run(config)
    with pytest.raises(Enough):
        pipeline.run(config, resume=True)
    assert "self_text: 6144" in (tmp_path / "run" / "config.yaml").read_text()
