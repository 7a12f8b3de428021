"""The stages that make a model: tokenizer, teacher, student, gate and its calibration.

Each takes what the stages before it made, leaves its result in its own folder under the run, and returns it. `pipeline.py` decides
which still have to run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbranch.chat import chat_format, render_prompt
from dualbranch.config import DualBranchConfig
from dualbranch.convert.export import slow_model
from dualbranch.data.corpora import load_corpus
from dualbranch.data.packing import Rows
from dualbranch.data.problem import LANGS, LEVELS, Problem, sample_problem, verify
from dualbranch.data.tasks import TASKS
from dualbranch.data.tasks.words import known_words
from dualbranch.data.text import load_documents
from dualbranch.distill import dist
from dualbranch.distill.config import RunConfig, differences, load_to_train, slow_sizes
from dualbranch.distill.losses import LOGITS_AT_ONCE, align_loss, by_tokens, distill_loss, hard_loss, token_kl, token_loss
from dualbranch.distill.sources import BatchSource, Prefetcher
from dualbranch.distill.teacher_cache import TeacherCache
from dualbranch.distill.trainer import Loop, NonFiniteLoss, mixed_precision, train
from dualbranch.gate import Calibration
from dualbranch.generate import generate_batch, prefill
from dualbranch.model import DualBranchModel
from dualbranch.modes import resolve
from dualbranch.sampling import SamplingParams
from dualbranch.schema import to_dict
from dualbranch.storage import write_text
from dualbranch.tokenizer import Tokenizer
from dualbranch.training_state import load_latest_state

Log = Callable[[dict], None]

#: Batches on whose hidden states the embeddings of new tokens are fitted.
FIT_BATCHES = 8
#: In a teacher's folder: which problems it could not answer directly (`assess`).
ASSESSMENT = "needs_thinking.json"


def dense_config(c: DualBranchConfig) -> DualBranchConfig:
    """The conventional decoder of the same slow sizes: the teacher of a student `c`."""
    return dataclasses.replace(c, n_stem=c.n_layers, n_tail=0)


def source(config: RunConfig, tok: Tokenizer, split: str = "train", purpose: int = 0, skip: int = 0) -> BatchSource:
    """Batches for one purpose; different purposes see different problems, and the same text in another order. `skip`: rows of text left out."""
    return BatchSource(config.data, tok, config.seed * 1000 + purpose, config.model.sparse.block_size, split, skip)


def unread(config: RunConfig, tok: Tokenizer) -> BatchSource:
    """Rows for the gate. Of text those that the student's training would have read next, as far as there are any: on rows that it has read
    the fast branch errs half as much as elsewhere (docs/experiments.md). What an earlier run read (`student.checkpoint`) is not known here."""
    if config.data.has_problems:
        return source(config, tok, purpose=2)
    return source(config, tok, purpose=1, skip=config.student.steps * config.data.batch_rows)


def train_tokenizer(config: RunConfig, path: Path) -> Tokenizer:
    """A sentencepiece model of the generator's text (and the user's), written to `path`.

    The generator's templates are cut at the words filled in, so that no piece joins a name with its surroundings: a model then copies a
    name as one token wherever it stands, instead of learning a table of pieces.
    """
    rng, tasks, langs = random.Random(f"tokenizer:{config.seed}"), list(config.data.tasks) or list(TASKS), config.data.langs or LANGS
    words = re.compile("((?<![A-Za-z])(?:" + "|".join(sorted(map(re.escape, known_words()), key=len, reverse=True)) + "))")

    problems = (sample_problem(rng, tasks[i % len(tasks)], rng.choice(LEVELS), rng.choice(langs), "train") for i in range(config.tokenizer.n_problems))
    texts = [part for p in problems for text in (p.prompt, p.trace, p.answer) for part in words.split(text)]
    counts = Counter(char for text in texts for char in text)
    made_up = str.maketrans({char: "\n" for char, n in counts.items() if n < config.tokenizer.n_problems / 1000})  # they stay bytes
    texts = [text.translate(made_up) for text in texts]
    if config.data.text:
        texts += load_documents(config.data.text, "train")
    for name in config.data.corpora:
        texts += load_corpus(name, "train")
    return Tokenizer.train(texts, config.tokenizer.vocab_size, path)


def snapshot(model: DualBranchModel) -> DualBranchModel:
    """An unsharded copy, for generation in the middle of training. Collective."""
    copy = DualBranchModel(model.config)
    copy.load_state_dict({n: dist.full(p.detach()) for n, p in model.state_dict().items()})
    return copy.to(model.device).eval()


def train_teacher(config: RunConfig, tok: Tokenizer, folder: Path, log: Log, device: torch.device) -> DualBranchModel:
    """A dense decoder trained on the generator with and without reasoning, then to decide between the two by its own results."""
    t = config.teacher
    model, new = DualBranchModel(dense_config(config.model)), []
    if t.init is None:
        model.init_weights(config.seed)
    else:
        found = load_to_train(t.init, dtype=torch.float32, dense=True)
        try:
            model.load_state_dict(slow_model(found.model).state_dict())
        except RuntimeError as error:  # how torch says that they don't fit
            different = differences(*(to_dict(slow_sizes(m.config)) for m in (found.model, model)), "model.")
            raise ValueError(f"teacher.init {t.init} has other sizes than the config ({'; '.join(different[:4])}); leave model out") from error
        if tok.thinks and not found.tokenizer.thinks:
            new = [tok.control["<think>"], tok.control["</think>"]]
            start_tokens(model, new, config.seed)
            if load_latest_state(folder / "state") is None:  # else what comes from there is fitted already
                fit_tokens(model.to(device), new, [source(config, tok, purpose=7).batch(i).map(lambda x: x.to(device)) for i in range(FIT_BATCHES)])
    dist.shard(model.to(device))
    data = source(config, tok)
    ahead = Prefetcher(lambda step: data.batch(step, progress=step / t.steps), t.steps, config.data.workers)

    def loss(rows: Rows, step: int) -> dict[str, Tensor]:
        return {"hard": text_loss(model, rows)}

    def batch(step: int) -> Rows:
        if t.blend < 1 and step == t.step_back:
            go_back(model, slow_model(load_to_train(t.init, dtype=torch.float32, dense=True).model), t.blend, new)
        if step >= t.first_decision and config.data.has_problems and not data.needs_thinking:
            if not assessment(folder):
                assess(snapshot(model), tok, data, t.n_assess, folder / ASSESSMENT, log)
            dist.barrier()
            data.needs_thinking = assessment(folder)
            ahead.restart()
        return ahead(step)

    train(model, Loop("teacher", folder, t.steps, t.optim, config.save_every, batch, loss, log, config.precision))
    return snapshot(model)


@torch.no_grad()
def go_back(model: DualBranchModel, start: DualBranchModel, stays: float, new: list[int]) -> None:
    """Moves the weights of `model` towards those of `start`, but for the rows of the tokens `new`: the share `stays` of the difference is left. Mutates it."""
    weights, tables = dict(start.named_parameters()), {id(table.weight) for table in {model.embed, model.head} - {None}}
    for name, p in model.named_parameters():
        trained = dist.full(p.detach())
        mixed = torch.lerp(weights[name].to(trained.device), trained, stays)
        if id(p) in tables:
            mixed[new] = trained[new]
        p.copy_(dist.like(mixed, p))


@torch.no_grad()
def start_tokens(model: DualBranchModel, ids: list[int], seed: int) -> None:
    """Gives tokens that a model never saw embeddings as far from the mean, and from each other, as those of other tokens. Mutates `model`."""
    for table in {model.embed, model.head} - {None}:
        noise = torch.randn(len(ids), table.weight.shape[1], generator=torch.Generator().manual_seed(seed))
        table.weight[ids] = table.weight.mean(0) + table.weight.std(0) * noise


def fit_tokens(model: DualBranchModel, ids: list[int], batches: list[Rows], steps: int = 400, lr: float = 0.02) -> None:
    """Moves the output rows of tokens `ids` to where the model, as it is, predicts them at their places in `batches`, and nowhere else. Mutates `model`.

    A logistic regression on hidden states. Training alone is slow at this: at the low rate that embeddings of a public model bear, `</think>` was still at
    7 nats after 80 steps, and no reply ended its reasoning.
    """
    table = (model.embed if model.head is None else model.head).weight
    hidden, others, own, targets = [], [], [], []
    with torch.no_grad():
        for rows in batches:
            scored = rows.loss_weights > 0
            out = model(rows.tokens, doc_start=rows.doc_start, logits_at=scored)
            hidden.append(model.norm(out.hidden[scored]))
            targets.append(rows.targets[scored])
            own.append(out.logits.gather(1, targets[-1][:, None])[:, 0])
            out.logits[:, ids] = -math.inf
            others.append(out.logits.logsumexp(-1))
    x, others, own, targets = map(torch.cat, (hidden, others, own, targets))
    first = table[ids].detach()
    fitted = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([fitted], lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        logits = x @ fitted.T
        goal = own
        for column, token in enumerate(ids):
            goal = torch.where(targets == token, logits[:, column], goal)
        loss = (torch.logaddexp(others, logits.logsumexp(-1)) - goal).mean() + 1e-4 * (fitted - first).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        table[ids] = fitted


def text_loss(model: DualBranchModel, rows: Rows) -> Tensor:
    """Summed, weighted cross-entropy of `rows` by the slow route."""
    scored = rows.loss_weights > 0
    logits = model(rows.tokens, doc_start=rows.doc_start, logits_at=scored).logits
    return hard_loss(logits, rows.targets[scored], rows.loss_weights[scored])


def assessment(folder: Path) -> list[bool]:
    """What `assess` found for the teacher in `folder`; empty where it did not (yet)."""
    path = folder / ASSESSMENT
    return json.loads(path.read_text()) if path.exists() else []


def assess(model: DualBranchModel, tok: Tokenizer, data: BatchSource, n: int, path: Path, log: Log) -> None:
    """Answers the first `n` training problems without reasoning and writes which were wrong: `[needs_thinking, ...]`. Collective."""
    problems = [data.assessed_problem(i) for i in range(n)]
    wrong = [not ok for ok in direct_answers(model, tok, problems)]
    if dist.rank() == 0:
        write_text(path, json.dumps(wrong))
    log({"stage": "assess", "step": 0, "n_problems": n, "needs_thinking": sum(wrong) / max(1, n)})


def direct_answers(model: DualBranchModel, tok: Tokenizer, problems: list[Problem]) -> list[bool]:
    """Whether each problem is answered correctly without reasoning, greedy, by the slow route."""
    mode, params = resolve("think", thinking="off"), SamplingParams(max_tokens=96)
    right: list[bool] = []
    size = 256 if model.device.type == "cpu" else 2048
    for i in range(0, len(problems), size):
        part = problems[i : i + size]
        prompts = [render_prompt(tok, [{"role": "user", "content": p.prompt}]) for p in part]
        replies = generate_batch(model, tok, prompts, mode, params)
        right += [verify(p, r.reply.answer) for p, r in zip(part, replies, strict=True)]
    return right


def train_student(config: RunConfig, tok: Tokenizer, teacher: DualBranchModel, student: DualBranchModel, folder: Path, log: Log, name: str) -> DualBranchModel:
    """Distils `teacher` into `student` under mixed routes (dense students have only one). Mutates `student`.

    Losses: soft labels, hard labels, and the alignment of the routed stream with the teacher's where both are equally wide.
    """
    s = config.student
    data = source(config, tok, purpose=1)
    freeze = s.freeze_slow and s.init == "teacher" and not student.config.is_dense
    for n, p in student.named_parameters():
        p.requires_grad_(not n.startswith("gate.") and (not freeze or ".fast." in n))
    dist.shard(student)
    teacher.requires_grad_(False)
    head = [*student.norm.parameters(), *(student.embed if student.head is None else student.head).parameters()]
    cache = TeacherCache(folder / "teacher_logits", s.cache_logits, teacher) if s.cache_logits else None
    aligned = s.align > 0 and student.config.d_model == teacher.config.d_model

    batch = Prefetcher(lambda step: data.batch(step % s.distinct_batches if s.distinct_batches else step), s.steps, config.data.workers)

    def at_head(logits: Tensor, goal: Tensor, targets: Tensor, weights: Tensor, soft_w: Tensor) -> dict[str, Tensor]:
        hard = {"hard": s.hard * hard_loss(logits, targets, weights)} if s.hard else {}  # over a large vocabulary not free
        return hard | {"soft": s.soft * distill_loss(goal, logits, soft_w, s.temperature)}

    def at_streams() -> Callable[..., dict[str, Tensor]]:
        student_logits, teacher_logits = student.logits_in_slices(), teacher.logits_in_slices()

        def at_stream(hidden: Tensor, goal: Tensor, *columns: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                goal = teacher_logits(goal)
            return at_head(student_logits(hidden), goal, *columns)

        return at_stream

    def loss(rows: Rows, step: int) -> dict[str, Tensor]:
        soft_w = rows.loss_weights.masked_fill(decides(tok, rows), 1.0)  # the teacher's decision counts even where no label does
        scored = soft_w > 0
        vocab_size = student.config.vocab_size
        sliced = cache is None and dist.world_size() == 1 and rows.tokens.numel() * vocab_size > LOGITS_AT_ONCE
        logits_at = torch.zeros_like(scored) if sliced else scored
        target = None
        if cache is None:
            with torch.no_grad():
                target = teacher(rows.tokens, doc_start=rows.doc_start, logits_at=logits_at)
        route = choose_route(config, step, rows, student)
        out = student(rows.tokens, route, doc_start=rows.doc_start, logits_at=logits_at)
        columns = (rows.targets[scored], rows.loss_weights[scored], soft_w[scored])
        if target is None:
            losses = {"hard": s.hard * hard_loss(out.logits, *columns[:2])}
            losses["soft"] = s.soft * cache.loss(step % s.distinct_batches, rows, out.logits, soft_w)
            return losses
        if sliced:
            losses = token_loss(at_streams(), vocab_size, out.hidden[scored], (target.hidden[scored], *columns), head)
        else:
            losses = at_head(out.logits, target.logits, *columns)
        if aligned:
            valid = rows.real.flatten().float()
            losses["align"] = s.align * align_loss(out.hidden.flatten(0, 1), target.hidden.flatten(0, 1), valid)
        return losses

    train(student, Loop(name, folder, s.steps, s.optim, config.save_every, batch, loss, log, config.precision))
    return snapshot(student)


def choose_route(config: RunConfig, step: int, rows: Rows, student: DualBranchModel) -> str | Tensor:
    """The route of a batch: all-fast, all-slow, or a mix whose share of slow tokens is drawn per row and whose slow tokens are drawn at random.

    Shares are mostly small: fast tokens are what trains the fast branch. A function of the step. (Slow tokens drawn by need, where the all-fast
    student is furthest from its teacher, cost a seventh of a step and gained nothing: docs/experiments.md.)
    """
    if student.config.is_dense:
        return "slow"
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    fast, mixed, _ = config.student.routes
    u = float(torch.rand((), generator=generator)) * sum(config.student.routes)
    if u < fast:
        return "fast"
    if u >= fast + mixed:
        return "slow"
    share = torch.rand(len(rows), 1, generator=generator) ** 3
    return (torch.rand(rows.tokens.shape, generator=generator) < share).to(rows.tokens.device)


@torch.no_grad()
def gate_examples(model: DualBranchModel, tok: Tokenizer, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """From the model's own two runs, of every real token: stem output `(n, E)`, KL(slow || fast) `(n,)`, and the fast branch's confidence
    `(n,)`, the probability of its likeliest successor (1 where nobody uses the prediction).

    A token whose own prediction nobody uses (a prompt's) has nothing to gain: its KL counts as zero. Measured: sending prompts slow
    changes what is read from their keys so little that the same budget spent on replies closes 88 % instead of 59 % of the gap.
    """
    stem = {}
    hook = model.blocks[model.config.n_stem - 1].register_forward_hook(lambda _m, _i, out: stem.update(x=out))
    real = rows.real
    none = torch.zeros_like(real)
    slow = model(rows.tokens, "slow", doc_start=rows.doc_start, logits_at=none).hidden
    hook.remove()
    fast = model(rows.tokens, "fast", doc_start=rows.doc_start, logits_at=none).hidden
    used = ((rows.loss_weights > 0) | decides(tok, rows)) & real
    logits_of = model.logits_in_slices()

    def compare(slow: Tensor, fast: Tensor) -> Tensor:
        logits = logits_of(fast)
        return torch.stack([token_kl(logits_of(slow), logits), logits.softmax(-1).amax(-1)], dim=-1)

    found = torch.tensor([0.0, 1.0], device=real.device).repeat(*real.shape, 1)  # (R, T, 2): KL and confidence
    found[used] = by_tokens(compare, model.config.vocab_size, slow[used], fast[used])
    return stem["x"][real.flatten()], found[real][:, 0], found[real][:, 1]


def decides(tok: Tokenizer, rows: Rows) -> Tensor:
    """`(R, T)` bool: the tokens that predict whether to think, the last ones of what opens a reply."""
    found = torch.full_like(rows.tokens, tok.thinks, dtype=torch.bool)
    opening = chat_format(tok).assistant
    for back, token in enumerate(reversed([*opening.ids, *tok.encode(opening.text)])):
        found[:, :back] = False
        found[:, back:] &= rows.tokens[:, : rows.tokens.shape[1] - back] == token
    return found


def train_gate(config: RunConfig, tok: Tokenizer, model: DualBranchModel, log: Log) -> None:
    """Fits the gate to predict log(KL(slow || fast) + a tenth of its mean) from the stem, then calibrates it on held-out rows. Mutates `model`.

    With that floor no effort goes into telling very small KLs apart.
    """
    c, rng = config.gate, torch.Generator().manual_seed(config.seed)
    x, kl, _ = collect(config, model, tok, unread(config, tok), c.rows)
    target = (kl.clamp(min=0) + 0.1 * kl.mean() + 1e-6).log()
    target = (target - target.mean()) / target.std().clamp(min=1e-6)
    gate = model.gate
    for p in gate.parameters():
        if p.dim() == 2:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=rng) * p.shape[1] ** -0.5)
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(gate.parameters(), c.lr)
    for step in range(c.steps):
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1 - step / c.steps)
        pick = torch.randint(len(x), (min(len(x), 8192),), generator=rng)
        gate_loss = F.mse_loss(gate.need(x[pick]), target[pick])
        optimizer.zero_grad()
        gate_loss.backward()
        optimizer.step()
        log({"stage": "gate", "step": step, "loss": float(gate_loss.detach())})
    if not all(p.isfinite().all() for p in gate.parameters()):
        raise NonFiniteLoss(f"the gate became NaN or infinite; go on with --resume and a lower gate.lr (now {c.lr:g}), the student is kept")
    held_out, kl, confidence = collect(config, model, tok, source(config, tok, "valid", purpose=3), c.calibration_rows)
    fast, slow = (model.cost(route, n_cached=128).flops for route in ("fast", "slow"))
    with torch.no_grad():
        model.calibration = Calibration.measure(gate(held_out), confidence, kl, c.default_budget, fast / slow)
    if tok.thinks and config.data.has_problems:
        model.calibration = calibrate_thinking(config, tok, model, log)


def calibrate_thinking(config: RunConfig, tok: Tokenizer, model: DualBranchModel, log: Log) -> Calibration:
    """`model.calibration` with the thresholds of deciding to reason, measured on held-out problems as `auto` runs them: routed, greedy."""
    c, data = config.gate, source(config, tok, "valid", purpose=5)
    problems = [data.problem(random.Random(f"thinking:{config.seed}:{i}")) for i in range(c.n_problems)]
    prompts = [render_prompt(tok, [{"role": "user", "content": p.prompt}]) for p in problems]
    p_think = []
    for i in range(0, len(prompts), 128):
        part = prompts[i : i + 128]
        logits = prefill(model, part, resolve("auto"), model.new_cache(len(part), max(map(len, part)))).logits[:, -1]
        p_think += torch.sigmoid(logits[:, tok.control["<think>"]] - logits[:, tok.control["</think>"]]).tolist()
    measured = model.calibration
    model.calibration = dataclasses.replace(measured, think_threshold=math.inf, direct_confidence=0.0)  # tries everything, drops nothing
    replies = generate_batch(model, tok, prompts, resolve("auto"), SamplingParams(max_tokens=96))
    doubt = [1.0 - r.confidence for r in replies]
    right = [verify(p, r.answer) for p, r in zip(problems, replies, strict=True)]
    least_doubt = doubt_threshold(doubt, right, c.direct_errors)
    kept = [d < least_doubt for d in doubt]
    found = dataclasses.replace(measured, think_threshold=worth_trying(p_think, kept), direct_confidence=1.0 - least_doubt)
    shares = {"direct": sum(kept) / max(1, len(kept)), "direct_right": sum(right) / max(1, len(right))}
    log({"stage": "thinking", "step": 0, "think_threshold": found.think_threshold, "direct_confidence": found.direct_confidence, **shares})
    return found


def doubt_threshold(doubt: list[float], right: list[bool], errors: float) -> float:
    """The highest threshold of doubt below which at most `errors * n` of the n answers are wrong; midway between answers."""
    ranked = sorted(zip(doubt, right, strict=True))
    allowed, threshold = errors * len(ranked), 0.0
    for i, (d, ok) in enumerate(ranked):
        allowed -= not ok
        if allowed < 0:
            break
        above = ranked[i + 1][0] if i + 1 < len(ranked) else 1.0
        if above > d:
            threshold = (d + above) / 2
    return threshold


def worth_trying(p_think: list[float], kept: list[bool], lost: float = 0.02) -> float:
    """The lowest P(`<think>`) from which on at most a share `lost` of the direct answers that would be kept is never tried."""
    allowed, threshold = lost * sum(kept), 1.0
    for p, k in sorted(zip(p_think, kept, strict=True), reverse=True):
        allowed -= k
        if allowed < 0:
            break
        threshold = p
    return threshold


def collect(config: RunConfig, model: DualBranchModel, tok: Tokenizer, data: BatchSource, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_examples` over `n_rows` rows, in the precision of the run."""
    batches = (data.batch(i, n_rows=min(16, n_rows)).map(lambda x: x.to(model.device)) for i in range(-(-n_rows // 16)))
    with mixed_precision(config.precision, model.device):
        parts = [gate_examples(model, tok, rows) for rows in batches]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
