"""Compiles every Triton kernel and configuration without a GPU and reports what the compiler made of it.

    python -m kernels.aot [--target sm_80 sm_90 sm_100] [--head-dim 64 128] [--match REGEX] [--json FILE]

Exits 1 if a kernel for head_dim 64 or 128 spills registers, does not fit into shared memory, or does not compile. Each `kernels/*_triton.py`
lists its cases for a target in `aot_cases(target)`: (kernel, signature, constexprs, options, label). Numbers are read from the machine code, so a tensor-core
instruction that is counted is one that will run; counts are static, per kernel, not per iteration.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: Per target: shared memory of a multiprocessor, and the most of it one program may use, in KiB.
SHARED_KIB = {"sm_80": (164, 163), "sm_90": (228, 227), "sm_100": (228, 227)}
REGISTERS_PER_SM, WARPS_PER_SM, PROGRAMS_PER_SM = 65536, 64, 32
#: A case that names its head_dim is held to "no spill" only for these; one that names none always is.
CHECKED_HEAD_DIMS = (64, 128)
HEAD_DIM_NAMES = ("D", "HEAD_DIM", "head_dim")

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE)
_STRIDE = re.compile(r"stride|_s[a-z]$")
_WIDTH = re.compile(r"\.(64|128)(?:\.|$)")
_TENSOR_CORE = {"HMMA": "hmma", "HGMMA": "wgmma", "IMMA": "imma", "IGMMA": "wgmma", "UTCHMMA": "tcgen05", "DMMA": "dmma"}


@dataclass
class Report:
    """What one case became on one target. spill_*: bytes moved to and from local memory by one thread, each instruction counted once."""

    target: str
    module: str
    kernel: str
    label: str
    options: dict[str, int]
    head_dim: int | None
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0  # bytes
    programs_per_sm: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)  # from global memory, by width in bytes; "async": straight to shared memory
    cpu_seconds: float = 0.0
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this case fails the run, or None."""
        if self.error:
            return self.error
        if self.shared > SHARED_KIB[self.target][1] * 1024:
            return f"needs {self.shared} bytes of shared memory, {self.target} has {SHARED_KIB[self.target][1] * 1024}"
        if (self.spill_stores or self.spill_loads) and (self.head_dim is None or self.head_dim in CHECKED_HEAD_DIMS):
            return f"spills {self.spill_stores} bytes of stores, {self.spill_loads} of loads"
        return None


def triton_modules() -> list[str]:
    """Those with cases; a module of shared pieces has none of its own."""
    paths = sorted(Path(__file__).parent.glob("*_triton.py"))
    return [f"kernels.{path.stem}" for path in paths if "def aot_cases(" in path.read_text(encoding="utf-8")]


def cases(module: str, target: str) -> list[tuple]:
    return list(importlib.import_module(module).aot_cases(target))


def instruction_mix(sass: str) -> tuple[dict[str, int], dict[str, int], int, int]:
    """(tensor-core instructions, global loads by width, bytes of local stores, bytes of local loads) in a disassembly."""
    tensor_core, loads, local = Counter(), Counter(), Counter()
    for instruction in _INSTRUCTION.findall(sass):
        name, _, modifiers = instruction.partition(".")
        width = int(m.group(1)) // 8 if (m := _WIDTH.search(instruction)) else 4
        if name in _TENSOR_CORE:
            tensor_core[_TENSOR_CORE[name]] += 1
        elif name == "LDG":
            loads[f"{1 if modifiers.endswith(('U8', 'S8')) else 2 if modifiers.endswith(('U16', 'S16')) else width}"] += 1
        elif name == "LDGSTS":
            loads[f"async {width}"] += 1
        elif name in ("UTMALDG", "UBLKCP"):
            loads["tma"] += 1
        elif name in ("LDL", "STL"):
            local[name] += width
    return dict(tensor_core), dict(loads), local["STL"], local["LDL"]


