"""What a converted model has beyond its teacher, in a few bits per weight: fast branches, gate, calibration. The rest stays where it came from.

A delta is a folder like a checkpoint's: `config.json` of the whole model, `delta.safetensors` (the fast branches' matrices packed, `packed.py`, all else
in fp32), `calibration.json`, and `manifest.json` with the name and the sha256 of the weights it belongs to. `load_delta` finds those by their name, as
`load` does, and refuses others. On route slow the model is the base, bit for bit: no weight of it is written or read here.

`load("NAME")` takes the delta that ships for a public model, `pretrained/NAME-dual`, unless it is asked for the dense one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualbranch import checkpoint, storage
from dualbranch.checkpoint import LoadedModel
from dualbranch.config import DualBranchConfig
from dualbranch.convert.rounding import input_grams, round_groups
from dualbranch.data.packing import Rows
from dualbranch.distill.config import slow_sizes
from dualbranch.gate import Calibration
from dualbranch.model import DualBranchModel
from dualbranch.precision import lay_out, quantize, unpack_branches
from dualbranch.schema import to_dict
from dualbranch.storage import CheckpointError
from dualbranch.tensor_file import check_tensors, load_tensors, read_header, save_tensors

#: What the fast branches' matrices can be packed at.
DTYPES = ("int4", "int8", "bf16")
WEIGHTS = "delta.safetensors"
#: Where the deltas of public models lie that come with the repository.
SHIPPED = Path(__file__).parents[2] / "pretrained"

_FORMAT = "dualbranch-delta"


def shipped(name: str) -> Path | None:
    """The folder of the delta that comes with the repository for the public model `name`, if there is one."""
    folder = SHIPPED / f"{name}-dual"
    return folder if is_delta(folder) else None


def is_delta(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / "manifest.json").is_file()


def weights_hash(path: Path) -> str:
    """What tells the weights of a `.gguf` file, or of all safetensors files of a folder, from any others: a sha256."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no weights there, neither a .gguf file nor safetensors")
    hashes = [storage.sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def save_delta(
    folder: Path, model: DualBranchModel, base_name: str, base: LoadedModel, precision: str, extra: Mapping[str, Any] | None = None, rows: Rows | None = None
) -> None:
    """Writes what `model` has beyond `base`, which `load(base_name, dense=True)` gives, into `folder`, new or empty.

    `rows`: calibration text on which 4-bit matrices are rounded with their errors in view (`rounding.py`), not each weight to the nearest.

    Raises ValueError: a model without a fast branch, one whose slow branch isn't the base, an unknown precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"dtype is {precision!r}, needed one of {', '.join(DTYPES)} (to delta)")
    if model.config.is_dense or model.config.fast_only:
        raise ValueError("a delta holds a fast branch and a gate beside a slow branch; the model doesn't have all of them")
    theirs, ours = base.model.state_dict(), model.state_dict()
    if slow_sizes(base.model.config) != slow_sizes(model.config):
        raise ValueError(f"the model's slow branch has other sizes than {base_name}; a delta belongs to the model it was converted from")
    for name, tensor in theirs.items():
        if not torch.equal(tensor.float(), ours[name].float()):
            raise ValueError(f"tensor {name} isn't that of {base_name}; beside a delta it must be (student.freeze_slow)")
    part = DualBranchModel.without_weights(model.config)
    part.load_state_dict(ours, assign=True)
    quantize(part, f"fast={precision}")
    if rows is not None and precision == "int4":
        for name, gram in input_grams(model, rows).items():
            part.get_submodule(name).matrix.pack(ours[f"{name}.weight"], partial(round_groups, gram=gram))
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / "config.json", json.dumps(to_dict(model.config), indent=1) + "\n")
    save_tensors(folder / WEIGHTS, {name: x for name, x in part.state_dict().items() if name not in theirs}, {"format": "pt"})
    if model.calibration is not None:
        storage.write_text(folder / "calibration.json", json.dumps(to_dict(model.calibration), indent=1) + "\n")
    base_is = {"name": base_name, "sha256": weights_hash(base.folder)}
    storage.write_manifest(folder, _FORMAT, {**(extra or {}), "base": base_is, "precision": part.precision})


def load_delta(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, accept_terms: bool = False) -> LoadedModel:
    """The model a delta makes out of its base: matrices unpacked, in eval mode, with the base's tokenizer.

    The delta is checked before the base is looked for. Raises CheckpointError, naming file, field or tensor: damaged, cut short, of other shapes than its
    config says, made for other weights; and what loading the base raises.
    """
    manifest = storage.read_manifest(folder, _FORMAT)
    base_is = manifest["extra"].get("base")
    if not isinstance(base_is, dict) or not all(isinstance(base_is.get(key), str) for key in ("name", "sha256")):
        raise CheckpointError(f"{folder / 'manifest.json'}: base must say the name and sha256 of the weights the delta belongs to; export it again")
    for name in ("config.json", WEIGHTS):
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder}: the manifest has no {name}; the delta is incomplete, export it again")
    config = storage.read_schema(folder, manifest, "config.json", DualBranchConfig)
    calibration = storage.read_schema(folder, manifest, "calibration.json", Calibration) if "calibration.json" in manifest["files"] else None
    if config.is_dense or config.fast_only:
        raise CheckpointError(f"{folder / 'config.json'}: not of a model with both branches; export the delta again")
    path = storage.verify(folder, manifest, WEIGHTS)
    known = _names_of_base(config)
    try:
        with torch.device("meta"):
            model = lay_out(DualBranchModel.without_weights(config), manifest["extra"].get("precision"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: the manifest's {error}") from error
    check_tensors(path, read_header(path), {name: x for name, x in model.state_dict().items() if name not in known})

    base = checkpoint.load(base_is["name"], dtype=dtype, accept_terms=accept_terms, dense=True)
    if not base.model.config.is_dense or slow_sizes(base.model.config) != slow_sizes(config):
        raise CheckpointError(f"{folder}: its sizes aren't those of {base_is['name']}, which it says it belongs to; export it again")
    if (found := weights_hash(base.folder)) != base_is["sha256"]:
        raise CheckpointError(f"{folder}: belongs to other weights than {base.folder} (their sha256 is {found}, needed {base_is['sha256']}); convert again")
    model.load_state_dict(base.model.state_dict() | load_tensors(path), assign=True)
    unpack_branches(model).to(device=device, dtype=base.model.dtype)
    model.calibration = calibration
    return LoadedModel(model.eval(), base.tokenizer, folder, base.extra | manifest["extra"])


def _names_of_base(config: DualBranchConfig) -> set[str]:
    return set(DualBranchModel.without_weights(dataclasses.replace(config, n_stem=config.n_layers, n_tail=0)).state_dict())
