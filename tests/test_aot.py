"""The ahead-of-time compiler report: what it reads from machine code is right, and a spill fails it. Compiles a few tiny kernels, without a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton, on Linux x86_64)")

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, n_keys, stride_a, D: tl.constexpr, TILE: tl.constexpr):
    rows, cols = tl.arange(0, TILE), tl.arange(0, D)
    acc = tl.zeros((TILE, D), tl.float32)
    for start in range(0, n_keys, TILE):
        x = tl.load(a + rows[:, None] * stride_a + start + rows[None, :])
        acc += tl.dot(x, tl.load(b + (start + rows[:, None]) * D + cols[None, :]))
    tl.store(c + rows[:, None] * D + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def broken(a):
    tl.store(a, nothing)


def aot_cases(target):
    types = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "n_keys": "i32", "stride_a": "i32"}
    yield product, types, {"D": 64, "TILE": 64}, {"num_warps": 4, "num_stages": 2}, "good"
    for D in (64, 32):  # too few registers to hold the sums
        yield product, types, {"D": D, "TILE": 64}, {"num_warps": 2, "num_stages": 2, "maxnreg": 32}, f"spills D{D}"
    yield broken, {"a": "*fp32"}, {}, {"num_warps": 1}, "broken"
"""


def compile_kernels(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / "some_triton.py").write_text(KERNELS, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"} | environment
    command = [sys.executable, "-m", "kernels.aot", "--modules", "some_triton", "--jobs", "1", "--json", str(folder / "out.json"), *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@needs_triton
def test_report_counts_registers_spills_and_instructions_and_fails_on_spills_and_errors(tmp_path):
    done = compile_kernels(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    good, spilled, unchecked, broken = json.loads((tmp_path / "out.json").read_text())["reports"]
    assert good["spill_stores"] == good["spill_loads"] == 0 and 0 < good["registers"] <= 255 and good["programs_per_sm"] > 0
    assert good["tensor_core"].get("wgmma"), f"no tensor-core instruction in {good}"
    assert good["loads"].get("async 16"), f"no 16-byte load in {good}"
    assert spilled["spill_stores"] > 0 and spilled["spill_loads"] > 0 and unchecked["spill_stores"] > 0
    assert "CompilationError" in broken["error"]
    assert [line.split()[2] for line in done.stderr.splitlines() if line.startswith("FAILED")] == ["product", "broken"], done.stderr


@needs_triton
def test_report_passes_what_neither_spills_nor_breaks(tmp_path):
    done = compile_kernels(tmp_path, "--match", "good|D32", "--target", "sm_80")
    assert done.returncode == 0, done.stdout + done.stderr
    good, unchecked = json.loads((tmp_path / "out.json").read_text())["reports"]
    assert good["tensor_core"].get("hmma") and unchecked["spill_stores"] > 0


@needs_triton
def test_refuses_the_interpreter_and_an_empty_selection(tmp_path):
    done = compile_kernels(tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr
    assert compile_kernels(tmp_path, "--match", "no such kernel").returncode == 1


def test_every_module_that_launches_a_kernel_has_cases():
    launching = {f"kernels.{p.stem}" for p in (ROOT / "kernels").glob("*.py") if re.search(r"_kernel\[", p.read_text(encoding="utf-8"))}
    assert launching and launching == set(aot.triton_modules())


def test_without_triton_it_names_the_package(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert aot.main([]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_instruction_mix_reads_widths_and_predicates():
    lines = ["@P0 LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E R4, [R2.64]", "LDG.E.U16 R1, [R2]", "@!UPT LDGSTS.E.BYPASS.128 [R1], [R2.64]"]
    lines += ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]", "@!P1 HMMA.16816.F32.BF16 R4, R8, R2, R4", "STL.64 [R1], R2", "LDL R2, [R1]", "LDL.LU.128 R4, [R1]"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;  /* 0x000 */" for i, line in enumerate(lines))
    assert aot.instruction_mix(sass) == ({"wgmma": 1, "hmma": 1}, {"16": 1, "4": 1, "2": 1, "async 16": 1}, 8, 20)


def test_programs_per_sm_is_bound_by_the_scarcest_resource():
    assert aot.programs_per_sm("sm_90", 128, 1024, 4) == 4  # registers: 65536 / (128 * 128)
    assert aot.programs_per_sm("sm_90", 32, 100 * 1024, 4) == 2  # shared memory: 228 / 101
    assert aot.programs_per_sm("sm_90", 16, 0, 8) == 8  # warps
    assert aot.programs_per_sm("sm_90", 255, 0, 16) == 0  # does not fit at all
