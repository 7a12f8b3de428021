"""What an H100 needs at least for the attention of a whole prompt, dense and sparse: `python -m kernels.roofline` prints the table of docs/kernels.md.

A bound, not a measurement: every unit at its ceiling, no launches, no latency. The kernels' own tiles are counted (`launch_config`), so that a change to
them shows.
"""

import torch

from kernels import select_triton
from kernels.prefill_triton import launch_config
from kernels.spec import SparseSpec

MATMUL, L2, MEMORY = 798e12, 5.5e12, 3.35e12  # FLOP/s of bf16 products (measured; tf32: half), bytes/s
N_HEADS, HEAD_DIM, SPEC = 8, 64, SparseSpec()
DENSE_TILE = 128  # queries of a dense tile
#: How much more distinct blocks twice as many neighbours choose: measured on text (docs/kernels.md).
MORE_OF_TWICE = 1.25
#: How many more blocks than reach a query's floor are worth an exact score, for what bf16 may be wrong by: measured once on SmolLM2 (docs/kernels.md).
ROUGH_REACHES = 1.3
HEADER = ("n", "G", "U", "dense bound ms", "keys per tile", "attention GFLOP", "L2 GB", "attention ms", "scored exactly")
HEADER += ("rough scores ms", "exact scores ms", "pooling ms", "sparse bound ms", "dense / sparse")


def distinct(n_queries: int, n_blocks: int, alike: float | None) -> float:
    """How many of `n_blocks` so many neighbours choose together: `alike` times what one does, or (None) each for itself."""
    M = SPEC.n_selected_blocks
    return n_blocks * (1 - (1 - min(1, M / n_blocks)) ** n_queries) if alike is None else min(n_blocks, alike * M)


def candidates(n_blocks: int, columns: int) -> float:
    """How many blocks are worth an exact score to a query that chooses M; its floor is the M-th largest of `columns` maxima."""
    M = SPEC.n_selected_blocks
    return ROUGH_REACHES * n_blocks * (1 - (1 - M / columns) ** (columns / n_blocks)) if n_blocks > columns else n_blocks


def dense_seconds(n: int) -> float:
    flops = 2 * N_HEADS * HEAD_DIM * n * (n + 1)
    read = N_HEADS * sum(t + DENSE_TILE for t in range(0, n, DENSE_TILE)) * 4 * HEAD_DIM
    return max(flops / MATMUL, read / L2)


def sparse_row(n: int, group: int, alike: float | None) -> tuple:
    """A row of the table from "keys per tile" to "sparse bound": `alike` is U / M of the attention kernel's tiles."""
    n_kv, size = N_HEADS // group, SPEC.block_size
    choosing = select_triton.launch_config(HEAD_DIM, SPEC.n_selected_blocks, True)
    tile, step, stretch = launch_config(HEAD_DIM, group, torch.bfloat16)["BT"], choosing["BT"], choosing["BN"]
    doublings = (step // tile).bit_length() - 1
    keys = pairs = exact_pairs = 0.0  # pairs of a query and a block, of one KV head
    for t in range(0, n, step):
        n_blocks = (t - SPEC.window) // size + 1
        if t < SPEC.dense_len:
            keys += t + step
            continue
        keys += SPEC.window + tile + 16 + size * distinct(tile, n_blocks, alike)
        more = candidates(n_blocks, choosing["BW"]) / SPEC.n_selected_blocks
        chosen = distinct(step, n_blocks, alike and alike * more * MORE_OF_TWICE**doublings)
        pairs += n_blocks * step
        exact_pairs += n_blocks * step * min(1, chosen * stretch / n_blocks)
    keys /= n / step
    n_tiles = n / tile * n_kv
    flops, read = 4 * HEAD_DIM * tile * group * keys * n_tiles, 4 * HEAD_DIM * keys * n_tiles
    attention = max(flops / MATMUL, read / L2)
    product = 2 * HEAD_DIM * n_kv
    rough = max(product * pairs / MATMUL, n_kv * pairs * (2 * HEAD_DIM / step + 8 / stretch) / L2)  # bf16 keys; maxima are written and read
    exact = max(3 * product * exact_pairs / (MATMUL / 2), n_kv * exact_pairs * 4 * HEAD_DIM / step / L2)
    pooling = n * n_kv * HEAD_DIM * (2 + (4 + 4 + 2) / size) / MEMORY  # means are written, read, and written in bf16
    return keys, flops / 1e9, read / 1e9, attention, exact_pairs / pairs, rough, exact, pooling, attention + rough + exact + pooling


def main() -> None:
    print("|", " | ".join(HEADER), "|")
    print("|" + "---|" * len(HEADER))
    for n in (8192, 65536):
        dense = dense_seconds(n)
        for group in (2, 4):
            for name, alike in (("random", None), ("4 M", 4), ("3 M", 3), ("2 M", 2)):
                keys, flops, read, attention, share, *choosing_and_total = sparse_row(n, group, alike)
                ms = [f"{1e3 * x:.3f}" for x in (dense, attention, *choosing_and_total)]
                columns = (f"{n // 1024}K", group, name, ms[0], f"{keys:.0f}", f"{flops:.0f}", f"{read:.2f}", ms[1], f"{share:.0%}", *ms[2:])
                print("|", " | ".join(map(str, columns)), f"| {dense / choosing_and_total[-1]:.1f} |")


if __name__ == "__main__":
    main()
