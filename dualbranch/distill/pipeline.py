"""One pipeline for every run: tokenizer -> teacher -> student -> gate -> evaluation -> report. Called by `train.py`.

Each stage leaves its result in its own folder and a `done` marker, and is skipped when that exists; a stage cut short continues from
its last state. Nothing here computes; see `stages.py`, `evaluate.py`, `report.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from dualbranch import accounting
from dualbranch.checkpoint import load_checkpoint, save_checkpoint
from dualbranch.config import DualBranchConfig
from dualbranch.convert.export import slow_model
from dualbranch.data.corpora import CORPORA
from dualbranch.data.reasoning_gym import reasoning_gym_problems
from dualbranch.data.text import read_documents
from dualbranch.distill import dist, stages
from dualbranch.distill.config import RunConfig, differences, load_to_train, slow_sizes
from dualbranch.distill.cut import init_from_teacher
from dualbranch.distill.self_text import with_self_text
from dualbranch.distill.self_training import with_solutions
from dualbranch.distill.trainer import MetricsLog
from dualbranch.dynamic import CALIBRATION_TEXT
from dualbranch.evaluate import run_evaluation
from dualbranch.model import DualBranchModel
from dualbranch.report import write_report
from dualbranch.schema import load_yaml, save_yaml, to_dict
from dualbranch.storage import write_text
from dualbranch.text_eval import read_text
from dualbranch.tokenizer import Tokenizer
from dualbranch.tokenizer_hf import with_thinking

#: Texts by which tokenizers are told apart. (Not by their hashes: one that was taught to think reads text as it did.)
PROBES = ("The quick brown fox jumps over 12 lazy dogs, don't you think?", "鸡兔同笼，共134个头。", CALIBRATION_TEXT)


class RunExists(ValueError):
    """The run's folder is taken, by a run that this one would overwrite or contradict."""


