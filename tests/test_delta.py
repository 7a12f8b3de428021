"""A delta: what a converted model has beyond its teacher, on top of exactly that teacher and no other."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

from dualbranch import DualBranchConfig, DualBranchModel, load
from dualbranch.checkpoint import save_checkpoint
from dualbranch.cli import main as cli
from dualbranch.convert import delta, names
from dualbranch.convert.export import slow_model
from dualbranch.convert.rounding import round_groups
from dualbranch.distill.config import RunConfig, StudentConfig, TeacherConfig
from dualbranch.packed import PackedMatrix
from dualbranch.schema import from_dict, save_yaml
from dualbranch.storage import CheckpointError, sha256


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> tuple[DualBranchModel, Path, Path]:
    """A dual-branch model, the checkpoint it was made from, and its delta, by the command; read only."""
    folder, tok = tmp_path_factory.mktemp("delta"), tiny[1]
    model = make_tiny_model(tok.vocab_size, d_model=64, head_dim=16, d_ff=96, fast_d_ff=48)
    save_checkpoint(folder / "base", slow_model(model), tok)
    save_checkpoint(folder / "run" / "gate", model, tok)
    save_yaml(folder / "run" / "config.yaml", RunConfig(model=model.config, teacher=TeacherConfig(str(folder / "base")), student=StudentConfig(refit_rows=8)))
    routes = [{"route": "slow", "budget": None, "perplexity": 20.0, "of_slow": 1.0, "flops": 2e6, "slow_share": 1.0},
              {"route": "auto", "budget": 0.3, "perplexity": 22.0, "of_slow": 1.1, "flops": 1e6, "slow_share": 0.31}]  # fmt: skip
    recall = [{"distance": 256, "route": "auto", "budget": 0.3, "accuracy": 0.75, "n": 8}]
    (folder / "run" / "evaluation.json").write_text(json.dumps({"text": {"stories": {"routes": routes}}, "recall": recall}))
    assert cli(["export", str(folder / "run"), "--to", "delta", "--out", str(folder / "delta")]) == 0
    return model, folder / "base", folder / "delta"


@pytest.fixture
def copied(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted[2], tmp_path / "delta"))


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the delta's tensors and makes its manifest say that all is well."""
    tensors = load_file(folder / delta.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / delta.WEIGHTS)
    edit_manifest(folder, lambda m: m["files"][delta.WEIGHTS].update(size=(folder / delta.WEIGHTS).stat().st_size, sha256=sha256(folder / delta.WEIGHTS)))


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def logits(model: DualBranchModel, route: str, **kwargs) -> torch.Tensor:
    tokens = torch.randint(10, model.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, route, **kwargs).logits


def test_a_delta_leaves_its_base_as_it_is_and_adds_the_rest(converted):
    model, base, folder = converted
    found = load(folder)
    assert torch.equal(logits(found.model, "slow"), logits(load(base).model, "slow"))
    exact, rounded = logits(model, "fast"), logits(found.model, "fast")
    error = float((rounded - exact).pow(2).mean() / exact.var())
    assert 0 < error < 0.05, f"rounding moved the fast branch's logits by {error:.3f} of their variance"
    assert found.model.calibration == model.calibration and found.model.precision == "fp32" and found.tokenizer.hash == load(base).tokenizer.hash
    tokens = torch.arange(10, 60)[None]
    with torch.no_grad():
        assert torch.equal(found.model(tokens, "auto", threshold=0.5).g, model(tokens, "auto", threshold=0.5).g), "the gate reads the stem, which is the base's"


def test_rounding_that_answers_for_its_errors_beats_the_nearest_on_what_a_matrix_sees():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=generator) @ torch.randn(20, 70, generator=generator) + 0.1 * torch.randn(512, 70, generator=generator)
    weight = torch.randn(48, 70, generator=generator)
    nearest, answering = PackedMatrix(48, 70, 4), PackedMatrix(48, 70, 4)
    nearest.pack(weight)
    answering.pack(weight, partial(round_groups, gram=x.T @ x))
    errors = [float((x @ m.transposed() - x @ weight.T).pow(2).mean()) for m in (nearest, answering)]
    assert errors[1] < 0.3 * errors[0], f"mean squared error {errors[0]:.4f} to the nearest, {errors[1]:.4f} with errors in view"
    exact = PackedMatrix(48, 70, 4)
    exact.pack(nearest.transposed().T, partial(round_groups, gram=x.T @ x))
    assert torch.allclose(exact.transposed(), nearest.transposed(), atol=1e-2), "what lies on the grid stays"


