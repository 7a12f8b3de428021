"""The schema of a run: what `configs/*.yaml` may say, with the defaults."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dualbranch.config import DualBranchConfig
from dualbranch.data.tasks import TASKS
from dualbranch.schema import ConfigError, from_dict, load_yaml, to_dict
from kernels import SparseSpec

if TYPE_CHECKING:
    from dualbranch.checkpoint import LoadedModel

#: Settings of a model that a dense one has no use for: where its dual blocks are, the fast branch, the gate.
BRANCH_SETTINGS = ("n_stem", "n_tail", "fast_n_heads", "fast_d_ff", "sparse", "d_gate")


@dataclass(frozen=True)
class TokenizerConfig:
    """sentencepiece, trained in the run unless the teacher checkpoint brings its own. `n_problems`: generated problems it is trained on."""

    vocab_size: int = 1280
    n_problems: int = 20_000


@dataclass(frozen=True)
class DataConfig:
    """What a batch holds. Shares are of documents.

    `tasks`: names of the generator's tasks, empty = all; one named twice comes twice as often. `langs`: languages of problems, empty = all.
    `text`: the user's own files or folders (plain text, or conversations in JSONL); `corpora`: text known by name (data/corpora.py); `self_text`: so
    many tokens that the teacher writes itself (distill/self_text.py); with `text_share` 1 there is nothing else.
    `solutions`: conversations in JSONL that take the place of the generator's problems with reasoning.
    `reasoning_gym`: names of that package's data sets, `reasoning_gym_size` problems of each, answered without reasoning.
    `levels_start`, `levels_end`: weights of easy, medium, hard, moved linearly over the first `curriculum` share of the teacher's
    training. `thinking`: share of problems answered with their reasoning. `multi_turn`: share of documents with two to three problems.
    `answer_weight`: loss weight of an answer's tokens, where those of the reasoning before it count 1.
    `workers`: processes that prepare batches ahead (0 = the training process does it); the batches are the same.
    """

    seq_len: int = 256
    batch_rows: int = 32
    tasks: tuple[str, ...] = ()
    langs: tuple[Literal["en", "zh"], ...] = ()
    text: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    self_text: int = 0
    text_share: float = 0.0
    solutions: tuple[str, ...] = ()
    reasoning_gym: tuple[str, ...] = ()
    reasoning_gym_size: int = 2000
    reasoning_gym_share: float = 0.0
    thinking: float = 0.75
    multi_turn: float = 0.05
    levels_start: tuple[float, float, float] = (0.7, 0.25, 0.05)
    levels_end: tuple[float, float, float] = (0.25, 0.35, 0.4)
    curriculum: float = 0.5
    answer_weight: float = 1.0
    workers: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"data.tasks names unknown tasks {unknown}; there are {sorted(TASKS)}")
        if bool(self.text or self.corpora or self.self_text) != (self.text_share > 0):
            given = f"data.text is {list(self.text)}, data.corpora {list(self.corpora)}, data.self_text {self.self_text}"
            raise ValueError(f"{given} and data.text_share {self.text_share}; give text and a share, or neither")
        if bool(self.reasoning_gym) != (self.reasoning_gym_share > 0):
            raise ValueError(f"data.reasoning_gym is {list(self.reasoning_gym)} and reasoning_gym_share {self.reasoning_gym_share}; give both or neither")
        for name in ("levels_start", "levels_end"):
            check_weights(f"data.{name}", getattr(self, name))

    @property
    def has_problems(self) -> bool:
        """False where all documents are text."""
        return self.text_share < 1.0


@dataclass(frozen=True)
class OptimConfig:
    """`muon` orthogonalises the momentum of matrices (Jordan et al. 2024) and leaves the rest to AdamW; `adamw` uses AdamW throughout.

    `lr` is the matrices' peak rate in AdamW units (update RMS 0.2 for muon), `lr_other` that of embeddings, norms and the gate.
    Linear warm-up over `warmup`, linear decay to zero over the last `decay` share of the steps. `micro_batches` splits a batch.
    """

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    lr_other: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.02
    decay: float = 0.5
    clip_norm: float = 1.0
    micro_batches: int = 1


@dataclass(frozen=True)
class TeacherConfig:
    """`checkpoint`: a folder or name, whatever `dualbranch.load` takes. With `student.init: teacher` its sizes and dialect are those of the
    student's slow branch, and `model` need only name what is new (`BRANCH_SETTINGS`; if none of them, `branch_for` chooses).

    Otherwise a dense decoder with the sizes of `model` is trained for `steps`, from the weights and with the tokenizer of the checkpoint
    `init` if there is one. A public model without a thinking mode is given one so: two unused control tokens become <think> and </think>.
    `n_solutions` > 0: the finished teacher then solves that many new training problems, and the student learns from the solutions that are right
    (self_training.py) instead of the generator's; `verify: false`, a control, keeps the wrong ones too.

    `blend` below 1: after a share `blend_at` of the steps the weights go back towards those of `init`, as far as that only the share `blend` of what training
    changed is left (Wortsman et al. 2022), and the other steps train on from there: what was forgotten comes back, what was learned mostly stays.

    After a share `1 - decide` of the steps the teacher answers `n_assess` training problems without reasoning; the rest of the steps
    also teach it to decide: `<think>` where its direct answer was wrong.
    """

    checkpoint: str | None = None
    init: str | None = None
    steps: int = 1000
    decide: float = 0.25
    n_assess: int = 4096
    n_solutions: int = 0
    verify: bool = True
    blend: float = 1.0
    blend_at: float = 0.8
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def step_back(self) -> int:
        """The step before which the weights go back towards those of `init`: the last one at the latest."""
        return min(round(self.steps * self.blend_at), self.steps - 1)

    @property
    def first_decision(self) -> int:
        """The step at which it assesses itself; `steps` if it never does."""
        return self.steps - round(self.steps * self.decide)


@dataclass(frozen=True)
class StudentConfig:
    """`init`: "teacher" (slow branch = teacher, fast branch from its most important heads and neurons), "scratch" (nothing is
    copied), "smaller" (fewer heads, neurons or layers of the teacher, of equal d_model; both branches). `checkpoint` names a model to start from
    instead; its sizes are the student's. With "teacher" it is an earlier student of this teacher, or of one it was fine-tuned from, whose fast branches
    train on; with "smaller" a model of whatever sizes and the teacher's vocabulary, conventional ones too (a pruned one: `dualbranch prune`).

    `freeze_slow`, of init "teacher", keeps the slow branch bit for bit. `routes`: shares of all-fast, mixed and all-slow batches. Loss weights: `soft` KL to
    the teacher at `temperature`, `hard` cross-entropy, `align` distance of the fast stream to the slow one.
    `distinct_batches` = n repeats the first n batches (0 = every step sees new ones); with `cache_logits` = k the teacher's top-k
    log-probabilities and tail mass are then stored on disk at the first visit and read at later ones (0 = computed each step).
    """

    init: Literal["teacher", "scratch", "smaller"] = "teacher"
    checkpoint: str | None = None
    freeze_slow: bool = True
    steps: int = 300
    routes: tuple[float, float, float] = (0.6, 0.4, 0.0)
    soft: float = 1.0
    hard: float = 0.1
    align: float = 0.1
    temperature: float = 1.0
    refit_rows: int = 64
    distinct_batches: int = 0
    cache_logits: int = 0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, lr_other=1e-3))


@dataclass(frozen=True)
class GateConfig:
    """The gate is fitted on `rows` packed rows run all-slow and all-fast, `steps` steps, then calibrated on `calibration_rows` held-out ones.

    The decision to think is calibrated on `n_problems` held-out problems: as many as possible are answered directly, as long as at most a
    share `direct_errors` of all problems is answered directly and wrong.
    """

    rows: int = 256
    steps: int = 400
    lr: float = 1e-2
    calibration_rows: int = 64
    default_budget: float = 0.3
    n_problems: int = 384
    direct_errors: float = 0.01


@dataclass(frozen=True)
class EvaluationConfig:
    """`n_problems` test problems per task (all levels and both languages), `n_shifted` per task and shift, budgets of the `auto` curve.

    `routing_shares`: shares of slow tokens at which routing policies are compared; the default budget is added. `text_tokens`: held-out text of
    each kind whose perplexity is measured, in windows of `text_window` tokens; `text`: more files for that, `wikitext`: such whose WikiText
    token spacing is undone first. `n_recall`: questions per distance of recall over that text (recall.py).
    """

    n_problems: int = 60
    n_shifted: int = 20
    budgets: tuple[float, ...] = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
    routing_rows: int = 64
    routing_shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    text: tuple[str, ...] = ()
    wikitext: tuple[str, ...] = ()
    text_tokens: int = 32_768
    text_window: int = 1024
    n_recall: int = 0
    max_tokens: int = 448
    batch_size: int = 128
    dense_baseline: bool = True


#: Lowest and highest value of settings, or of each item of a list.
RANGES = [
    *((path, 1, math.inf) for path in (
        "save_every", "tokenizer.n_problems", "data.seq_len", "data.batch_rows", "data.reasoning_gym_size", "teacher.n_assess", "teacher.optim.micro_batches",
        "student.optim.micro_batches", "student.refit_rows", "gate.rows", "gate.calibration_rows", "evaluation.n_problems", "evaluation.routing_rows",
        "evaluation.text_tokens", "evaluation.batch_size",
    )),
    ("evaluation.max_tokens", 2, math.inf),
    ("evaluation.text_window", 3, math.inf),
    *((path, 0, math.inf) for path in (
        "threads", "data.self_text", "data.workers", "data.answer_weight", "data.levels_start", "data.levels_end", "teacher.steps", "teacher.n_solutions",
        "student.steps", "student.routes", "student.soft", "student.hard", "student.align", "student.distinct_batches",
        "student.cache_logits", "gate.steps", "gate.lr", "gate.n_problems", "evaluation.n_shifted", "evaluation.n_recall",
        *(f"{who}.optim.{what}" for who in ("teacher", "student") for what in ("lr", "lr_other", "weight_decay")),
    )),
    *((path, 0, 1) for path in (
        "data.text_share", "data.reasoning_gym_share", "data.thinking", "data.multi_turn", "data.curriculum", "teacher.decide",
        "teacher.blend", "teacher.blend_at", "gate.default_budget", "gate.direct_errors", "evaluation.budgets", "evaluation.routing_shares",
        *(f"{who}.optim.{what}" for who in ("teacher", "student") for what in ("warmup", "decay")),
    )),
    *((path, 1e-3, math.inf) for path in ("student.temperature", "teacher.optim.clip_norm", "student.optim.clip_norm")),
]  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """One run. `name` is its folder under `out`; `threads` of 0 leaves torch's choice; `until` stops after that stage; `save_every` in steps.

    `device`: "auto" takes a GPU if there is one. On a GPU float32 products round to tf32.
    `precision`: of the products in training; "auto" is bf16 where the device has units for it. Weights, sums, norms and the optimizer stay in fp32.
    (On a CPU it pays from a width of about 512; the small models of this repository are no faster for it.)
    """

    name: str = "run"
    out: str = "runs"
    seed: int = 0
    threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    until: Literal["teacher", "report"] = "report"
    model: DualBranchConfig = field(default_factory=DualBranchConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    save_every: int = 100

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}; it names a folder under out and may not be empty, hidden or hold a slash")
        if self.data.batch_rows % self.teacher.optim.micro_batches or self.data.batch_rows % self.student.optim.micro_batches:
            raise ValueError(f"data.batch_rows ({self.data.batch_rows}) must be a multiple of every optim.micro_batches")
        if self.teacher.blend < 1 and self.teacher.init is None:
            raise ValueError(f"teacher.blend is {self.teacher.blend}, but there is no teacher.init to blend with; leave it out")
        if not any(0 < share < 1 for share in (*self.evaluation.routing_shares, self.gate.default_budget)):
            raise ValueError("evaluation.routing_shares and gate.default_budget: at least one must lie between 0 and 1; routes are compared at these shares")
        s = self.student
        check_weights("student.routes", s.routes)
        if s.checkpoint and (s.init, s.freeze_slow) not in (("teacher", True), ("smaller", False)):
            raise ValueError(
                f"student.checkpoint goes on with a student of the teacher (student.init: teacher, freeze_slow: true) or trains a smaller model whole"
                f" (smaller, false), not with init {s.init} and freeze_slow {str(s.freeze_slow).lower()}"
            )
        if s.init == "teacher" and s.freeze_slow and s.routes[2] > 0:
            raise ValueError(f"student.routes sends {s.routes[2]} of the batches all-slow, which trains nothing while freeze_slow is set; make it 0")
        if s.cache_logits and (not s.distinct_batches or s.temperature != 1.0 or s.align):
            raise ValueError("student.cache_logits needs distinct_batches >= 1, temperature 1 and align 0: it stores words, not streams")

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    @property
    def self_text_folder(self) -> Path:
        """Where the text lies that the teacher writes (`data.self_text`)."""
        return self.folder / "self_text"


def check_weights(path: str, weights: Sequence[float]) -> None:
    """Raises ValueError for weights of which nothing can be drawn."""
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"{path} is {list(weights)}; the sum must be finite and above 0")


def check_ranges(config: RunConfig) -> None:
    """Raises ValueError for a number that no stage could work with: hours later would be too late."""
    for path, lowest, highest in RANGES:
        value = functools.reduce(getattr, path.split("."), config)
        for x in value if isinstance(value, tuple) else (value,):
            if not lowest <= x <= highest:
                wanted = f"at least {lowest:g}" if highest == math.inf else f"in [{lowest:g}, {highest:g}]"
                raise ValueError(f"{path} is {x}; it must be {wanted}")


def load_run(path: str | os.PathLike, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file, complete: what `model` leaves open comes from the teacher's checkpoint. Raises ConfigError, and what `load` raises."""
    return load_yaml(path, RunConfig, overrides, complete_from_teacher)


