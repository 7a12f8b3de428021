"""Models out: as a checkpoint of ours, as a Hugging Face folder of a public family, or as a GGUF file.

    branch   what it is                                              to
    slow     the conventional decoder on route slow                  safetensors, hf, gguf
    fast     the smallest device model: route fast and no other      safetensors; hf and gguf where every layer has one shape
    dual     all of it                                               safetensors; delta: only what it has beyond the model it was converted from

`families.py` says how public families write configs and tensors, `gguf_writer.py` how llama.cpp does, `checkpoint.py` writes ours.

The fast branch as safetensors is a dual-branch checkpoint without the slow branches of its dual layers and without its gate (`config.fast_only`): our
blocks have one width per branch, so a dense config can't express a model whose stem and tail are wider than the layers between. `load` takes it, and
the model refuses every route but fast. As a public family, whose layers are all of one shape, it can only be written if the fast branch is as wide as the
slow one; its context then ends where its attention stops being dense, so that what is written is the same function.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dualbranch.accounting import token_cost
from dualbranch.checkpoint import LoadedModel, check_vocab, save_checkpoint
from dualbranch.config import DualBranchConfig
from dualbranch.convert import delta, families, gguf_writer
from dualbranch.convert.huggingface import WEIGHTS
from dualbranch.data.packing import Rows
from dualbranch.model import DualBranchModel
from dualbranch.storage import UNFINISHED, new_folder, write_text
from dualbranch.tensor_file import DTYPES, save_tensors
from dualbranch.tokenizer import TokenizerBase
from dualbranch.tokenizer_hf import hf_files

BRANCHES = ("slow", "fast", "dual")
FORMATS = {"safetensors": tuple(DTYPES), "hf": tuple(DTYPES), "gguf": gguf_writer.DTYPES, "delta": delta.DTYPES}
"""What can be written, and the dtypes of each."""


def export(
    model: DualBranchModel,
    tokenizer: TokenizerBase,
    folder: str | os.PathLike,
    branch: str = "slow",
    to: str = "safetensors",
    dtype: str = "float32",
    *,
    family: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    made: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    base: tuple[str, LoadedModel] | None = None,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """Writes a branch of `model`, or all of it, into the new folder `folder`, with a model card (README.md), and returns its sizes.

    `dtype`: float32, float16, bfloat16; of GGUF also q8_0, q5_1, q5_0, q4_1, q4_0; of a delta int4, int8 or bf16. `family`: the Hugging Face model_type to
    prefer, where several can say what the model does (`load(...).extra["hf_config"]["model_type"]` of an imported one). `name` (default: the folder's),
    `licence`, `made` (how it was made, one paragraph) and `evaluation` (what was measured -> number or text) go into the card as they are; what isn't given
    is said to be unknown. `extra`: kept in our own checkpoint's manifest. `base`: of a delta, the name of the model that was converted and what `load` gives
    for it, `rows` calibration text for its rounding. The result: `params`, `files` (name -> bytes), `bytes`, `params_read` and `flops` per token, `family`,
    `dtype`, `folder`.

    All or nothing: written beside `folder` (inside, where it is there and empty) and renamed. Raises ValueError: an unknown branch, format or dtype, a folder
    that holds something already, a branch the model doesn't have or the format can't hold (naming the field), weights that aren't finite in `dtype`.
    """
    folder = new_folder(os.path.abspath(folder))
    for what, value, known in (("branch", branch, BRANCHES), ("to", to, FORMATS), ("dtype", dtype, FORMATS.get(to, ()))):
        if value not in known:
            raise ValueError(f"{what} is {value!r}, needed one of {', '.join(known)}{f' (to {to})' if what == 'dtype' else ''}")
    if branch == "dual" and model.config.is_dense:
        raise ValueError("branch is 'dual', but the model has no fast branch; export its slow branch, or convert it first")
    if branch == "dual" and model.config.fast_only:
        raise ValueError("branch is 'dual', but the model was exported with its fast branch alone; export its fast branch")
    if model.precision != "fp32" and not (to == "safetensors" and (branch == "dual" or model.config.is_dense or model.config.fast_only)):
        raise ValueError(f"this model is packed at {model.precision}; export the one it was quantized from, or all of it to safetensors")
    if to == "delta" and (branch != "dual" or base is None):
        raise ValueError("a delta is branch 'dual' without the model it was converted from; give that model as well")
    if to == "delta":
        check_calibrated(model)
    check_vocab(model.config, tokenizer)
    name = name or folder.name
    # An empty folder stays the one it is: a mount point, perhaps, or a link to another disk.
    temporary = folder / UNFINISHED if folder.exists() else folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        hf_config = None
        if to == "safetensors":
            part = {"slow": slow_model, "fast": fast_model, "dual": lambda m: m}[branch](model)
            save_checkpoint(temporary, part, tokenizer, dict(extra or {}), dtype)
        elif to == "delta":
            part = model
            delta.save_delta(temporary, model, *base, dtype, extra, rows)
        else:
            part = dense_model(model, branch)
            hf_config = families.hf_config_of(part.config, family)
            if to == "hf":
                _write_hf(temporary, part, hf_config, tokenizer, dtype)
            else:
                tensors = families.hf_tensors(part, hf_config)
                gguf_writer.write_gguf(temporary / f"{folder.name}-{dtype}.gguf", part.config, hf_config, tensors, tokenizer, dtype, name)
        sizes = _sizes(part.config, branch, temporary)
        sizes |= {"family": None if hf_config is None else hf_config["model_type"], "dtype": dtype, "branch": branch, "to": to, "folder": str(folder)}
        sizes |= {"base": base[0]} if to == "delta" else {}
        write_text(temporary / "README.md", _card(name, part.config, sizes, licence, made, evaluation))
        if folder.exists():
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "manifest.json"):  # the manifest last
                os.replace(path, folder / path.name)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sizes


def check_calibrated(model: DualBranchModel) -> None:
    """Raises ValueError where there is no calibration, as a delta has one."""
    if not model.config.is_dense and model.calibration is None:
        raise ValueError("the gate of this model isn't calibrated: its run stopped before that; finish the run (--resume), then export")


# ---- which part of a model


def slow_model(model: DualBranchModel) -> DualBranchModel:
    """The conventional decoder that `model` is on route slow; it shares the model's weights."""
    if model.config.is_dense:
        return model
    if model.config.fast_only:
        raise ValueError("branch is 'slow', but the model was exported with its fast branch alone")
    config = dataclasses.replace(model.config, n_stem=model.config.n_layers, n_tail=0)
    return _with_weights(config, {name: x for name, x in model.state_dict().items() if not name.startswith("gate.") and ".fast." not in name})


def fast_model(model: DualBranchModel) -> DualBranchModel:
    """The part of `model` that route fast reads (`config.fast_only`); it shares the model's weights."""
    c = model.config
    if c.is_dense:
        raise ValueError("branch is 'fast', but the model has no fast branch; convert it first")
    if c.fast_only:
        return model
    left_out = ("gate.", *(f"blocks.{i}.slow." for i in c.dual_layers))
    return _with_weights(dataclasses.replace(c, fast_only=True), {name: x for name, x in model.state_dict().items() if not name.startswith(left_out)})


def dense_model(model: DualBranchModel, branch: str) -> DualBranchModel:
    """A conventional decoder that computes what `model` computes on that branch's route; it shares the model's weights. Raises ValueError if there is none."""
    c = model.config
    if branch == "slow":
        return slow_model(model)
    if branch == "dual":
        raise ValueError("branch is 'dual': no public format has two branches and a gate; export it as 'safetensors', or one branch")
    model = fast_model(model)
    for wide, narrow in (("n_heads", "fast_n_heads"), ("d_ff", "fast_d_ff")):
        if getattr(c, wide) != getattr(c, narrow):
            n = c.n_stem + c.n_tail
            raise ValueError(
                f"branch is 'fast', but all layers of a public family have one shape, and {narrow} = {getattr(c, narrow)} of the fast branch is not the"
                f" {wide} = {getattr(c, wide)} of the {n} stem and tail layers, which are always slow; export it as 'safetensors'"
            )
    reach = c.sparse.dense_len if not c.sliding_layers or c.fast_window == c.sliding_window else min(c.sparse.dense_len, c.fast_window)
    if reach < 1:
        raise ValueError("branch is 'fast', but with sparse.dense_len = 0 its attention is never dense, as a public family's is; export it as 'safetensors'")
    config = dataclasses.replace(c, n_stem=c.n_layers, n_tail=0, fast_only=False, max_seq_len=min(c.max_seq_len, reach))
    return _with_weights(config, {name.replace(".fast.", ".slow."): x for name, x in model.state_dict().items()})


def _with_weights(config: DualBranchConfig, weights: Mapping[str, torch.Tensor]) -> DualBranchModel:
    part = DualBranchModel.without_weights(config)
    part.load_state_dict(weights, assign=True)
    return part.eval()


# ---- writing


def _write_hf(folder: Path, model: DualBranchModel, hf_config: dict[str, Any], tokenizer: TokenizerBase, dtype: str) -> None:
    tensors = {}
    for name, load in families.hf_tensors(model, hf_config).items():
        tensors[name] = load().to(DTYPES[dtype])
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"tensor {name} holds NaN or infinity as {dtype}; export it as float32")
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    stops = sorted(getattr(tokenizer, "stop_ids", None) or {tokenizer.end_id})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": tokenizer.pad_id}
    write_text(folder / "config.json", json.dumps(hf_config | {"torch_dtype": dtype} | ids, indent=1) + "\n")
    write_text(folder / "generation_config.json", json.dumps(ids, indent=1) + "\n")
    for name, content in hf_files(tokenizer).items():
        (folder / name).write_bytes(content)