def run(config: RunConfig, resume: bool = False) -> Path:
    """Runs every stage that is not done yet, up to `config.until`; returns the run's folder.

    Raises RunExists when the folder holds a run and `resume` is not set, or a run of another config; ValueError for what the config gets
    wrong; OSError where the folder can't be written; trainer.Stopped on Ctrl-C.
    """
    device = choose_device(config.device)
    dist.init(device)
    if config.threads:
        torch.set_num_threads(config.threads)
    check_inputs(config)
    folder = open_run(config, resume)
    log = MetricsLog(folder / "metrics.jsonl")
    teacher, tok = make_teacher(config, folder, log, device)
    if config.until == "teacher":
        return folder
    if config.data.has_problems and not tok.thinks and (config.data.thinking > 0 or not config.model.is_dense):
        raise ValueError(
            f"data.text_share is {config.data.text_share:g}, so there are problems to reason about, and {config.teacher.checkpoint} has no thinking mode;"
            " set data.text_share to 1, or teach it one first (teacher.init, as in configs/smollm2-reason.yaml)"
        )
    config = with_solutions(with_self_text(config, folder, teacher, tok), folder, teacher, tok, log)
    if not config.data.has_problems and not (folder / "evaluation.json").exists():
        stages.source(config, tok, "valid")  # what the gate is calibrated and the run evaluated on: there must be some
    model_config = dataclasses.replace(config.model, vocab_size=teacher.config.vocab_size)
    student = make_student(config, model_config, folder / "student", "student", teacher, tok, log)
    dense = None
    if config.evaluation.dense_baseline and not model_config.is_dense:
        dense = make_student(config, dense_of_equal_cost(model_config, config.gate.default_budget), folder / "dense", "dense", teacher, tok, log)
    student = make_gate(config, student, folder / "gate", tok, log)
    dist.finish()  # what is left is for one process, and takes longer than the others would wait
    if dist.rank() == 0:
        if not (folder / "evaluation.json").exists():
            log.rewind("evaluation", 0)
            results = run_evaluation(config, tok, student, teacher, dense, log)
            write_text(folder / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_report(folder)
    return folder


def choose_device(name: str) -> torch.device:
    """The device of a run. ValueError where there is no GPU to be had."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU here; set device: auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_inputs(config: RunConfig) -> None:
    """Reads all that later stages will read. Raises ValueError for what is not there: hours later would be too late."""
    d, e, longest = config.data, config.evaluation, config.model.max_seq_len
    if d.seq_len > longest:
        raise ValueError(f"data.seq_len is {d.seq_len}, and the model reads {longest} tokens (max_seq_len); set data.seq_len to {longest} at most")
    for path in (*d.text, *d.solutions):
        for _ in read_documents(path):
            pass
    for path in (*e.text, *e.wikitext):
        read_text(path)
    if unknown := sorted(set(d.corpora) - set(CORPORA)):
        raise ValueError(f"data.corpora names {unknown}; there are {sorted(CORPORA)}")
    try:
        for name in d.reasoning_gym:
            next(reasoning_gym_problems(name, 1))
    except ImportError as error:
        raise ValueError(f"data.reasoning_gym: {error}") from error


def settled(config: RunConfig, folder: Path) -> dict:
    """The settings that what `folder` holds depends on: a run can go on with other ones for what is not done yet, and for how it is done."""
    values = to_dict(config)
    del values["until"], values["save_every"], values["data"]["workers"], values["out"], values["name"]  # a folder may be moved
    if not (folder / "gate" / "done").exists():  # the dense student costs what the default budget does
        values["gate"] = {"default_budget": config.gate.default_budget} if (folder / "dense").exists() else {}
    if not (folder / "evaluation.json").exists():
        del values["evaluation"]
    return values


def open_run(config: RunConfig, resume: bool) -> Path:
    """Creates the run's folder, or checks that what is there is this run. Where it can't be written, says so before any work is done."""
    folder = config.folder
    saved = folder / "config.yaml"
    if dist.rank() == 0:
        if saved.exists():
            if not resume:
                raise RunExists(f"{folder} holds a run already; continue it with --resume, or start another with --set name=NEW")
            before, now = (settled(c, folder) for c in (load_yaml(saved, RunConfig), config))
            made = any(path.is_file() and path not in (saved, folder / "metrics.jsonl") for path in folder.rglob("*"))  # else no work is lost
            if made and (different := differences(before, now)):
                raise RunExists(f"{folder} was made with another config ({'; '.join(different[:4])}); undo that, or start another run with --set name=NEW")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_yaml(saved, config)
            if not os.access(folder, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            raise OSError(f"cannot write to the run folder {folder} ({error}); choose another with --set out=FOLDER") from error
    dist.barrier()
    return folder


def stage(folder: Path, tok: Tokenizer, device: torch.device, make: Callable[[], DualBranchModel]) -> DualBranchModel:
    """The checkpoint in `folder` if its stage is done, else what `make` returns, saved there."""
    if not (folder / "done").exists():
        if dist.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        model = make()
        if dist.rank() == 0:
            save_checkpoint(folder, model, tok)
            write_text(folder / "done", "")
        dist.barrier()
    return load_checkpoint(folder, device)[0]


def make_teacher(config: RunConfig, folder: Path, log: MetricsLog, device: torch.device) -> tuple[DualBranchModel, Tokenizer]:
    """The configured checkpoint, or one trained here (with a tokenizer of its own)."""
    if config.teacher.checkpoint is not None:
        loaded = load_to_train(config.teacher.checkpoint, device=device, dtype=torch.float32, dense=True)
        return loaded.model, loaded.tokenizer
    if config.teacher.init is None:
        path = folder / "tokenizer.model"
        if not path.exists() and dist.rank() == 0:
            stages.train_tokenizer(config, path)
        dist.barrier()
        tok = Tokenizer.load(path)
        vocab_size = tok.vocab_size
    else:
        loaded = load_to_train(config.teacher.init, dense=True)
        tok, vocab_size = loaded.tokenizer, loaded.model.config.vocab_size  # which may be more than it has tokens
        if config.data.has_problems and not tok.thinks:
            tok = with_thinking(tok)
    sized = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    return stage(folder / "teacher", tok, device, lambda: stages.train_teacher(sized, tok, folder / "teacher", log, device)), tok


def make_student(
    config: RunConfig, model_config: DualBranchConfig, folder: Path, name: str, teacher: DualBranchModel, tok: Tokenizer, log: MetricsLog
) -> DualBranchModel:
    """A student of the given sizes: initialised as the config says, then distilled."""

    def make() -> DualBranchModel:
        if config.student.init == "teacher" and not model_config.is_dense and slow_sizes(model_config) != slow_sizes(teacher.config):
            different = differences(to_dict(slow_sizes(teacher.config)), to_dict(slow_sizes(model_config)), "model.")
            raise ValueError(f"student.init is 'teacher' but the sizes differ ({'; '.join(different)}); match them, or set student.init: smaller")
        if name == "student" and config.student.checkpoint is not None:
            return stages.train_student(config, tok, teacher, starting_point(config, teacher, tok), folder, log, name)
        student = initial_student(config, model_config, teacher, tok)
        return stages.train_student(config, tok, teacher, student, folder, log, name)

    return stage(folder, tok, teacher.device, make)


def initial_student(config: RunConfig, model_config: DualBranchConfig, teacher: DualBranchModel, tok: Tokenizer) -> DualBranchModel:
    """A student before any training: random, or cut out of its teacher."""
    student = DualBranchModel(model_config)
    student.init_weights(config.seed + 1)
    student.to(teacher.device)
    if config.student.init != "scratch":
        calibration = stages.source(config, tok, purpose=4).batch(0, n_rows=config.student.refit_rows).map(lambda x: x.to(teacher.device))
        init_from_teacher(student, teacher, calibration)
    return student


def starting_point(config: RunConfig, teacher: DualBranchModel, tok: Tokenizer) -> DualBranchModel:
    """The model of `student.checkpoint`; where the slow branch is frozen, its fast branch beside this teacher's slow one: the same, or one fine-tuned from
    it (which is said, by a warning). Raises ValueError where it isn't what the config says, or predicts other tokens than the teacher."""
    loaded = load_to_train(config.student.checkpoint, device=teacher.device, dtype=torch.float32)
    student = loaded.model
    if student.config != config.model:
        different = differences(to_dict(config.model), to_dict(student.config), "model.")
        raise ValueError(f"student.checkpoint {config.student.checkpoint} has other sizes than the config ({'; '.join(different)}); leave model out")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(f"student.checkpoint has {student.config.vocab_size} tokens and the teacher {teacher.config.vocab_size}; they must share a vocabulary")
    if any(loaded.tokenizer.encode(text) != tok.encode(text) for text in PROBES):
        hashes = f"sha256 {loaded.tokenizer.hash[:12]}, the teacher's {tok.hash[:12]}"
        raise ValueError(f"student.checkpoint {config.student.checkpoint} has a tokenizer that reads text otherwise than the teacher's ({hashes})")
    if config.student.freeze_slow:
        own, of_teacher = student.state_dict(), slow_model(teacher).state_dict()
        if not all(torch.equal(own[name], weight) for name, weight in of_teacher.items()):
            warnings.warn(f"student.checkpoint {config.student.checkpoint}: its slow branch isn't the teacher's; only its fast one goes on", stacklevel=2)
            student.load_state_dict(of_teacher, strict=False)
    return student.train()


def make_gate(config: RunConfig, student: DualBranchModel, folder: Path, tok: Tokenizer, log: MetricsLog) -> DualBranchModel:
    """The student with its gate trained and calibrated; a conventional one has none."""
    if student.config.is_dense:
        return student

    def make() -> DualBranchModel:
        log.rewind("gate", 0)
        stages.train_gate(config, tok, student, log)
        return student

    return stage(folder, tok, student.device, make)


def dense_of_equal_cost(c: DualBranchConfig, slow_share: float) -> DualBranchConfig:
    """A conventional decoder that costs per token what the dual-branch one costs on average with `slow_share` of its tokens slow."""
    target = accounting.token_flops(c, slow_share, 128)
    n_heads = max(c.n_kv_heads, round(c.n_heads * 0.67 / c.n_kv_heads) * c.n_kv_heads)
    sizes = [dataclasses.replace(stages.dense_config(c), n_heads=n_heads, d_ff=d_ff) for d_ff in range(8, c.d_ff + 1, 8)] or [stages.dense_config(c)]
    return min(sizes, key=lambda d: abs(accounting.token_flops(d, 1.0, 128) - target))
