"""Folders on disk: files written whole or not at all, and a `manifest.json`, written last, with size and sha256 of each, checked when they are read.

Checkpoints, training states and deltas are such folders; their formats are `checkpoint.py`'s, `training_state.py`'s and `convert/delta.py`'s. Whatever
can't be used raises CheckpointError. One process writes a folder at a time; any number may read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from dualbranch.schema import ConfigError, from_dict
from dualbranch.whole_file import whole_file

VERSION = 1
MAX_JSON = 16 * 2**20
"""Bytes of any JSON file or safetensors header that is read."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint or state that can't be used: names the file or tensor at fault and what to do."""


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all. Makes the folder."""
    write_bytes(Path(path), text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Makes the folder."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_manifest(folder: Path, kind: str, extra: dict[str, Any]) -> None:
    """The manifest of all files in `folder`, a folder of format `kind`. `extra`: any JSON."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir()) if path.is_file()
    }
    manifest = {"format": kind, "version": VERSION, "files": files, "extra": extra}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    sync_folder(folder)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of `folder`, whose format must be `kind`: `files`, `extra`, `format`, `version`. Checks nothing but its own form."""
    path = folder / "manifest.json"
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES) if folder.is_dir() else []
        if pickles:
            raise CheckpointError(f"{folder / pickles[0]}: a pickle file can run code, it isn't read; give safetensors")
        what = "no manifest.json, not a checkpoint or one that was never finished" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}")
    check_inside(folder, path)
    manifest = parse_json(path, read_bytes(path, MAX_JSON))
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CheckpointError(f"{path}: not the manifest of a {kind}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: format version {manifest.get('version')}, this dualbranch reads {VERSION}; upgrade it")
    files = manifest.get("files")
    well_formed = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    if not well_formed or not isinstance(manifest.setdefault("extra", {}), dict):
        raise CheckpointError(f"{path}: malformed; save the checkpoint again")
    for name in files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: file name {name!r} leads out of the folder; don't trust this checkpoint")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """The path of a file that is inside the folder and has the manifest's size and hash."""
    path = folder / name
    check_inside(folder, path)
    expected = manifest["files"][name]
    size = path.stat().st_size
    if size != expected["size"]:
        what = "truncated" if size < expected["size"] else "too long"
        raise CheckpointError(f"{path}: {what}: it has {size} bytes, the manifest says {expected['size']}; copy or save it again")
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path}: damaged: its sha256 isn't the manifest's; copy or save it again")
    return path


def read_verified(folder: Path, manifest: dict[str, Any], name: str, limit: int) -> bytes:
    """The content of a file, which has the size and hash of the manifest and at most `limit` bytes."""
    return read_bytes(verify(folder, manifest, name), limit)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes, refused above {limit}; this isn't a file dualbranch wrote")
    return path.read_bytes()


def link_root(folder: Path) -> Path:
    """How far links in a downloaded folder may lead: the folder itself, or the repository's part of a download cache that it is a snapshot in."""
    cached = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    return folder.parents[1] if cached else folder


def check_inside(folder: Path, path: Path) -> None:
    """`path` is a regular file, and not by way of a link out of `folder`."""
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing; copy or save the checkpoint again") from error
    if not inside:
        raise CheckpointError(f"{path}: a link out of the checkpoint folder, it isn't followed; copy the file in")
    if not regular:
        raise CheckpointError(f"{path}: not a regular file")


def parse_json(path: Path, text: bytes) -> Any:
    """`text`, the content of `path`, as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); save it again") from error


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_schema(folder: Path, manifest: dict, name: str, cls: type) -> Any:
    """The JSON file `name` of `folder` as an instance of the dataclass `cls`."""
    values = parse_json(folder / name, read_verified(folder, manifest, name, MAX_JSON))
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


#: Where a folder that is there and empty is filled before everything moves up into it.
UNFINISHED = ".unfinished.tmp"


def new_folder(path: str | os.PathLike) -> Path:
    """`path`, where nothing is yet or an empty folder (a mount point, say, or a link to one; what a killed command left unfinished doesn't count).

    Raises ValueError.
    """
    folder = Path(path)
    if os.path.lexists(folder) and (not folder.is_dir() or any(p.name != UNFINISHED for p in folder.iterdir())):
        raise ValueError(f"{folder} exists already; give a folder that doesn't, or an empty one")
    return folder


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
