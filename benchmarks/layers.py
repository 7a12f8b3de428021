"""Microseconds that a layer takes of one decoded token, compiled: python benchmarks/layers.py [--precision int8 int4 bf16 fp32] [--contexts 128 388 1000 8160]

A model of SmolLM2-135M's layers with random weights, its fast branch as `configs/smollm2-135m.yaml` cuts it; compiled first, once per machine, a minute or
two per precision. Checked first: each compiled step gives what the same operators uncompiled give. Then the steps take turns within every repeat, each of
them through all dual layers, after 48 MB of something else were read (a decoded token reads as much in other layers and the head), so that weights come
from where they come from while decoding. `of bandwidth`: the time that reading the weights and keys takes at the speed at which this machine sums up
128 MB, of the time measured.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from rich.console import Console
from rich.table import Table

from dualbranch.cache import KVCache
from dualbranch.compiled import build, load_steps
from dualbranch.config import DualBranchConfig
from dualbranch.measure import about, spread
from dualbranch.memory import keep_freed_memory, move_to_huge_pages
from dualbranch.model import DualBranchModel
from dualbranch.precision import parse_precision, quantize
from dualbranch.runner import BlockStep, plain_steps, reach_of, sparse_blocks, step_name
from kernels import SparseSpec

SMOLLM2 = DualBranchConfig(
    vocab_size=512, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, fast_n_heads=9, fast_d_ff=384, n_stem=3, n_tail=1,
    d_gate=48, max_seq_len=16384, sparse=SparseSpec(block_size=16, n_selected_blocks=16, window=128, n_sinks=4, dense_len=1024),
)  # fmt: skip


class Pass:
    """One token after `n_cached` others through all dual layers of `model`, by one branch: `run(steps)` gives the residual stream."""

    def __init__(self, model: DualBranchModel, cache: KVCache, slow: bool, n_cached: int) -> None:
        c = model.config
        self.name = step_name(model.blocks[c.n_stem], slow, n_cached + 1)
        self.x, self.position = torch.randn(1, c.d_model, generator=torch.Generator().manual_seed(0)), torch.tensor([n_cached])
        is_sparse, size = self.name.endswith("sparse"), c.sparse.block_size
        reach = reach_of(n_cached, size, is_sparse)
        rest = *model.rope(self.position, n_cached + 1), torch.zeros(reach), self.position
        self.layers = [
            (BlockStep(model.blocks[i], slow, False, 1).weights_of(model.blocks[i]), *rest[:2], *cache.heads[i], cache.pooled[i], *rest[2:])
            for i in c.dual_layers
        ]
        n_keys = n_cached + 1
        if is_sparse:  # means of blocks, in fp32, are read too
            q = torch.zeros(c.n_kv_heads, 1, c.head_dim)
            _, seen = sparse_blocks(q, cache.pooled[c.n_stem], reach, self.position, c.sparse)
            n_keys = seen[0].numel() + n_keys // size
        weights = sum(t.numel() * t.element_size() for t in self.layers[0][0].values())
        self.bytes = weights + 2 * n_keys * c.n_kv_heads * c.head_dim * cache.k[0].element_size()

    @torch.no_grad()
    def run(self, steps: dict) -> torch.Tensor:
        x = self.x.clone()
        for weights, *rest in self.layers:
            steps[self.name](weights, x, *rest)
        return x

    def seconds(self, steps: dict, between: torch.Tensor) -> float:
        """Of a layer, after `between` was read."""
        between.sum()
        start = time.perf_counter()
        self.run(steps)
        return (time.perf_counter() - start) / len(self.layers)


def bandwidth(n_bytes: int = 128 << 20) -> float:
    """Bytes per second of summing up so many."""
    x = torch.ones(n_bytes // 4)
    return n_bytes / min(_timed(x.sum) for _ in range(10))


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(argv: list[str] | None = None, config: DualBranchConfig = SMOLLM2) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 388, 1000, 2048, 8160])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    for precision in args.precision:
        try:
            parse_precision(precision)
        except ValueError as error:
            parser.error(str(error))
    if not 0 < min(args.contexts) <= max(args.contexts) < config.max_seq_len:
        parser.error(f"--contexts must lie in [1, {config.max_seq_len})")
    torch.set_num_threads(args.threads)
    console, results, between = Console(stderr=True), [], torch.ones(12 << 20)
    for precision in args.precision:
        model = DualBranchModel(config).eval()
        model.init_weights(0)
        if precision != "fp32":
            quantize(model, precision)
        move_to_huge_pages([*model.parameters(), *model.buffers()])  # as `compile_decode` does, and as `infer.py` the next
        keep_freed_memory()
        build(model, console.print)
        steps, plain = load_steps(model), plain_steps(model)
        cache = model.new_cache(1, max(args.contexts) + 1)
        for t in (*cache.k, *cache.v, *cache.pooled.values()):
            t.normal_(generator=torch.Generator().manual_seed(1))
        passes = {(n, slow): Pass(model, cache, slow, n) for n in args.contexts for slow in (False, True)}
        for p in passes.values():
            torch.testing.assert_close(p.run(steps), p.run(plain), rtol=1e-3, atol=1e-3)
        times = {key: [] for key in passes}
        for _ in range(args.repeats):
            for key, p in passes.items():
                times[key].append(p.seconds(steps, between))
        read = bandwidth()
        for (n, slow), p in passes.items():
            us = {k: v * 1e6 for k, v in spread(times[n, slow]).items()}
            results.append({"precision": precision, "context": n, "step": p.name, "us": us, "of_bandwidth": p.bytes / read * 1e6 / us["median"]})
    table = Table("precision", "context", "step", "us per layer (quartiles)", "of bandwidth")
    for r in results:
        us = r["us"]
        table.add_row(r["precision"], f"{r['context']:,}", r["step"], f"{us['median']:.0f} ({us['low']:.0f} to {us['high']:.0f})", f"{r['of_bandwidth']:.0%}")
    console.print(table)
    record = {"benchmark": "layers", **about(model), "bandwidth_gb_per_s": read / 1e9, "results": results}
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
