"""Which implementation runs: `auto`, `reference` or `triton`. Called by `ops.py` on every op; imports nothing heavy."""

import logging

BACKENDS = ("auto", "reference", "triton")

_log = logging.getLogger(__name__)
_state = {"name": "auto", "logged": False}


def set_backend(name: str) -> None:
    """Chooses the implementation for the whole process. Raises ValueError for a name that is unknown or cannot run."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        raise ValueError("backend 'triton' cannot run: this version of dualbranch has no Triton kernels yet; use 'auto'")
    _state["name"] = name


def get_backend() -> str:
    """The implementation in use: 'reference' or 'blockwise' (plain PyTorch, what `auto` takes). Logs the reason once."""
    if _state["name"] == "reference":
        return "reference"
    if not _state["logged"]:
        _state["logged"] = True
        _log.info("attention backend: blockwise (plain PyTorch); this version has no Triton kernels")
    return "blockwise"
