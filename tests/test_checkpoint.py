import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import write_gguf

from dualbranch import tensor_file
from dualbranch.checkpoint import CHECKPOINT_FILES, load, load_checkpoint, newest_run, read_manifest, save_checkpoint
from dualbranch.config import DualBranchConfig
from dualbranch.gate import Calibration
from dualbranch.model import DualBranchModel
from dualbranch.storage import CheckpointError, new_folder, write_text
from dualbranch.tensor_file import load_tensors, load_weights, save_tensors
from dualbranch.tokenizer import Tokenizer
from dualbranch.training_state import load_latest_state, save_state

CONFIG = DualBranchConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, fast_n_heads=1, fast_d_ff=16
)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(["the quick brown fox, hello hello world"] * 3, 284)


def make_model(seed, config=CONFIG):
    model = DualBranchModel(config)
    model.init_weights(seed)
    model.calibration = Calibration((0.1, 0.5), (0.2, 0.6), 0.25)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def pristine(tok, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "student"
    save_checkpoint(folder, model, tok, {"step": 7})
    return folder


@pytest.fixture
def saved(pristine, tmp_path):
    """A checkpoint this test may damage."""
    return shutil.copytree(pristine, tmp_path / "student")


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(folder, **kwargs):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def forge(folder, name, content):
    """Replace a file and make the manifest agree, as someone malicious would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---- checkpoints


def test_saved_model_loads_with_equal_logits_config_calibration_and_tokenizer(pristine, model, tok):
    loaded, loaded_tok = load_checkpoint(pristine)
    tokens = torch.randint(0, 284, (2, 20), generator=torch.Generator().manual_seed(1))
    for route in ("slow", "fast"):
        assert torch.equal(loaded(tokens, route).logits, model(tokens, route).logits), route
    assert loaded.config == model.config and loaded.calibration == model.calibration
    assert loaded_tok.hash == tok.hash and not loaded.training


def test_a_checkpoint_is_exactly_the_documented_files(pristine):
    assert sorted(p.name for p in pristine.iterdir()) == sorted([*CHECKPOINT_FILES, "manifest.json"])
    manifest = read_manifest(pristine)
    assert set(manifest["files"]) == set(CHECKPOINT_FILES) and manifest["extra"] == {"step": 7}
    for name, entry in manifest["files"].items():
        content = (pristine / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_weights_are_plain_safetensors_under_the_models_names(pristine, model):
    assert safetensors.torch.load_file(pristine / "model.safetensors").keys() == model.state_dict().keys()


def test_an_uncalibrated_model_has_no_calibration_file_and_none_is_left_over(saved, tok):
    model = make_model(1)
    model.calibration = None
    save_checkpoint(saved, model, tok)
    assert not (saved / "calibration.json").exists()
    assert load_checkpoint(saved)[0].calibration is None


def test_a_dense_teacher_and_an_untied_head_are_saved_too(tmp_path, tok):
    for config in (
        DualBranchConfig(vocab_size=290, d_model=32, n_layers=2, n_stem=2, n_heads=2, head_dim=16, d_ff=48),
        DualBranchConfig(vocab_size=290, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=48, tie_embeddings=False),
    ):
        model = make_model(2, config)
        save_checkpoint(tmp_path / "c", model, tok)
        assert same_weights(load_checkpoint(tmp_path / "c")[0], model)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_on_disk_is_selectable_and_kept_on_load_unless_asked_otherwise(tmp_path, tok, model, dtype):
    save_checkpoint(tmp_path / "c", model, tok, dtype=dtype)
    expected = {name: t.to(getattr(torch, dtype)) for name, t in model.state_dict().items()}
    stored = load_checkpoint(tmp_path / "c")[0]
    assert stored.dtype == getattr(torch, dtype)
    assert all(torch.equal(t, expected[name]) for name, t in stored.state_dict().items())
    wide = load_checkpoint(tmp_path / "c", dtype=torch.float32)[0]
    assert all(torch.equal(t, expected[name].float()) for name, t in wide.state_dict().items())
    assert model.dtype == torch.float32, "saving changed the model"


def test_loading_leaves_the_random_state_and_the_files_untouched(pristine):
    before = torch.get_rng_state()
    loaded, _ = load_checkpoint(pristine)
    with torch.no_grad():
        loaded.embed.weight.zero_()
    assert torch.equal(before, torch.get_rng_state())
    load_checkpoint(pristine)


def test_saving_replaces_the_checkpoint_and_keeps_other_files(saved, tok):
    (saved / "done").write_text("yes")
    (saved / "state" / "step-1").mkdir(parents=True)
    (saved / "state" / "step-1" / "x").write_text("kept")
    other = make_model(3)
    save_checkpoint(saved, other, tok)
    assert same_weights(load_checkpoint(saved)[0], other)
    assert (saved / "done").read_text() == "yes" and (saved / "state" / "step-1" / "x").read_text() == "kept"
    assert [p.name for p in saved.parent.iterdir()] == ["student"], "temporary folders were left"


def test_unusable_arguments_are_refused_before_anything_is_written(tmp_path, tok, model):
    broken = make_model(1)
    with torch.no_grad():
        broken.blocks[1].fast.ff_norm.weight[0] = float("nan")
    small = make_model(1, DualBranchConfig(vocab_size=100, d_model=32, n_layers=1, d_ff=32))
    large = make_model(1)
    with torch.no_grad():
        large.embed.weight[0, 0] = 1e6
    for bad, kwargs, message in (
        (model, {"dtype": "int8"}, "dtype is 'int8'"),
        (model, {"extra": {"x": object()}}, "extra must be plain JSON"),
        (broken, {}, "blocks.1.fast.ff_norm.* holds NaN"),
        (large, {"dtype": "float16"}, "embed.weight holds NaN or infinity as float16"),
        (small, {}, "tokenizer has 284 tokens, the model's vocab_size is 100"),
    ):
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path / "c", bad, tok, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_one_that_is_not_there_or_is_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("nothing", "empty", "link"):
        assert new_folder(tmp_path / name) == tmp_path / name
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("full", "full/file", "dangling"):
        with pytest.raises(ValueError, match=f"{name} exists already; give a folder that doesn't"):
            new_folder(tmp_path / name)


# ---- kills


class Killed(BaseException):
    pass


def killed_after(n_allowed, patch, action):
    """Run `action` and die at its file operation number `n_allowed`; True if it was finished before."""
    calls = 0

    def guarded(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > n_allowed:
                raise Killed
            return function(*args, **kwargs)

        return call

    with patch.context() as context:
        for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "link"), (shutil, "rmtree")):
            context.setattr(module, name, guarded(getattr(module, name)))
        try:
            action()
            return True
        except Killed:
            return False


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, tok, monkeypatch):
    old, new, third = make_model(1), make_model(2), make_model(3)
    folder = tmp_path / "student"
    outcomes = set()
    for n_allowed in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, old, tok)
        (folder / "done").write_text("yes")
        finished = killed_after(n_allowed, monkeypatch, lambda: save_checkpoint(folder, new, tok))
        loaded, _ = load_checkpoint(folder)
        is_new = same_weights(loaded, new)
        assert is_new or same_weights(loaded, old), f"killed after {n_allowed} operations"
        outcomes.add(is_new)
        save_checkpoint(folder, third, tok)
        assert same_weights(load_checkpoint(folder)[0], third)
        assert (folder / "done").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["student"], f"left over after {n_allowed}"
        if finished:
            break
    assert finished and n_allowed > 10 and outcomes == {True, False}


def test_a_kill_during_the_first_save_never_moves_the_training_state(tmp_path, tok, monkeypatch):
    model = make_model(1)
    folder = tmp_path / "student"
    for n_allowed in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        save_state(folder / "state", 3, model.state_dict(), {}, {})
        finished = killed_after(n_allowed, monkeypatch, lambda: save_checkpoint(folder, model, tok))
        assert load_latest_state(folder / "state").step == 3, f"killed after {n_allowed} operations"
        if (folder / "manifest.json").exists():
            assert same_weights(load_checkpoint(folder)[0], model)
        if finished:
            break
    assert finished and n_allowed > 10


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_save_that_is_stopped_leaves_the_old_checkpoint_and_nothing_beside_it(saved, tok, model, monkeypatch, stop):
    def stopped(path, *args):
        path.write_bytes(b"half")
        raise stop

    monkeypatch.setattr("dualbranch.checkpoint.save_tensors", stopped)
    for folder in (saved, saved.with_name("new")):
        with pytest.raises(stop):
            save_checkpoint(folder, make_model(3), tok)
    assert [p.name for p in saved.parent.iterdir()] == ["student"] and same_weights(load_checkpoint(saved)[0], model)


KILLED_LOOP = """
import sys, torch
from pathlib import Path
from dualbranch.checkpoint import load_checkpoint, save_checkpoint
from dualbranch.training_state import save_state
folder = Path(sys.argv[1])
model, tok = load_checkpoint(folder)
step = 0
while True:
    step += 1
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float(step))
    save_checkpoint(folder, model, tok, {"step": step})
    save_state(folder.parent / "state", step, model.state_dict(), {}, {"step": step})
    print(step, flush=True)
