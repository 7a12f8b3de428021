import json
import time

import pytest

from dualbranch.data import text as text_module
from dualbranch.data.text import SECTION, VALID_SHARE, load_documents, load_examples, read_documents
from dualbranch.distill.sources import text_documents
from dualbranch.tokenizer import Tokenizer

MANY = [f"Document number {i} tells of {i * i} things." for i in range(2000)]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(MANY, 320)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, *records):
    return write(path, "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")


def both(paths):
    return load_documents(paths, "train") + load_documents(paths, "valid")


def refused(path):
    with pytest.raises(ValueError) as error:
        list(read_documents(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_folders_and_lists_of_them_are_read_in_sorted_order(tmp_path):
    write(tmp_path / "d" / "b.txt", "second")
    write(tmp_path / "d" / "a.txt", "first\n")
    jsonl(tmp_path / "d" / "sub" / "c.jsonl", {"text": "third"})
    for ignored in ("d/.hidden.txt", "d/.git/x.txt", "d/note.md"):
        write(tmp_path / ignored, "ignored")
    assert [d.plain for d in read_documents(tmp_path / "d")] == ["first", "second", "third"]
    assert [d.plain for d in read_documents(str(tmp_path / "d" / "b.txt"))] == ["second"]
    two = [tmp_path / "d" / "b.txt", tmp_path / "d" / "sub"]
    assert [d.plain for d in read_documents(two)] == ["second", "third"]


def test_jsonl_takes_text_questions_and_messages(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "plain 计算", "id": 3},
        {"question": "2 + 3?", "answer": "5"},
        "",
        {"question": "2 + 3?", "answer": "5", "reasoning": "count"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    )
    documents = list(read_documents(path))
    assert [d.plain for d in documents] == ["plain 计算", "2 + 3?\n5", "2 + 3?\ncount\n5", "s\nu\na"]
    assert [d.source for d in documents] == [f"{path}:{n}" for n in (1, 2, 4, 5)]


def test_conversations_use_the_chat_template_and_train_only_the_assistant(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(text_module, "VALID_SHARE", 0.0)
    path = jsonl(tmp_path / "x.jsonl", {"question": "2 + 3? <|end|>", "answer": "5", "reasoning": "count"})
    ((ids, weights),) = load_examples(tok, path, "train", 64)
    assert tok.decode(ids, skip_control=False) == "<bos><|user|>2 + 3? <|end|><|end|><|assistant|><think>count</think>5<|end|>"
    assert ids.count(tok.end_id) == 2
    n_trained = len(tok.encode("count")) + len(tok.encode("5")) + 2
    assert weights == [0.0] * (len(ids) - n_trained) + [1.0] * n_trained


def test_long_text_becomes_pieces_that_lose_nothing(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(text_module, "VALID_SHARE", 0.0)
    content = " ".join(MANY[:100])
    path = write(tmp_path / "x.txt", content)
    examples = list(load_examples(tok, path, "train", 32))
    assert all(ids[0] == tok.bos_id and len(ids) <= 32 and w == [0.0] + [1.0] * (len(ids) - 1) for ids, w in examples)
    assert tok.decode([i for ids, _ in examples for i in ids]) == content


def test_conversations_longer_than_a_row_are_left_out_with_a_warning_and_refused_where_all_are(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(text_module, "VALID_SHARE", 0.0)
    long, short = ({"question": "q" * n, "answer": "a"} for n in (100, 1))
    with pytest.warns(UserWarning, match=r"1 of 2 conversations of the train text are longer than data\.seq_len = 32"):
        assert len(text_documents(tok, (str(jsonl(tmp_path / "x.jsonl", long, short)),), (), "train", 32)) == 1
    with pytest.raises(ValueError, match=r"1 of 1 .* raise it"):
        text_documents(tok, (str(jsonl(tmp_path / "y.jsonl", long)),), (), "train", 32)
    monkeypatch.setattr(text_module, "VALID_SHARE", 1.0)
    with pytest.warns(UserWarning, match="1 of 1 conversations of the valid text"):
        assert text_documents(tok, (str(jsonl(tmp_path / "z.jsonl", long)),), (), "valid", 32) == []


def test_cutting_a_long_file_takes_time_in_proportion(tmp_path):
    def seconds(n: int) -> float:
        path = write(tmp_path / f"{n}.txt", "some words and a few more\n" * (n * 40_000))
        started = time.process_time()
        assert sum(len(d.text) for d in read_documents(path)) > n * 1_000_000
        return time.process_time() - started

    assert seconds(24) < 16 * seconds(4)


def test_splits_are_disjoint_complete_and_about_as_large_as_promised(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *({"text": t} for t in MANY))
    train, valid = load_documents(path, "train"), load_documents(path, "valid")
    assert set(train) | set(valid) == set(MANY) and not set(train) & set(valid)
    assert 0.5 * VALID_SHARE < len(valid) / len(MANY) < 2 * VALID_SHARE


def test_split_depends_on_the_document_alone_not_on_place_or_company(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *({"text": t} for t in MANY))
    valid = set(load_documents(path, "valid"))
    shuffled = jsonl(tmp_path / "y.jsonl", *({"text": t} for t in ["new one", *reversed(MANY[500:]), *MANY[500:]]))
    assert set(load_documents(shuffled, "valid")) - {"new one"} == valid & set(MANY[500:])


def test_a_long_txt_file_becomes_sections_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{t}\n{t}" for t in MANY]
    path = write(tmp_path / "book.txt", "\n\n".join(paragraphs))
    sections = [d.plain for d in read_documents(path)]
    assert len(sections) > 5 and all(len(s) <= 2 * SECTION for s in sections)
    assert "\n\n".join(sections) == "\n\n".join(paragraphs)
    assert load_documents(path, "train")
    wall = write(tmp_path / "wall.txt", "x" * (5 * SECTION))
    assert "".join(d.plain for d in read_documents(wall)) == "x" * (5 * SECTION)


def test_endoftext_lines_separate_documents_of_a_txt_file(tmp_path):
    path = write(tmp_path / "x.txt", "one\n<|endoftext|>\ntwo <|endoftext|> still two\n<|endoftext|>\n\n")
    assert [d.plain for d in read_documents(path)] == ["one", "two <|endoftext|> still two"]


def test_windows_line_ends_and_byte_order_marks_are_removed(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbfa\r\nb\r\n")
    assert [d.plain for d in read_documents(path)] == ["a\nb"]
    jsonl(tmp_path / "x.jsonl", '{"text": "a"}\r', '{"text": "b"}\r')
    assert [d.plain for d in read_documents(tmp_path / "x.jsonl")] == ["a", "b"]


def test_empty_files_in_a_folder_are_passed_over(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "text")
    assert both(tmp_path) == ["text"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"", "x.txt: is empty"),
        ("x.txt", b" \n\n", "x.txt: is empty"),
        ("x.jsonl", b"\n\n", "x.jsonl: is empty"),
        ("x.jsonl", b'{"text": " "}', "x.jsonl: is empty"),
        ("x.txt", b"ok\nok \xff\n", "x.txt:2: not UTF-8 text (byte 6 is 0xff)"),
        ("x.txt", b"\xef\xbb\xbfok\nok \xff\n", "x.txt:2: not UTF-8 text (byte 9 is 0xff)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": ', "x.jsonl:3: not JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[1]", "x.jsonl:1: got a list, needed an object"),
        ("x.jsonl", b"{}", "x.jsonl:1: needed a field text, or question and answer, or messages; got none"),
        ("x.jsonl", b'{"txt": "a"}', "x.jsonl:1: needed a field text, or question and answer, or messages; got 'txt'"),
        ("x.jsonl", b'{"text": 3}', "x.jsonl:1: text is int, needed a string"),
        ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl:1: not valid Unicode"),
        ("x.jsonl", b'{"question": "a"}', "x.jsonl:1: needed a field text"),
        ("x.jsonl", b'{"question": "a", "answer": null}', "x.jsonl:1: answer is NoneType, needed a string"),
        ("x.jsonl", b'{"messages": []}', "x.jsonl:1: messages must be a non-empty list"),
        ("x.jsonl", b'{"messages": [{"role": "tool"}]}', "x.jsonl:1: messages[0]: role is 'tool'"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}', "x.jsonl:1: messages[0]: content is NoneType"),
        ("x.pdf", b"text", "x.pdf: needed a .txt or .jsonl file"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, name, content, message):
    assert refused(write(tmp_path / name, content)).removeprefix(f"{tmp_path}/").startswith(message)


def test_missing_paths_and_folders_without_text_are_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "absent.txt")
    assert "no .txt or .jsonl file" in refused(tmp_path)
    with pytest.raises(ValueError, match="no text files given"):
        load_documents([], "train")


def test_unknown_splits_are_refused_and_an_empty_training_split_is_explained(tmp_path, tok, monkeypatch):
    path = write(tmp_path / "x.txt", "text")
    with pytest.raises(ValueError, match="split is 'test'"):
        load_documents(path, "test")
    with pytest.raises(ValueError, match="seq_len is 1"):
        list(load_examples(tok, path, "train", 1))
    monkeypatch.setattr(text_module, "VALID_SHARE", 1.0)
    with pytest.raises(ValueError, match="all 1 documents fall into the validation split"):
        load_documents(path, "train")
