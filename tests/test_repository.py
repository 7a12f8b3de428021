"""The repository keeps its own promises: README, Makefile, configs, packaging and imports agree with each other. Nothing is trained."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from dualbranch import accounting
from dualbranch.config import DualBranchConfig
from dualbranch.distill import config as run_config
from dualbranch.distill.config import RunConfig
from dualbranch.infer import build_parser
from dualbranch.schema import load_yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPTS = sorted(ROOT.glob("*.py"))
MAX_FILE_BYTES = 12_000_000
MAX_REFERENCE_PARAMS = 187_000_000
#: Distributions whose import name differs.
IMPORT_NAMES = {"pyyaml": "yaml", "reasoning-gym": "reasoning_gym", "huggingface-hub": "huggingface_hub"}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[list[str]]:
    """README's shell lines as words, comments dropped, continued lines joined; of a pipeline only the last command."""
    lines = "".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.rpartition("|")[2], comments=True) for line in lines]
    return [line for line in words if line]


def run_python(code: str) -> subprocess.CompletedProcess:
    """A fresh interpreter at the repository root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300)


# ---- README


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named, f"README names only {sorted(named)}"
    assert named <= targets, f"README names make targets that don't exist: {sorted(named - targets)}"


def test_readme_train_commands_name_configs_and_settings_that_exist():
    commands = [words[words.index("train.py") + 1 :] for words in shell_commands() if "train.py" in words]
    assert commands, "README shows no train.py command"
    for words in commands:
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_yaml(ROOT / words[0], RunConfig, settings)


def test_readme_infer_commands_parse():
    commands = [words[words.index("infer.py") + 1 :] for words in shell_commands() if "infer.py" in words]
    assert commands, "README shows no infer.py command"
    for words in commands:
        build_parser().parse_args(words)


def test_readme_python_compiles_and_imports_names_that_exist():
    blocks = code_blocks("python")
    assert blocks, "README shows no Python"
    for block in blocks:
        compile(block, "README.md", "exec")
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                # a submodule of the same name (dualbranch.generate) is not what README means
                missing = [a.name for a in node.names if isinstance(getattr(module, a.name, None), (types.ModuleType, types.NoneType))]
                assert not missing, f"README imports {missing} from {node.module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [t for t in targets if "://" not in t and not t.startswith("#") and not (page.parent / t.partition("#")[0]).exists()]
    assert not broken, f"{page.name} links to {broken}"


# ---- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_loads_and_builds_a_model_config(path, monkeypatch):
    smollm2 = DualBranchConfig(49152, 576, 30, 30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, fast_n_heads=3, max_seq_len=8192)
    real = run_config.config_of_checkpoint
    monkeypatch.setattr(run_config, "config_of_checkpoint", lambda name: smollm2 if name == "smollm2-135m-instruct" else real(name))  # no download
    config = run_config.load_run(path)
    assert isinstance(config.model, DualBranchConfig)
    assert config.name == path.stem, "a run's folder should carry its config's name"
    assert config.data.seq_len <= config.model.max_seq_len


def test_reference_size_is_at_most_187_million_parameters():
    config = load_yaml(ROOT / "configs/efficient-reasoner-mini.yaml", RunConfig)
    c = config.model
    assert (c.d_model, c.n_heads, c.fast_n_heads, c.head_dim) == (1024, 16, 8, 64)
    assert c.n_kv_heads < c.fast_n_heads and c.tie_embeddings and config.tokenizer.vocab_size == c.vocab_size
    params = accounting.total_params(c)
    assert 0.97 * MAX_REFERENCE_PARAMS <= params <= MAX_REFERENCE_PARAMS, f"{params:,} parameters"
    assert f"{params / 1e6:.1f} M" in README, f"README should say {params / 1e6:.1f} M"


def test_reference_fast_layer_costs_at_most_a_quarter_of_a_dense_one_at_every_length():
    c = load_yaml(ROOT / "configs/efficient-reasoner-mini.yaml", RunConfig).model
    fast_params = accounting.kv_params(c) + accounting.branch_params(c, c.fast_n_heads, c.fast_d_ff)
    slow_params = accounting.kv_params(c) + accounting.branch_params(c, c.n_heads, c.d_ff)
    assert fast_params <= slow_params / 4
    for n_cached in range(c.max_seq_len):
        fast, slow = (accounting.layer_flops(c, slow, n_cached) for slow in (False, True))
        assert fast <= slow / 4, f"{fast / slow:.4f} with {n_cached} tokens cached"


# ---- packaging


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def declared() -> dict[str, set[str]]:
    """Names of required distributions: "" the package's own, else an extra's."""
    project = PYPROJECT["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: {requirement_name(r) for r in requirements} for name, requirements in groups.items()}


def test_constraints_pin_everything_that_make_installs():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines), "constraints.txt holds exact versions only"
    unpinned = (declared()[""] | declared()["test"]) - {requirement_name(line) for line in lines}
    assert not unpinned, f"not in constraints.txt: {sorted(unpinned)}"


def imported_names(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_every_import_is_declared_and_every_dependency_is_used():
    groups = {extra: {IMPORT_NAMES.get(name, name) for name in names} for extra, names in declared().items()}
    optional = set().union(*(names for extra, names in groups.items() if extra not in ("", "test")))
    used = set().union(*(imported_names(p) for folder in ("dualbranch", "kernels") for p in (ROOT / folder).rglob("*.py")))
    undeclared = used - set(sys.stdlib_module_names) - {"dualbranch", "kernels"} - groups[""] - optional
    assert not undeclared, f"imported but not in pyproject.toml: {sorted(undeclared)}"
    assert groups[""] <= used, f"in pyproject.toml but imported nowhere: {sorted(groups[''] - used)}"


# ---- layout


def test_scripts_are_thin_and_have_a_main():
    assert {"train.py", "infer.py"} <= {p.name for p in SCRIPTS}
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") < 40, f"{path.name} has {source.count(chr(10))} lines; logic belongs in dualbranch/"
        assert re.search(r"\bmain\b", source), f"{path.name} has no main"


def test_test_files_are_flat_and_shadow_no_package():
    nested = [p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py") if p.parent != ROOT / "tests"]
    assert not nested, f"a folder tests/kernels/ would shadow the package: {nested}"


def test_no_file_in_git_is_over_12_megabytes():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8") if (ROOT / ".git").exists() else None
    if listing is None or listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    large = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in files if p.is_file() and p.stat().st_size > MAX_FILE_BYTES}
    assert not large, large


# ---- imports

SIDE_EFFECTS = """
import json, os, random, sys
import numpy, torch

def state():
    return {
        "torch generator": torch.random.get_rng_state().numpy().tobytes().hex(),
        "random": repr(random.getstate()),
        "numpy generator": repr(numpy.random.get_state(legacy=False)),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
        "path": list(sys.path),
    }

before, modules = state(), set(sys.modules)
import kernels, dualbranch, train, infer
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "heavy": sorted({"triton", "matplotlib", "transformers", "reasoning_gym"} & (set(sys.modules) - modules)),
}))
"""


def test_imports_have_no_side_effects():
    done = run_python(SIDE_EFFECTS)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"importing wrote to stderr: {done.stderr}"
    (line,) = done.stdout.splitlines()  # a second line was printed by an import
    assert json.loads(line) == {"changed": [], "heavy": []}


def test_transformers_imports_beside_our_kernels_package():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    done = run_python("import kernels, transformers; from transformers import AutoModelForCausalLM; assert not hasattr(kernels, 'get_kernel')")
    assert done.returncode == 0, done.stderr