def programs_per_sm(target: str, registers: int, shared: int, num_warps: int) -> int:
    """How many programs fit on a multiprocessor. Registers are handed out in units of 8 per thread, and each program costs 1 KiB of shared memory more."""
    by_registers = REGISTERS_PER_SM // (-(-max(registers, 1) // 8) * 8 * 32 * num_warps)
    return min(by_registers, SHARED_KIB[target][0] * 1024 // (shared + 1024), WARPS_PER_SM // num_warps, PROGRAMS_PER_SM)


def compile_case(module: str, index: int, target: str) -> Report:
    """Compiles case number `index` of a module. A compiler error is returned, not raised, so that one case does not hide the others."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import TritonError

    kernel, signature, constexprs, options, label = cases(module, target)[index]
    report = Report(target, module.rpartition(".")[2], kernel.__name__, label, dict(options), head_dim_of(cases(module, target)[index]))
    start = sum(os.times()[:4])  # with child processes: the assembler and the disassembler
    full = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    # what a launch finds out by itself: tensors begin at multiples of 16 bytes, and so do rows of a head_dim that is a multiple of 16
    aligned = [i for i, p in enumerate(kernel.params) if full[p.name].startswith("*") or (_STRIDE.search(p.name) and full[p.name] == "i32")]
    aligned = [i for i in aligned if not kernel.params[i].do_not_specialize]
    source = ASTSource(kernel, full, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=dict(options))
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:
        report.error = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return report
    report.shared = compiled.metadata.shared
    report.registers, sass = disassemble(compiled.asm["cubin"])
    report.tensor_core, report.loads, report.spill_stores, report.spill_loads = instruction_mix(sass)
    report.programs_per_sm = programs_per_sm(target, report.registers, report.shared, compiled.metadata.num_warps)
    report.cpu_seconds = sum(os.times()[:4]) - start
    return report


def disassemble(cubin: bytes) -> tuple[int, str]:
    """(registers per thread, SASS) by the `cuobjdump` that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage, sass = (subprocess.run([tool, x, file.name], capture_output=True, text=True, check=True).stdout for x in ("-res-usage", "-sass"))
    return int(re.search(r"REG:(\d+)", usage).group(1)), sass


def head_dim_of(case: tuple) -> int | None:
    return next((int(case[2][name]) for name in HEAD_DIM_NAMES if name in case[2]), None)


def compile_all(targets: Iterable[str], modules: Iterable[str], match: str = "", head_dims: tuple[int, ...] = (), jobs: int = 2) -> Iterator[Report]:
    """Reports in order. Workers are fresh processes: they find a case by (module, index), because a kernel cannot be pickled."""

    def wanted(module: str, case: tuple) -> bool:
        return bool(re.search(match, f"{module} {case[0].__name__} {case[4]}")) and (not head_dims or head_dim_of(case) in (None, *head_dims))

    todo = [(m, i, t) for t in targets for m in modules for i, case in enumerate(cases(m, t)) if wanted(m, case)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*todo, strict=True)) if todo else ()


HEADER = "| target | kernel | configuration | warps, stages | registers | spilled bytes | shared KiB | programs per SM | tensor core | global loads by bytes |"


def table_row(r: Report) -> str:
    mix = [", ".join(f"{n} x {name}" for name, n in sorted(d.items())) or "none" for d in (r.tensor_core, r.loads)]
    launch = f"{r.options.get('num_warps', 4)}, {r.options.get('num_stages', 3)}"
    if r.error:
        return f"| {r.target} | {r.kernel} | {r.label} | {launch} | failed: {r.error} | | | | | |"
    spilled = f"{r.spill_stores}, {r.spill_loads}"
    cells = [r.target, r.kernel, r.label, launch, r.registers, spilled, f"{r.shared / 1024:.1f}", r.programs_per_sm, *mix]
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(SHARED_KIB), default=["sm_90"], help="GPU architectures (default: sm_90)")
    parser.add_argument("--match", default="", metavar="REGEX", help="only cases whose module, kernel and label match")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[], metavar="D", help="only cases for these, and those for any head_dim")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="modules with aot_cases(target) (default: every kernels/*_triton.py)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("error: the compiler is not installed: pip install triton (Linux x86_64)", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET"):
        print("error: TRITON_INTERPRET is set, which replaces the compiler by an interpreter; unset it for this command", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every Triton so far does; 3.9 warns that 3.10 will not
    start, reports = time.perf_counter(), []
    print(HEADER, "|---" * (HEADER.count("|") - 1) + "|", sep="\n")
    for report in compile_all(args.target, args.modules or triton_modules(), args.match, tuple(args.head_dim), args.jobs):
        reports.append(report)
        print(table_row(report), flush=True)
    problems = [r for r in reports if r.problem]
    if args.json:
        import triton

        result = {"triton": triton.__version__, "seconds": round(time.perf_counter() - start, 1), "reports": [asdict(r) for r in reports]}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for r in problems:
        print(f"FAILED {r.target} {r.kernel} {r.label}: {r.problem}", file=sys.stderr)
    n_spilled, cpu_seconds = sum(bool(r.spill_stores or r.spill_loads) for r in reports), sum(r.cpu_seconds for r in reports)
    took = f"{time.perf_counter() - start:.0f} s ({cpu_seconds:.0f} s of CPU)"
    print(f"{len(reports)} compiled for {', '.join(args.target)} in {took}: {len(problems)} failed, {n_spilled} with spills")
    if not reports:
        print("error: no case matched", file=sys.stderr)
    return 1 if problems or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
