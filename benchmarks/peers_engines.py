"""One engine in a process of its own: python benchmarks/peers_engines.py JOB.json OUT.jsonl

Called by `peers.py`, which decides what is measured and reads OUT.jsonl: one line once the model is loaded and warm, then one per prompt length (task
"speed") or window (task "quality"), so that a process stopped halfway leaves what it had. An adapter, a subclass of `Adapter`, is all that knows a library;
the library is imported by the process that runs it and by no other. Another peer is another adapter and an entry of `ADAPTERS`.
"""

from __future__ import annotations

import importlib
import json
import platform
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Engine:
    """What to run: `library` is a key of `ADAPTERS`, `model` a path (ours: or a name); `route`, `budget` and `compiled` are ours alone, `repacked` is
    llama.cpp's: whether it may lay weights out anew for the CPU's units, as it does by itself."""

    name: str
    library: str
    model: str
    precision: str
    route: str = "slow"
    budget: float | None = None
    compiled: bool = False
    repacked: bool = True


@dataclass(frozen=True)
class Job:
    """`task` "speed": prompts `ids[:n]` for each n of `lengths`, ascending, then decode the `n_decode` ids behind them where n is in `contexts`.
    `task` "quality": the nats of each window of `windows`. `capacity`: the longest sequence, in tokens."""

    engine: Engine
    task: str
    threads: int
    capacity: int
    ids: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    n_decode: int = 0
    windows: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**fields | {"engine": Engine(**fields["engine"])})


class Adapter(ABC):
    """A loaded model and one sequence in it. `needs`: modules without which it can't run; `pip`: what brings them. `kv_element_bytes`: of cached keys."""

    needs: tuple[str, ...] = ()
    pip = ""
    kv_element_bytes = 4

    @abstractmethod
    def __init__(self, job: Job) -> None:
        """Loads `job.engine` for sequences of `job.capacity` tokens on `job.threads` threads; `needs` are imported already."""

    @abstractmethod
    def rewind(self, n: int) -> None:
        """Forgets all but the first `n` tokens of the sequence."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Appends tokens to the sequence; the logits `(V,)` of the last one, valid until the next call."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """`(T, V)` fp32 of a sequence of its own."""

    @abstractmethod
    def weight_bytes(self) -> dict[str, int]:
        """Of weights as they are held: "all" of them, and those only a "slow" or only a "fast" token reads."""

    def slow_share(self, start: int, end: int) -> float:
        """Of the tokens `[start, end)` of the sequence; a conventional decoder computes all of them slow."""
        return 1.0

    def details(self) -> str:
        """How the library runs here."""
        return ""


class Ours(Adapter):
    """dualbranch on one route."""

    needs = ("torch", "dualbranch")

    def __init__(self, job: Job) -> None:
        import torch

        import dualbranch

        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        engine = job.engine
        self.tensor, self.route = torch.tensor, {"route": engine.route} | ({} if engine.budget is None else {"budget": engine.budget})
        self.model = dualbranch.load(engine.model).model
        if engine.compiled and not self.model.compile_decode():
            raise RuntimeError("decoding was not compiled for this model; run with --eager")
        dualbranch.keep_freed_memory()
        self.cache, self.kv_element_bytes = self.model.new_cache(1, job.capacity), self.model.cache_dtype.itemsize

    def rewind(self, n: int) -> None:
        self.cache.truncate(n)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(self.tensor([list(ids)]), **self.route, cache=self.cache, last_only=True).logits[0, 0].numpy()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(self.tensor([list(ids)]), **self.route).logits[0].numpy()

    def weight_bytes(self) -> dict[str, int]:
        from dualbranch.measure import part_of

        found = {"all": 0, "slow": 0, "fast": 0}
        for name, x in [*self.model.named_parameters(), *self.model.named_buffers()]:
            part = part_of(self.model, name).removesuffix(" branch")
            found["all"] += x.nbytes
            if part in found:
                found[part] += x.nbytes
        return found

    def slow_share(self, start: int, end: int) -> float:
        return float(self.cache.from_slow[0, start:end].double().mean())


class Transformers(Adapter):
    """A Hugging Face folder; its own defaults (eager steps, scaled_dot_product_attention, a cache that grows)."""

    needs, pip = ("torch", "transformers"), "transformers"

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        self.tensor, self.new_cache = torch.tensor, transformers.DynamicCache
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.engine.precision]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(job.engine.model, dtype=dtype).eval()
        self.cache, self.kv_element_bytes = self.new_cache(), dtype.itemsize

    def rewind(self, n: int) -> None:
        if n == 0:
            self.cache = self.new_cache()
        elif extra := self.cache.get_seq_length() - n:
            self.cache.crop(-extra)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(self.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, 0].float().numpy()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(self.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()

    def weight_bytes(self) -> dict[str, int]:
        return {"all": sum(x.nbytes for x in [*self.model.parameters(), *self.model.buffers()])}

    def details(self) -> str:
        return f"attention: {self.model.config._attn_implementation}"


class LlamaCpp(Adapter):
    """A GGUF file in llama.cpp; its own defaults (batches of 512, K/V in fp16, no flash attention: on a CPU that decodes slower at 2,000 tokens)."""

    needs, pip = ("llama_cpp",), "llama-cpp-python"
    kv_element_bytes = 2

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.library = llama_cpp
        all_logits = job.task == "quality"
        threads = {"n_threads": job.threads, "n_threads_batch": job.threads}
        if not job.engine.repacked:  # its Python class has no parameter for that
            defaults = llama_cpp.llama_cpp.llama_model_default_params()
            defaults.use_extra_bufts = False
            llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
        self.model = llama_cpp.Llama(job.engine.model, n_ctx=job.capacity, logits_all=all_logits, verbose=False, **threads)

    def rewind(self, n: int) -> None:
        self.model.n_tokens = n  # `eval` drops what lies behind

    def read(self, ids: Sequence[int]) -> np.ndarray:
        self.model.eval(list(ids))
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.model.ctx, -1), shape=(self.model.n_vocab(),))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.rewind(0)
        self.read(ids)
        return np.array(self.model.scores[: len(ids)])

    def weight_bytes(self) -> dict[str, int]:
        return {"all": int(self.library.llama_model_size(self.model.model))}

    def details(self) -> str:
        return self.library.llama_print_system_info().decode()


ADAPTERS: dict[str, type[Adapter]] = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def peak_rss() -> int:
    """Most bytes this process had resident. On Linux not by `getrusage`, which still counts what the parent held when it started this process."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def nll(logits: np.ndarray, ids: Sequence[int]) -> float:
    """Nats of `ids[1:]` under `logits (T, V)`, summed."""
    x = logits[:-1].astype(np.float64)
    x -= x.max(1, keepdims=True)
    return float((np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), list(ids[1:])]).sum())


