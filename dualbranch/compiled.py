"""The steps of decoding and of prompts as machine code: compiled once per machine, model shape and precision, kept in the cache folder, loaded in milliseconds.

`build` exports each of `runner.plain_steps` and has PyTorch's ahead-of-time compiler make a library of it; `load_steps` opens what is there. The code holds
no weights: models of one shape share it. A folder's name is a hash of all that the code depends on, so nothing stale is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import Dim

from dualbranch import block, config, dynamic, layers, packed, prompt, routing, runner, sparse_prompt
from dualbranch.config import DualBranchConfig
from dualbranch.convert.names import cache_folder
from dualbranch.forks import at_once, run_in_forks
from dualbranch.packed import COMPILE_OPTIONS
from dualbranch.schema import to_dict
from kernels import has_bf16_units, spec

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel

logger = logging.getLogger(__name__)

#: For steps that return nothing and call nothing: what they need in between, if its size is fixed, lies on the stack, which saves a fifth of the time of a
#: small layer (PyTorch leaves it on the heap where it is more than 102,400 numbers: a twentieth of the time of a layer so large).
#: (What a step returned would lie there too, and be overwritten by the next call: PyTorch 2.13 leaves that to the caller.)
ON_THE_STACK = {"aot_inductor.allow_stack_allocation": True}
#: For steps that call PyTorch's topk, for which nothing may lie on the stack, or return something: one allocation instead of 44.
IN_ONE_PIECE = {"memory_planning": True}
#: Besides, for steps of sparse prompts: the compiler writes short sums and maxima out, and where each of many passes needs the last, that doubles in each.
NOT_WRITTEN_OUT = {"unroll_reductions_threshold": 1}

#: For GCC: ask for weights 900 instructions before they are multiplied. What the processor fetches by itself is some 20 lines ahead, and reading and
#: arithmetic then come one after the other.
PREFETCH = "-fprefetch-loop-arrays --param=prefetch-latency=900 --param=simultaneous-prefetches=100 --param=min-insn-to-prefetch-ratio=1 \
--param=prefetch-min-insn-to-mem-ratio=1"
#: For GCC 12 and newer: copy 32 bytes by one instruction. PyTorch's AVX2 code copies integers before it loads them, and a load of what two instructions
#: stored just before waits for both: products of packed words then take three times as long.
WHOLE_COPIES = "-mmove-max=256 -mstore-max=256"

#: The code of the steps, with this module's; a change to any of them makes new libraries.
SOURCES = (runner, prompt, sparse_prompt, packed, dynamic, block, layers, routing, config, spec)
#: Settings that no step depends on.
FREE = ("n_layers", "n_stem", "n_tail", "max_seq_len", "rope_theta", "rope_scaling", "d_gate")


def unavailable(model: DualBranchModel, build: bool = True) -> str | None:
    """Why the decode step of `model` can't be compiled here, or (`build` False) not run compiled even where that was done; None where it can."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return f"it is compiled for CPUs and fp32 activations, and the model is in {str(model.dtype).removeprefix('torch.')} on {model.device}"
    compiler = os.environ.get("CXX") or "g++"
    if build and shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}; install one (apt install g++), or name yours in CXX"
    return None


def steps_folder(c: DualBranchConfig, precision: str) -> Path:
    """Where the steps of such models lie on this machine, compiled or not."""
    digest = hashlib.sha256()
    for path in (__file__, *(module.__file__ for module in SOURCES)):
        digest.update(Path(path).read_bytes())
    settings = {name: value for name, value in to_dict(c).items() if name not in FREE}
    kinds = sorted({(i in c.sliding_layers, i in c.dual_layers) for i in range(c.n_layers)})  # of layers
    cpu = torch.device("cpu")
    features = (_cpu_features(), torch.backends.cpu.get_cpu_capability(), has_bf16_units(cpu))
    machine = (torch.__version__, platform.machine(), features, torch.get_num_threads() > 1)
    digest.update(json.dumps([settings, kinds, c.fast_only, precision, machine], sort_keys=True).encode())
    return cache_folder() / "compiled" / digest.hexdigest()[:16]