def _sizes(config: DualBranchConfig, branch: str, folder: Path) -> dict[str, Any]:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    costs = {route: token_cost(config, route, 0, 2) for route in (("slow", "fast") if branch == "dual" else ("fast",) if config.fast_only else ("slow",))}
    first = next(iter(costs.values()))
    out = {"params": first.params, "params_read": first.params_read, "flops": first.flops, "files": files, "bytes": sum(files.values())}
    return out | ({"params_read_fast": costs["fast"].params_read, "flops_fast": costs["fast"].flops} if branch == "dual" else {})


def _card(name: str, c: DualBranchConfig, sizes: Mapping[str, Any], licence: str | None, made: str | None, evaluation: Mapping[str, Any] | None) -> str:
    what = {
        "slow": "The slow branch of a dual-branch model: a conventional decoder.",
        "fast": "The fast branch of a dual-branch model, alone.",
        "dual": "A dual-branch model: a fast and a slow branch over one set of keys and values, and a gate that chooses per token.",
    }[sizes["branch"]]
    use = {
        "safetensors": 'A checkpoint of dualbranch: `dualbranch.load("FOLDER")`.' + (" It runs on route fast only (`--mode fast`)." if c.fast_only else ""),
        "hf": f"A Hugging Face folder of the family `{sizes['family']}`, for `transformers` and what else reads those.",
        "gguf": "A GGUF file, for llama.cpp.",
        "delta": f'Here is only what it has beyond `{sizes.get("base")}`, which it needs: `dualbranch.load("FOLDER")` puts both together.',
    }[sizes["to"]]
    if sizes["branch"] == "fast" and not c.fast_only:
        use += f" Its context is {c.max_seq_len} tokens: so far the fast branch's attention is dense, as this format's is."
    rows = {
        "parameters": f"{sizes['params']:,}",
        "on disk": f"{sizes['bytes'] / 1e6:,.1f} MB ({sizes['dtype']})",
        "parameters read per token": f"{sizes['params_read']:,.0f}" + (f" slow, {sizes['params_read_fast']:,.0f} fast" if "params_read_fast" in sizes else ""),
        "layers, width, context": f"{c.n_layers}, {c.d_model}, {c.max_seq_len:,} tokens",
        "heads, K/V heads, neurons of a layer": f"{c.n_heads}, {c.n_kv_heads}, {c.d_ff}"
        + ("" if c.is_dense else f"; in the fast branch of {len(c.dual_layers)} layers {c.fast_n_heads}, {c.n_kv_heads}, {c.fast_d_ff}"),
    }
    measured = {str(key): f"{value:,.4g}" if isinstance(value, float) else str(value) for key, value in (evaluation or {}).items()}
    parts = [
        f"# {name}\n\n{what} {use}",
        f"## Sizes\n\n{_table(rows)}",
        f"## How it was made\n\n{made or 'Not recorded.'} Written by `dualbranch export`.",
        f"## Evaluation\n\n{_table(measured) if measured else 'None was given to the export; nothing is claimed.'}",
        f"## Licence\n\n{licence or 'Not known to the export. Weights made from a public model stay under the terms of that model.'}",
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