def first_token(adapter: Adapter, ids: Sequence[int]) -> float:
    """Seconds from a new sequence's ids to the logits of its last."""
    began = time.perf_counter()
    adapter.rewind(0)
    adapter.read(ids)
    return time.perf_counter() - began


def decode(adapter: Adapter, job: Job, n: int) -> float:
    """Seconds per token of the `n_decode` behind the first `n`."""
    adapter.rewind(n)
    began = time.perf_counter()
    for token in job.ids[n : n + job.n_decode]:
        adapter.read([token])
    return (time.perf_counter() - began) / job.n_decode


def measure_speed(adapter: Adapter, job: Job, note: Callable[[dict], None]) -> None:
    """One record per length: seconds to the first token, and per decoded token, timed when they are decoded a second time."""
    for n in job.lengths:
        record = {"tokens": n, "first_token_s": first_token(adapter, job.ids[:n]), "prompt_slow_share": adapter.slow_share(0, n)}
        if n in job.contexts:
            decode(adapter, job, n)  # compiles what this length needs
            record |= {"step_s": decode(adapter, job, n), "step_slow_share": adapter.slow_share(n, n + job.n_decode)}
        note(record | {"peak_rss_bytes": peak_rss()})


def measure_quality(adapter: Adapter, job: Job, note: Callable[[dict], None]) -> None:
    """One record per window: nats, and how many tokens were predicted; of the first one also the `decode_error`."""
    for i, window in enumerate(job.windows):
        logits = adapter.logits(window)
        record = {"nll": nll(logits, window), "n_predicted": len(window) - 1}
        note(record | ({} if i else {"decode_error": decode_error(adapter, window, logits)}))


def decode_error(adapter: Adapter, ids: Sequence[int], logits: np.ndarray, n: int = 16) -> float:
    """Largest difference between `logits (T, V)` of a pass over `ids` and of decoding the last `n`, in standard deviations of the former."""
    start = max(1, len(ids) - n)
    adapter.rewind(0)
    adapter.read(ids[:start])
    return max(float(np.abs(adapter.read([token]) - logits[start + i]).max()) for i, token in enumerate(ids[start:])) / float(logits.std())


def main(job_path: str, out_path: str) -> None:
    job = Job.from_json(Path(job_path).read_text(encoding="utf-8"))
    adapter_class = ADAPTERS[job.engine.library]
    started = time.perf_counter()
    for name in adapter_class.needs:
        importlib.import_module(name)
    imported = time.perf_counter()
    adapter = adapter_class(job)
    loaded = time.perf_counter()
    about = {"import_s": imported - started, "load_s": loaded - imported, "load_peak_rss_bytes": peak_rss()}
    if job.task == "speed":
        first_token(adapter, job.ids[: job.lengths[0]])
        decode(adapter, job, job.lengths[0])
        about["warmup_s"] = time.perf_counter() - loaded
    about |= {"weight_bytes": adapter.weight_bytes(), "kv_element_bytes": adapter.kv_element_bytes, "details": adapter.details()}
    with open(out_path, "a", encoding="utf-8") as out:

        def note(record: dict) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        note(about)
        {"speed": measure_speed, "quality": measure_quality}[job.task](adapter, job, note)


if __name__ == "__main__":
    main(*sys.argv[1:])
