"""Would skipping feed-forward channels token by token pay? An ablation: nothing of this is in the library (docs/experiments.md says what came out).

Quality: each token keeps its best share of the neurons, chosen by an oracle (|activation| x norm of the output column: what no predictor can beat by much) or
by what is known after `w_act` alone (|act(w_act x)| x column norm), with which two thirds of the matrices can be skipped. Time: one token's feed-forward, whole
against chosen rows, weights cold (as many copies as outgrow the cache, in turn), medians.

    python benchmarks/channel_pruning.py [--model smollm2-135m-instruct] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbranch import load
from dualbranch.data.corpora import load_corpus
from dualbranch.layers import FeedForward
from dualbranch.model import DualBranchModel
from dualbranch.text_eval import cut_windows, read_text, token_nll

SHARES = (0.5, 0.35, 0.25, 0.1)


def activation(ff: FeedForward, x: Tensor) -> Tensor:
    a = ff.w_act(x)
    return F.silu(a) if ff.activation == "swiglu" else F.gelu(a, approximate="tanh")


def chosen_only(ff: FeedForward, share: float, policy: str):
    """A `forward` of `ff` in which each token keeps a `share` of the neurons."""
    norms, n = ff.w_down.weight.norm(dim=0), round(share * ff.w_act.out_features)

    def forward(x: Tensor) -> Tensor:
        a = activation(ff, x)
        h = a * ff.w_up(x)
        keep = ((h if policy == "oracle" else a).abs() * norms).topk(n, dim=-1).indices
        return ff.w_down(torch.zeros_like(h).scatter(-1, keep, h.gather(-1, keep)))

    return forward


@torch.inference_mode()
def perplexity(model: DualBranchModel, windows) -> float:
    return math.exp(sum(float(token_nll(model, tokens[None], "slow").double().sum()) for tokens in windows.tokens) / windows.n_tokens)


@torch.inference_mode()
def milliseconds(ff: FeedForward, share: float | None, repeats: int = 300, copies: int = 16) -> float:
    """Of one token's feed-forward, median; `share` None: all of it."""
    norms, n = ff.w_down.weight.norm(dim=0), round((share or 1) * ff.w_act.out_features)
    weights = [(ff.w_act.weight.clone(), ff.w_up.weight.clone(), ff.w_down.weight.clone(), ff.w_down.weight.T.contiguous()) for _ in range(copies)]
    x = torch.randn(1, ff.w_act.in_features)
    seconds = []
    for i in range(repeats):
        w_act, w_up, w_down, columns = weights[i % copies]
        begin = time.perf_counter()
        a = F.silu(F.linear(x, w_act))
        if share is None:
            F.linear(a * F.linear(x, w_up), w_down)
        else:
            keep = (a[0].abs() * norms).topk(n, sorted=False).indices
            h = a[0, keep] * (w_up.index_select(0, keep) @ x[0])
            F.embedding_bag(keep[None], columns, per_sample_weights=h[None], mode="sum")
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds[copies:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text", help="a file, instead of the Wikipedia articles' test split")
    parser.add_argument("--wikitext", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = load(args.model, dense=True)
    model = found.model
    texts = load_corpus("wikipedia", "test") if args.text is None else [read_text(args.text, args.wikitext)]
    windows = cut_windows(found.tokenizer, texts, 1024, args.tokens)
    ff = model.blocks[len(model.blocks) // 2].slow.ff
    whole = milliseconds(ff, None)
    quality, times = {"all": perplexity(model, windows)}, {"all": whole}
    print(f"all neurons: perplexity {quality['all']:.3f}, {whole:.3f} ms a token and layer", flush=True)
    for share in SHARES:
        times[share] = milliseconds(ff, share)
        for policy in ("oracle", "w_act"):
            for block in model.blocks:
                block.slow.ff.forward = chosen_only(block.slow.ff, share, policy)
            quality[f"{policy} {share}"] = perplexity(model, windows)
        for block in model.blocks:
            del block.slow.ff.forward
        oracle, real = (quality[f"{policy} {share}"] for policy in ("oracle", "w_act"))
        ratio = times[share] / whole
        print(f"{share:4.0%} of them: perplexity {oracle:.3f} by oracle, {real:.3f} after w_act; {times[share]:.3f} ms ({ratio:.2f} of whole)", flush=True)
    about = {"model": args.model, "tokens": windows.n_tokens, "threads": args.threads, "torch": torch.__version__}
    print(json.dumps(about | {"perplexity": quality, "ms": times}))


if __name__ == "__main__":
    main()
