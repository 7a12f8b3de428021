"""How much of this machine's matmul peak a training step reaches: python benchmarks/training_speed.py [CONFIG]

Counted: 6 FLOPs per matrix parameter and token (2 forward, 4 backward; the tied head at the tokens it is computed for; embedding look-up,
attention scores, norms, optimizer not), divided by the wall-clock time of whole steps: batch, forward, backward, clipping, optimizer. Peak: the better of a
square 2048 matmul and the model's own feed-forward shape, same dtype and threads, measured between the steps. Padding counts as tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import torch

from dualbranch.distill import stages
from dualbranch.distill.config import RunConfig
from dualbranch.distill.optim import make_optimizers
from dualbranch.distill.trainer import Loop, gradient_step
from dualbranch.measure import about
from dualbranch.model import DualBranchModel
from dualbranch.schema import load_yaml
from dualbranch.tokenizer import Tokenizer


def matmul_flops(m: int, k: int, n: int, seconds: float = 0.3, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of one `(m, k) @ (k, n)`, over about `seconds`."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/small-teacher.yaml")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokenizer", default="pretrained/small-teacher/tokenizer.model")
    args = parser.parse_args()
    config = load_yaml(args.config, RunConfig)
    tok = Tokenizer.load(args.tokenizer)
    model = DualBranchModel(stages.dense_config(dataclasses.replace(config.model, vocab_size=tok.vocab_size)))
    model.init_weights(0)
    data, optimizers, c = stages.source(config, tok), make_optimizers(model, config.teacher.optim), model.config

    def loss(rows, step):
        return {"hard": stages.text_loss(model, rows)}

    loop = Loop("speed", None, args.steps, config.teacher.optim, 1, data.batch, loss, print)
    head = c.vocab_size * c.d_model
    body = model.cost("slow").params_read - head
    rates, achieved, peaks = [], [], []
    for step in range(args.steps + 2):
        start = time.perf_counter()
        rows = data.batch(step)
        gradient_step(model, loop, rows, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step >= 2:  # warm-up
            seconds = time.perf_counter() - start
            rates.append(rows.tokens.numel() / seconds)
            achieved.append(6 * (body * rows.tokens.numel() + head * int((rows.loss_weights > 0).sum())) / seconds)
            peaks.append(max(matmul_flops(2048, 2048, 2048), matmul_flops(rows.tokens.numel(), c.d_model, c.d_ff)))
    share = [a / p for a, p in zip(achieved, peaks, strict=True)]
    rate, speed, peak = (statistics.median(x) for x in (rates, achieved, peaks))
    print(f"{rate:,.0f} tokens/s = {speed / 1e9:.0f} GFLOP/s; matmul peak {peak / 1e9:.0f} GFLOP/s")
    print(f"share of peak: median {statistics.median(share):.0%}, {min(share):.0%} to {max(share):.0%} over {args.steps} steps")
    print(json.dumps({"tokens_per_s": rate, "share_of_peak": statistics.median(share), **about(model)}))


if __name__ == "__main__":
    main()