def complete_from_teacher(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a RunConfig with a whole `model`, where a student comes out of a checkpoint. Raises ConfigError for one that contradicts it."""
    teacher, student, given = (values.get(name) or {} for name in ("teacher", "student", "model"))
    if not all(isinstance(part, dict) for part in (teacher, student, given)):
        return values  # the schema says what is wrong
    checkpoint = teacher.get("checkpoint")
    if checkpoint is None and "d_model" not in given:
        checkpoint = teacher.get("init")
    if isinstance(student.get("checkpoint"), str):
        return values | {"model": to_dict(config_of_checkpoint(student["checkpoint"])) | given}
    if not isinstance(checkpoint, str) or student.get("init", "teacher") != "teacher" or all(f in given for f in to_dict(DualBranchConfig())):
        return values
    found = config_of_checkpoint(checkpoint)
    named = any(name in given for name in BRANCH_SETTINGS)
    model = to_dict(found) | to_dict({name: getattr(DualBranchConfig(), name) for name in BRANCH_SETTINGS} if named else branch_for(found)) | given
    whole = from_dict(RunConfig, {"model": model}).model
    for name in given:
        if name not in BRANCH_SETTINGS and getattr(whole, name) != getattr(found, name):
            raise ConfigError(
                f"model.{name} is {getattr(whole, name)}, but the teacher {checkpoint} has {getattr(found, name)}; leave it out, or set student.init: smaller",
                f"model.{name}",
            )
    return values | {"model": model}


@functools.lru_cache(maxsize=2)
def config_of_checkpoint(path_or_name: str) -> DualBranchConfig:
    """The sizes and dialect of what `load_to_train` finds. Raises what it raises."""
    return load_to_train(path_or_name, dtype="bfloat16", dense=True).model.config  # half the memory: the weights are not wanted


def load_to_train(path_or_name: str, **how: Any) -> LoadedModel:
    """As `dualbranch.load(path_or_name, **how)`. Raises ValueError also for packed weights, which don't train and fit no model that does, and for a fast
    branch alone."""
    from dualbranch.checkpoint import load

    loaded = load(path_or_name, **how)
    if loaded.model.precision != "fp32":
        raise ValueError(f"{path_or_name} is packed at {loaded.model.precision}; training needs the one it was quantized from")
    if loaded.model.config.fast_only:
        raise ValueError(f"{path_or_name} has its fast branch alone; training needs the model it was exported from")
    return loaded


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The settings in which two resolved configs differ, as `path: old -> new`."""
    found = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            found += differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            found.append(f"{prefix}{key}: {old.get(key)} -> {new[key]}")
    return found


def branch_for(c: DualBranchConfig) -> dict[str, Any]:
    """`BRANCH_SETTINGS` that suit a dense decoder `c`: all its heads (they read by sparse attention) and a quarter of the neurons, the first layers
    and the last slow (the gate sees more behind three than behind two), dense attention up to 2,048 tokens (prompts are read sooner and better by it), a gate
    below one per cent of a layer: docs/experiments.md."""
    stem, tail = (3, 1) if c.n_layers >= 8 else (1, 1)
    layer = 2 * c.d_model * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.d_model * c.d_ff
    return {
        "n_stem": stem,
        "n_tail": tail if c.n_layers > stem + tail else 0,
        "fast_n_heads": c.n_heads,
        "fast_d_ff": max(1, c.d_ff // 4 // 16 * 16),
        "sparse": SparseSpec(block_size=16, n_selected_blocks=16, window=128, n_sinks=4, dense_len=2048),
        "d_gate": max(4, layer // 125 // c.d_model // 8 * 8),
    }


def slow_sizes(c: DualBranchConfig) -> DualBranchConfig:
    """What two models share whose slow branches can be the same: `c` with nothing of its own in BRANCH_SETTINGS."""
    return replace(c, **{name: getattr(DualBranchConfig(), name) for name in BRANCH_SETTINGS} | {"fast_n_heads": c.n_kv_heads, "n_stem": 1, "n_tail": 0})