"""


def test_kill_9_at_a_random_time_leaves_a_valid_checkpoint_and_state(saved):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_LOOP, str(saved)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert int(process.stdout.readline()) == 1
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    last = [1, *map(int, process.stdout.read().split())][-1]
    process.wait()
    manifest, (model, _) = read_manifest(saved), load_checkpoint(saved)
    step = manifest["extra"]["step"]
    assert step in (last, last + 1)
    assert all(bool((p == step).all()) for p in model.parameters())
    state = load_latest_state(saved.parent / "state")
    assert state.step in (last, last + 1) and state.meta == {"step": state.step}
    assert all(bool((p == state.step).all()) for p in state.model_state.values())


# ---- damage


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_truncated_flipped_and_missing_files_are_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-1])
    message = refused(saved)
    assert name in message and "truncated" in message and "save it again" in message
    (saved / name).write_bytes(content + b" ")
    assert name in refused(saved)
    middle = len(content) // 2
    (saved / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    message = refused(saved)
    assert name in message and "sha256" in message
    (saved / name).unlink()
    message = refused(saved)
    assert name in message and "missing" in message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused_or_harmless(pristine, model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    name = data.draw(st.sampled_from([*CHECKPOINT_FILES, "manifest.json"]))
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    try:
        loaded, _ = load_checkpoint(folder)
    except CheckpointError:
        return
    assert name == "manifest.json" and same_weights(loaded, model)


def test_a_folder_without_manifest_or_no_folder_is_refused(saved, tmp_path):
    (saved / "manifest.json").unlink()
    assert "no manifest.json" in refused(saved)
    assert "no such folder" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(tmp_path / "file")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON"),
        ("[]", "not the manifest of a dualbranch-checkpoint"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "dualbranch-checkpoint", "version": 99, "files": {}}', "version 99, this dualbranch reads 1"),
        ('{"format": "dualbranch-checkpoint", "version": 1}', "malformed"),
        ('{"format": "dualbranch-checkpoint", "version": 1, "files": {"a": 3}}', "malformed"),
        ('{"format": "dualbranch-checkpoint", "version": 1, "files": {}}', "has no config.json"),
        ("[" * 100_000, "not JSON"),
        ('{"format": "dualbranch-checkpoint", "version": 1, "files": {"../x": {"size": 1, "sha256": ""}}}', "leads out"),
    ],
)
def test_malformed_manifests_are_refused(saved, content, message):
    (saved / "manifest.json").write_text(content)
    assert message in refused(saved)


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "manifest.json"])
def test_links_out_of_the_folder_are_refused(saved, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(saved / name, outside)
    (saved / name).symlink_to(outside)
    assert f"{name}: a link out of the checkpoint folder" in refused(saved)


def test_a_link_to_a_whole_checkpoint_folder_is_fine(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    direct, linked = (load_checkpoint(folder)[0].state_dict() for folder in (saved, tmp_path / "link"))
    assert all(torch.equal(direct[name], linked[name]) for name in direct)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10280])
def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path, length):
    weight = torch.arange(6.0).view(2, 3)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).ljust(length).encode()
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + weight.numpy().tobytes())
    for read in (load_tensors, load_weights):
        assert torch.equal(read(tmp_path / "w.safetensors")["w"], weight)


def test_pickle_is_refused_and_never_executed(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for payload in (pickle.dumps(Evil()), pickle.dumps(Evil(), 2), b"PK\x03\x04" + bytes(100)):
        forge(saved, "model.safetensors", payload)
        assert "pickle" in refused(saved)
    torch.save({"x": Evil()}, tmp_path / "model.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    for path in (tmp_path / "model.pt", folder):
        with pytest.raises(CheckpointError, match="pickle"):
            load(path)
    assert "pickle" in refused(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layers": 10**9}, "n_layers is 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"fast_d_ff": 10**30}, "fast_d_ff"),
        ({"d_gate": 10**18}, "d_gate"),
        ({"sparse": {"block_size": 2**40}}, "block_size must be an integer in"),
        ({"sparse": {"n_selected_blocks": 2**40, "dense_len": 0}}, "n_selected_blocks must be an integer in"),
        ({"d_model": -1}, "d_model is -1"),
        ({"n_heads": "two"}, "n_heads: got 'two' (str), needed int"),
        ({"n_laers": 2}, "unknown setting n_laers, did you mean n_layers?"),
        ({"d_ff": 64}, "has shape [48, 32], config.json asks for [64, 32]"),
        ({"n_layers": 3}, "tensor blocks.2."),
        ({"n_layers": 500}, "is missing"),
        ({"n_layers": 1}, "isn't part of the model"),
        ({"tie_embeddings": False}, "tensor head.weight is missing"),
        ({"vocab_size": 100}, "the tokenizer has 284 tokens"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    forge(saved, "config.json", json.dumps(config | change).encode())
    assert message in refused(saved)


def test_a_huge_config_is_refused_before_memory_is_allocated(saved):
    config = json.loads((saved / "config.json").read_text())
    huge = {"vocab_size": 1_000_000, "d_model": 32_768, "n_layers": 64, "d_ff": 262_144}  # 10^12 parameters, all in bounds
    forge(saved, "config.json", json.dumps(config | huge).encode())
    assert "shape" in refused(saved) or "missing" in refused(saved)


def raw_safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a safetensors file"),
        (b"\x01", "not a safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file, or truncated"),
        (raw_safetensors(b"{x"), "not JSON"),
        (raw_safetensors([]), "isn't a table"),
        (raw_safetensors({"a": 3}), "tensor a has a malformed"),
        (raw_safetensors({"a": F32 | {"dtype": "EVIL"}}, bytes(4)), "tensor a has a malformed"),
        (raw_safetensors({"a": F32 | {"shape": [-1]}}, bytes(4)), "tensor a has a malformed"),
        (raw_safetensors({"a": F32 | {"shape": [10**18]}}, bytes(4)), "tensor a has 4 bytes"),
        (raw_safetensors({"a": F32 | {"shape": [2**62], "data_offsets": [0, 2**64]}}, bytes(4)), "truncated"),
        (raw_safetensors({"a": F32, "b": F32}, bytes(4)), "overlap"),
        (raw_safetensors({"a": F32 | {"data_offsets": [4, 8]}}, bytes(8)), "holes"),
        (raw_safetensors({"a": F32}, bytes(3)), "accounts for"),
        (raw_safetensors({"a": F32}, bytes(5)), "accounts for"),
        (raw_safetensors({"a": F32}, bytes(4)), "is missing"),
    ],
)
def test_forged_safetensors_are_refused_by_their_header(saved, content, message):
    forge(saved, "model.safetensors", content)
    assert message in refused(saved)


def test_missing_and_renamed_tensors_are_named(saved, model):
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    name = "blocks.1.fast.w_q.weight"
    moved = tensors.pop(name)
    forge(saved, "model.safetensors", safetensors.torch.save(tensors))
    assert f"tensor {name} is missing" in refused(saved)
    forge(saved, "model.safetensors", safetensors.torch.save(tensors | {name: moved, "spare": moved.clone()}))
    assert "tensor spare isn't part of the model" in refused(saved)


def test_numbers_of_another_kind_are_named(saved, model):
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    tensors["norm.weight"] = tensors["norm.weight"].int()
    forge(saved, "model.safetensors", safetensors.torch.save(tensors))
    assert "tensor norm.weight holds I32, needed F16 or BF16 or F32" in refused(saved)


def test_what_safetensors_itself_refuses_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors({"__metadata__": {"a": 1}, "a": F32}, bytes(4)))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't be read"):
        load_tensors(path)


@pytest.mark.parametrize("shape", [[0, 2**70], [2**40, 2**40, 0], {}, [0.0]])
def test_a_malformed_shape_is_a_checkpoint_error(tmp_path, shape):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b""))
    for read in (load_tensors, tensor_file.load_weights):
        with pytest.raises(CheckpointError, match="tensor a has a malformed header entry"):
            read(path)


def test_a_file_that_shrinks_while_it_is_read_is_a_checkpoint_error(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors({"a": F32}, bytes(4)))
    monkeypatch.setattr(tensor_file, "in_huge_pages", lambda sizes: [torch.zeros(n + 1, dtype=torch.uint8) for n in sizes])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't be read \(it ends early\)"):
        tensor_file.load_weights(path)


# ---- names


@pytest.fixture
def runs(saved, tmp_path):
    """runs/one (teacher, student, gate), runs/two (student), runs/started (teacher), runs/empty."""
    root = tmp_path / "runs"
    for place in ("one/teacher", "one/student", "one/gate", "two/student", "started/teacher"):
        shutil.copytree(saved, root / place)
    (root / "empty").mkdir()
    return root


def test_load_finds_folders_runs_and_names(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    for given_name, found in {
        "one": "one/gate",
        "runs/one": "one/gate",
        str(runs / "one"): "one/gate",
        "two": "two/student",
        "one/teacher": "one/teacher",
        "runs/one/student/": "one/student",
    }.items():
        loaded = load(given_name)
        assert loaded.folder.resolve() == (runs / found).resolve(), given_name
        assert loaded.extra == {"step": 7} and loaded.tokenizer.vocab_size == 284
    monkeypatch.chdir(runs / "two" / "student")
    assert load(".").model.config == CONFIG


def test_load_lists_what_exists_when_nothing_is_found(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.parent)
    for name, message in {
        "thre": "thre: no such checkpoint or run; runs has one, two",
        "started": "no student yet, it has teacher; give runs/started/teacher",
        "empty": "neither a checkpoint .* nor a run",
        "runs": "runs: neither a checkpoint .*; runs has one, two",
        "": "no checkpoint or run given; runs has one, two",
        "../../etc": "no such checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load(name)
    monkeypatch.chdir(runs / "empty")
    with pytest.raises(CheckpointError, match="holds no finished run"):
        load("one")


def test_load_says_what_to_give_instead_of_a_file_or_a_folder_of_gguf_files(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "m.GGUF")
    for path, message in {
        saved / "model.safetensors": f"model.safetensors: a file that is no whole model; give its folder, {saved}",
        tmp_path / "notes.txt": "notes.txt: a file .* give a checkpoint's folder or a .gguf file",
        tmp_path / "models": f"models: not a checkpoint, but it holds GGUF files; give one of them: {tmp_path / 'models' / 'm.GGUF'}",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load(path)
    assert load(tmp_path / "models" / "m.GGUF").model.config.is_dense


def test_newest_run_is_the_one_whose_student_was_written_last(runs):
    for age, run in enumerate(("two/student", "one/gate")):
        os.utime(runs / run / "manifest.json", (1000 - age, 1000 - age))
    assert newest_run(runs) == runs / "two"
    os.utime(runs / "one" / "gate" / "manifest.json", (2000, 2000))
    assert newest_run(runs) == runs / "one"
    assert newest_run(runs / "empty") is None and newest_run(runs / "absent") is None


# ---- training state


def some_state(step):
    g = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=g)
    return {
        "model_state": {"a.weight": weight, "tied": weight, "transposed": weight.T, "half": weight.bfloat16()},
        "optimizer_state": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, generator=g)}, 1: {}},
            "param_groups": [{"lr": 0.1 + step, "betas": (0.9, 0.95), "params": [0, 1], "foreach": None}],
        },
        "meta": {"rng": torch.get_rng_state(), "numbers": [1, 2.5, True, None, "x"], "nested": {"0": 1, 0: 2, "a/b": 3}},
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_state_comes_back_exactly_with_types_and_keys(tmp_path):
    state = some_state(5)
    assert save_state(tmp_path, 5, **state) == tmp_path / "step-00000005"
    found = load_latest_state(tmp_path)
    assert found.step == 5
    for name, expected in state.items():
        assert equal(expected, getattr(found, name)), name


def test_a_real_optimizer_goes_on_exactly_after_a_restore(tmp_path):
    def run(n, restore=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
        start = 0
        if restore:
            layer.load_state_dict(restore.model_state)
            optimizer.load_state_dict(restore.optimizer_state)
            start = restore.step
        for step in range(start, n):
            optimizer.zero_grad()
            layer(torch.full((2, 3), float(step))).square().sum().backward()
            optimizer.step()
            if step == 2:
                save_state(tmp_path, step + 1, layer.state_dict(), optimizer.state_dict(), {})
        return layer.weight

    straight = run(6)
    assert torch.equal(run(6, load_latest_state(tmp_path)), straight)


def test_only_the_two_newest_states_are_kept_and_abandoned_ones_go(tmp_path):
    for step in (1, 5, 9, 100):
        save_state(tmp_path, step, **some_state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000100"]
    save_state(tmp_path, 50, **some_state(50))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000050"]
    save_state(tmp_path, 50, **some_state(51))
    assert equal(load_latest_state(tmp_path).model_state, some_state(51)["model_state"])


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_with_a_warning(tmp_path, name, damage):
    for step in (1, 2):
        save_state(tmp_path, step, **some_state(step))
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])
    with pytest.warns(UserWarning, match="damaged training state passed over.*step-00000002"):
        found = load_latest_state(tmp_path)
    assert found.step == 1 and equal(found.model_state, some_state(1)["model_state"])


def test_all_states_damaged_is_an_error_and_no_state_is_none(tmp_path):
    assert load_latest_state(tmp_path / "absent") is None and load_latest_state(tmp_path) is None
    (save_state(tmp_path, 1, {}, {}, {}) / "manifest.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 1 training states are damaged"):
        load_latest_state(tmp_path)


def test_half_written_states_are_ignored_and_cleaned_up(tmp_path):
    save_state(tmp_path, 1, **some_state(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.tmp")
    assert load_latest_state(tmp_path).step == 1
    save_state(tmp_path, 2, **some_state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_state_that_cannot_be_stored_names_the_entry(tmp_path):
    for bad, message in (({"a": {"b": object()}}, "meta.a.b is object"), ({"a": {1.5: 2}}, "key 1.5 is float")):
        with pytest.raises(ValueError, match=message):
            save_state(tmp_path, 1, {}, {}, bad)
    with pytest.raises(ValueError, match="step is -1"):
        save_state(tmp_path, -1, {}, {}, {})
    assert list(tmp_path.iterdir()) == []


# ---- tensors and text


def test_save_tensors_takes_views_shared_memory_scalars_and_empty_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "same": base, "row": base[1], "t": base.T, "scalar": torch.tensor(3), "empty": torch.zeros(0, 2)}
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors)
    assert equal(dict(sorted(tensors.items())), dict(sorted(load_tensors(tmp_path / "deep" / "x.safetensors").items())))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    for write, name in ((lambda p, v: write_text(p, str(v)), "t.txt"), (lambda p, v: save_tensors(p, {"x": torch.tensor(v)}), "t.st")):
        write(tmp_path / name, 1)
        before = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                write(tmp_path / name, 2)
        assert (tmp_path / name).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.st", "t.txt"]


def test_a_full_disk_is_an_os_error_that_leaves_the_old_weights(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(4)})
    code = """
import resource, signal, sys, torch
from dualbranch.tensor_file import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save_tensors(sys.argv[1], {"x": torch.zeros(100_000)})
except OSError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, timeout=120)
    assert "x.safetensors: can't be written" in run.stdout, run.stderr
    assert os.listdir(tmp_path) == ["x.safetensors"] and load_tensors(tmp_path / "x.safetensors")["x"].sum() == 4