def _cpu_features() -> str:
    """What instructions this CPU has, as Linux lists them: code is compiled for all of them (a cache folder may be shared by machines)."""
    try:
        with open("/proc/cpuinfo") as info:
            return next((line for line in info if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def is_built(model: DualBranchModel, precision: str) -> bool:
    """Whether there are compiled steps for `model` if it were at `precision`."""
    return model.dtype == torch.float32 and (steps_folder(model.config, precision) / "done").exists()


def load_steps(model: DualBranchModel) -> dict[str, Callable] | None:
    """The compiled steps of `model`, or None where they were not built, or can't be opened: then they are deleted."""
    folder = steps_folder(model.config, model.precision)
    if not is_built(model, model.precision):
        return None
    try:
        return {name: opened(folder / f"{name}.pt2") for name in runner.plain_steps(model)}
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch says that it can't read a library
        logger.warning("what was compiled can't be opened and is deleted: %s", str(error).strip()[:200])
        shutil.rmtree(folder, ignore_errors=True)
        return None


def opened(path: Path) -> Callable:
    """The library as a function of `(weights, *tensors)` or `(*tensors)`, in the order it was exported with.

    Not by `torch._inductor.aoti_load_package`: that imports the whole compiler (150 MB, seconds), and what it returns works out how to flatten its
    arguments anew in every call, for a third of the time of a small step.
    """
    run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).boxed_run

    def step(first: Tensor | dict[str, Tensor], *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = run([*(first.values() if isinstance(first, dict) else (first,)), *rest])
        return found[0] if len(found) == 1 else tuple(found)  # () of a block's step

    return step


def build(model: DualBranchModel, note: Callable[[str], None] = lambda text: None, n_at_once: int | None = None) -> None:
    """Compiles the steps of `model` where that has not been done, `n_at_once` of them at a time (by default as `forks.at_once` says); `note` is told of each.
    Ten to sixty seconds per step and core; a killed build is taken up again.

    Raises ValueError where it can't be done, and where the compiler fails.
    """
    if reason := unavailable(model):
        raise ValueError(f"the decode step can't be compiled: {reason}")
    folder = steps_folder(model.config, model.precision)
    folder.mkdir(parents=True, exist_ok=True)
    _discard_if_made_otherwise(folder, note)
    steps, n_threads = runner.plain_steps(model), torch.get_num_threads()
    longest_first = sorted(steps, key=lambda name: name not in ("choose", "fast-sparse"))
    names = [name for name in longest_first if not (folder / f"{name}.pt2").exists()]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:

        def compile_one(name: str) -> None:
            made = Path(temporary, f"{name}.pt2")
            compile_step(steps[name], *example(model, steps[name]), made, n_threads)
            os.replace(made, folder / made.name)

        tasks = {f"compiling {name} ({i} of {len(names)})": partial(compile_one, name) for i, name in enumerate(names, 1)}
        run_in_forks(tasks, n_at_once or at_once(), note)
    (folder / "done").touch()


def _discard_if_made_otherwise(folder: Path, note: Callable[[str], None]) -> None:
    """Deletes what another compiler made of the steps, one that knew other flags; tells `note` where this one decodes slowly."""
    flags, used = _accepted_flags(os.environ.get("CXX") or "g++"), folder / "flags"
    if flags == [PREFETCH] and _uses_avx2():  # an older GCC; clang has no such trouble
        note("this GCC copies integers in halves, and packed weights take three times as long to decode with; GCC 12 or newer does not (CXX names another)")
    if used.exists() and used.read_text() != " ".join(flags):
        for made in (folder / "done", *folder.glob("*.pt2")):
            made.unlink(missing_ok=True)
    used.write_text(" ".join(flags))


def compile_step(step: torch.nn.Module, args: tuple, dynamic: tuple, path: Path, n_threads: int) -> None:
    """Makes a library of `step` at `path`, for arguments like `args` of which the sizes `dynamic` may vary, and for one thread or, `n_threads` > 1, for any
    number. Raises ValueError where the compiler fails."""
    with warnings.catch_warnings(), torch.no_grad(), _threads_said(1 if n_threads == 1 else os.cpu_count()):
        warnings.simplefilter("ignore")
        flags = " ".join(_accepted_flags(os.environ.get("CXX") or "g++"))  # PyTorch takes them nowhere but in the value of one that it passes on
        options = COMPILE_OPTIONS | {"cpp.enable_floating_point_contract_flag": f"fast {flags}"}
        if isinstance(step, runner.BlockStep):
            options = options | (IN_ONE_PIECE if step.calls_topk else ON_THE_STACK)
        elif isinstance(step, sparse_prompt.Choose | sparse_prompt.Read):
            options = options | IN_ONE_PIECE | NOT_WRITTEN_OUT
        try:
            program = torch.export.export(step, args, dynamic_shapes=dynamic, strict=False)
            program = program.run_decompositions({torch.ops.aten.linear.default: runner.linear_as_sums})
            merge_repeated(program)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except RuntimeError as error:  # all that torch raises for sizes that don't go together and for a compiler that fails
            raise ValueError(f"{path.stem} can't be compiled: {str(error).strip()[:300]}") from error


@contextmanager
def _threads_said(n: int) -> Iterator[None]:
    """Has PyTorch's compiler believe that this process computes with n threads. Where those are as many as the machine has cores it writes code for any
    number of them, and else for exactly n, which a process that uses more or fewer would run with all the same."""
    said = torch.get_num_threads
    torch.get_num_threads = lambda: n
    try:
        yield
    finally:
        torch.get_num_threads = said


@cache
def _accepted_flags(compiler: str) -> list[str]:
    """Those of PREFETCH and WHOLE_COPIES that this C++ compiler knows and this CPU is for."""
    if "Free Software Foundation" not in subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace").stdout:
        return []
    wanted = [PREFETCH] + ([WHOLE_COPIES] if _uses_avx2() else [])
    return [flags for flags in wanted if subprocess.run([compiler, *flags.split(), "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0]


def _uses_avx2() -> bool:
    """Whether PyTorch's code here is for AVX2, not for AVX-512."""
    return "AVX2" in torch.backends.cpu.get_cpu_capability()


def merge_repeated(program: torch.export.ExportedProgram) -> None:
    """Computes once what the program computes several times: what products with the same tokens prepare, say. The compiler would not, and then makes
    a loop of its own for each product; together they share one. Mutates the program, whose operators mutate nothing and draw no random numbers."""
    first: dict[tuple, torch.fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            same = first.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)
                program.graph.erase_node(node)
    program.graph_module.recompile()


def example(model: DualBranchModel, step: torch.nn.Module) -> tuple[tuple, tuple]:
    """Arguments of the step's shapes, and which of their sizes may vary."""
    c = model.config
    if isinstance(step, runner.Unpack):
        matrix, vary = packed.PackedMatrix(1024, 1024, step.bits), {0: Dim.AUTO, 1: Dim.AUTO}  # not one of the model's: a size of 1 would be compiled as 1
        if matrix.scales is None:
            return (matrix.words,), (vary,)
        return (matrix.words, matrix.scales), (vary, {4: {1: Dim.AUTO, 2: Dim.AUTO}, 8: {0: Dim.AUTO}}[step.bits])
    many, vary = torch.ones(40, 96), {0: Dim.AUTO, 1: Dim.AUTO}
    scale, scales, of_rows, of_columns = many[:, :1].clone(), many[0].clone(), {0: Dim.AUTO}, {0: Dim.AUTO}
    if isinstance(step, dynamic.To8Bit):
        return (many,), (vary,)
    if isinstance(step, dynamic.Gated):
        return (many.int(), many.int(), scale, scales, scales.clone()), (vary, vary, of_rows, of_columns, of_columns)
    if isinstance(step, dynamic.From8Bit):
        return (many.int(), scale, scales), (vary, of_rows, of_columns)
    if isinstance(step, sparse_prompt.Choose | sparse_prompt.Read):
        dtype = prompt.attention_dtype(next(b.fast for b in model.blocks if b.fast is not None))
        return example_of_sparse(step, c.fast_n_heads // c.n_kv_heads, c.head_dim, dtype)
    if isinstance(step, packed.Normed):
        return (torch.ones(40, c.d_model), torch.ones(c.d_model)), (of_rows, None)
    x = torch.zeros(1, c.d_model)
    if isinstance(step, prompt.ModuleStep):
        args, dynamic_args = _example_of_module(model, step.how[0])
        weights = step.weights_of(step.how[0])
        return (weights, *args), (dict.fromkeys(weights), dynamic_args)
    weights = step.weights_of(step.how[0])
    cos_sin = torch.zeros(2, 1, 1, c.rotary_dim or c.head_dim).unbind(0)
    k, v = torch.zeros(2, 1, c.n_kv_heads, 130 * c.sparse.block_size, c.head_dim, dtype=model.cache_dtype).unbind(0)
    pooled = torch.zeros(1, 130, c.n_kv_heads, c.head_dim)
    n_blocks, room, in_reach = Dim("n_blocks", min=2, max=1 << 24), Dim("room", min=3, max=1 << 24), Dim("in_reach", min=2, max=(1 << 24) - 1)
    capacity = c.sparse.block_size * room
    at = 69 * c.sparse.block_size
    reach = torch.zeros(runner.reach_of(at, c.sparse.block_size, step.sparse))
    args = (weights, x, *(t.clone() for t in (*cos_sin, k, v)), pooled, reach, torch.tensor([at]))
    return args, (dict.fromkeys(weights), None, None, None, {2: capacity}, {2: capacity}, {1: n_blocks}, {0: in_reach}, None)


def example_of_sparse(step: sparse_prompt.Choose | sparse_prompt.Read, n_groups: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple]:
    """What a step of sparse prompts takes, of `n_groups` query heads per KV head, and which sizes vary."""
    n, size, M = 3 * sparse_prompt.QUERIES, step.spec.block_size, step.spec.n_selected_blocks
    q, at = torch.zeros(n, n_groups, head_dim, dtype=dtype), torch.arange(n)
    if isinstance(step, sparse_prompt.Choose):
        tile, groups = sparse_prompt.TILE, sparse_prompt.AHEAD * Dim("groups", min=2, max=1 << 20)
        pooled, tiles = torch.zeros(3 * sparse_prompt.AHEAD, sparse_prompt.GROUP, head_dim), {0: Dim("tiles", min=2, max=1 << 20)}
        return (q.view(-1, tile, *q.shape[1:]), pooled, at.view(-1, tile)), (tiles, {0: groups}, tiles)
    queries, blocks = ({0: Dim(name, min=2, max=1 << 24)} for name in ("queries", "blocks"))
    k, v = (torch.zeros(40, *shape, dtype=dtype) for shape in ((head_dim, size), (size, head_dim)))
    return (q, k, v, torch.zeros(n, M, dtype=torch.int64), at), (queries, blocks, blocks, queries, queries)


def _example_of_module(model: DualBranchModel, module: torch.nn.Module) -> tuple[tuple[Tensor, ...], tuple]:
    """What a `prompt.ModuleStep` of `module` takes besides weights, and which sizes vary."""
    c, n = model.config, 40
    if module is model.embed:
        return (torch.zeros(1, dtype=torch.int64),), (None,)
    if not isinstance(module, (block.KVProjection, prompt.Queries, prompt.Rest)):
        return (torch.zeros(1, c.d_model),), (None,)  # logits
    of_products = partial(torch.zeros, dtype=packed.product_dtype(n, model.device))
    tokens = {0: Dim("n_tokens", min=packed.FEW + 1, max=1 << 20)}
    if isinstance(module, prompt.Rest):
        return (torch.zeros(n, c.d_model), of_products(n, module.w_o.matrix.n_columns)), (tokens, tokens)
    angles = of_products(2, n, 1, c.rotary_dim or c.head_dim).unbind(0)
    return (of_products(n, c.d_model), *(x.clone() for x in angles)), (tokens, tokens, tokens)