def test_a_delta_holds_nothing_of_the_base_and_few_bits_of_the_rest(converted):
    model, _, folder = converted
    tensors = load_file(folder / delta.WEIGHTS)
    assert all(".fast." in name or name.startswith("gate.") for name in tensors)
    matrices = {name: p for name, p in model.named_parameters() if ".fast." in name and p.dim() == 2}
    bits = 8 * sum(x.nbytes for name, x in tensors.items() if ".matrix." in name) / sum(p.numel() for p in matrices.values())
    assert bits < 7, f"{bits:.1f} bits per weight; 5, and what padding to whole tiles adds in so small a model"
    card = (folder / "README.md").read_text()
    assert "stories, auto at 31% slow tokens (as trained, fp32) | perplexity 22.00, 1.100 of slow, 50% of the FLOPs" in card
    assert "recall at 256 tokens, auto 0.3 (as trained, fp32) | 75% of 8" in card and "frozen, is the slow branch" in card


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_more_bits_are_nearer(converted, precision, tmp_path):
    model, base, folder = converted
    delta.save_delta(tmp_path / "d", model, str(base), load(base), precision)
    exact = logits(model, "fast")
    errors = [float((logits(load(f).model, "fast") - exact).abs().mean()) for f in (tmp_path / "d", folder)]
    assert errors[0] < 0.2 * errors[1], f"mean error {errors[0]:.4f} at {precision}, {errors[1]:.4f} at int4"


def test_a_shipped_delta_comes_with_the_name_unless_the_dense_model_is_asked_for(converted, tmp_path, monkeypatch):
    _, base, folder = converted
    monkeypatch.setitem(names.PIP_MODELS, "known", names.PIP_MODELS["smollm2-135m-instruct"])
    monkeypatch.setattr(names, "fetch", lambda name, accept_terms=False: base)
    monkeypatch.setattr(delta, "SHIPPED", tmp_path)
    monkeypatch.setattr("dualbranch.checkpoint._load_public", lambda path, device, dtype: load(path, device, dtype))
    assert load("known", runs=tmp_path).model.config.is_dense
    shutil.copytree(folder, tmp_path / "known-dual")
    edit_manifest(tmp_path / "known-dual", lambda m: m["extra"]["base"].update(name="known"))
    assert load("known", runs=tmp_path).model.gate is not None
    assert load("known", runs=tmp_path, dense=True).model.config.is_dense
    (tmp_path / "known").mkdir()  # a run of that name is no teacher
    assert load("known", runs=tmp_path, dense=True).model.config.is_dense


#: What is wrong with a delta -> what the error says.
PROBLEMS = {
    "other base": "other weights", "other sizes": "sizes", "truncated": "truncated", "flipped": "damaged", "missing tensor": "gate.w_in.weight is missing",
    "shape": "gate.w_in.weight has shape", "base unnamed": "base must say", "no such base": "nowhere", "precision": "is missing",
    "its own base": "a delta, where",
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_delta_that_does_not_fit_is_refused_by_name(problem, converted, copied, tmp_path):
    model, base, _ = converted
    weights = copied / delta.WEIGHTS
    if problem == "other base":
        other = DualBranchModel(load(base).model.config)
        other.init_weights(7)
        save_checkpoint(tmp_path / "other", other, load(base).tokenizer)
        edit_manifest(copied, lambda m: m["extra"]["base"].update(name=str(tmp_path / "other")))
    elif problem == "other sizes":
        smaller = make_tiny_model(load(base).tokenizer.vocab_size, d_model=48)
        save_checkpoint(tmp_path / "other", slow_model(smaller), load(base).tokenizer)
        edit_manifest(copied, lambda m: m["extra"]["base"].update(name=str(tmp_path / "other")))
    elif problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif problem == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif problem == "missing tensor":
        rewrite(copied, lambda tensors: tensors.pop("gate.w_in.weight"))
    elif problem == "shape":
        rewrite(copied, lambda tensors: tensors.update({"gate.w_in.weight": torch.zeros(3, 3)}))
    elif problem == "base unnamed":
        edit_manifest(copied, lambda m: m["extra"].pop("base"))
    elif problem == "no such base":
        edit_manifest(copied, lambda m: m["extra"]["base"].update(name=str(tmp_path / "nowhere")))
    elif problem == "its own base":
        edit_manifest(copied, lambda m: m["extra"]["base"].update(name=str(copied)))
    elif problem == "precision":
        edit_manifest(copied, lambda m: m["extra"].update(precision="int4"))
    with pytest.raises(CheckpointError, match=PROBLEMS[problem]):
        load(copied)


def test_what_is_no_converted_model_has_no_delta(converted, tmp_path, capsys):
    model, base, _ = converted
    changed = DualBranchModel(model.config)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.blocks[1].slow.w_q.weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"blocks\.1\.slow\.w_q\.weight isn't that of"):
        delta.save_delta(tmp_path / "d", changed, "base", load(base), "int4")
    with pytest.raises(ValueError, match="fast branch"):
        delta.save_delta(tmp_path / "d", load(base).model, "base", load(base), "int4")
    assert cli(["export", str(base), "--to", "delta", "--out", str(tmp_path / "d")]) == 2 and "teacher.checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("folder", sorted(delta.SHIPPED.glob("*-dual")), ids=lambda folder: folder.name)
def test_a_shipped_delta_is_whole_small_and_belongs_to_the_weights_of_its_name(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    name = folder.name.removesuffix("-dual")
    assert manifest["extra"]["base"] == {"name": name, "sha256": names.PIP_MODELS[name].sha256}
    assert all(sha256(folder / file) == entry["sha256"] for file, entry in manifest["files"].items())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25e6
    model = DualBranchModel.without_weights(from_dict(DualBranchConfig, json.loads((folder / "config.json").read_text())))
    assert model.gate is not None and all(torch.isfinite(x).all() for x in load_file(folder / delta.WEIGHTS).values() if x.is_floating_point())
