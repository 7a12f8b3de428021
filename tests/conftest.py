"""Fixtures shared by all tests. Everything is built in memory from a seed: no files, no network, no training."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels then run on the CPU, one program after the other

from dualbranch.config import DualBranchConfig
from dualbranch.gate import Calibration
from dualbranch.model import DualBranchModel
from dualbranch.tokenizer import Tokenizer
from kernels import SparseSpec

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "many"  # `make parity`
N_MANY = 420  # for each of five tests: 2,100 shapes
settings.register_profile("many", max_examples=N_MANY, deadline=None)
if MANY:
    settings.load_profile("many")
torch.set_num_threads(1)  # tests are many tiny operations, and other jobs share the cores: waiting for a second thread costs 10x


def drawn(n: int) -> int:
    """max_examples of a test that draws shapes for the Triton kernels: n, or N_MANY with HYPOTHESIS_PROFILE=many."""
    return N_MANY if MANY else n


def make_tiny_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """A tokenizer with all byte pieces, trained on a few hundred made-up sentences in English and Chinese."""
    rng = random.Random(0)
    words = ["the", "sum", "of", "two", "numbers", "is", "what", "how", "many", "apples", "are", "left", "after", "three", "people", "take"]
    hanzi = "一共有多少个苹果每人分到几个数和是"
    lines = [" ".join(rng.choices(words, k=8)) + f" {rng.randrange(1000)}? " + "".join(rng.choices(hanzi, k=6)) for _ in range(400)]
    return Tokenizer.train(lines, vocab_size)


def make_tiny_model(vocab_size: int, seed: int = 0, **overrides) -> DualBranchModel:
    """A random model small enough for hundreds of generations: spread-out logits, sparse attention that really drops keys beyond
    16 tokens, and a gate calibrated so that each budget really splits tokens."""
    sparse = SparseSpec(block_size=4, n_selected_blocks=2, window=8, n_sinks=2, dense_len=16)
    sizes = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64, "fast_n_heads": 2, "fast_d_ff": 16, "d_gate": 8}
    rest = {"n_stem": 1, "n_tail": 1, "sparse": sparse, "tie_embeddings": False, "max_seq_len": 256}
    model = DualBranchModel(DualBranchConfig(vocab_size=vocab_size, **{**sizes, **rest, **overrides}))
    model.init_weights(seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.embed.weight.normal_(generator=generator)
        if model.head is not None:
            model.head.weight.mul_(3)
        if model.gate is not None:
            model.gate.w_out.weight.mul_(3)
            g = model(torch.randint(10, vocab_size, (8, 64), generator=generator), "auto", threshold=0.5).g
            model.calibration = Calibration.measure(g)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> tuple[DualBranchModel, Tokenizer]:
    """A random `(model, tokenizer)`; shared, so leave both as they are."""
    tok = make_tiny_tokenizer()
    return make_tiny_model(tok.vocab_size), tok


def spared(c, n_prompt: int) -> float:
    """What all tokens of a prompt but the last don't compute: logits, and queries, output and feed-forward of a last layer that is not dual."""
    n, last = n_prompt - 1, 0.0
    if c.n_tail or c.is_dense:
        last = n * 2 * (2 * c.d_model * c.n_heads * c.head_dim + 3 * c.d_model * c.d_ff) + 4 * c.n_heads * c.head_dim * n * (n + 1) / 2
    return n * 2 * c.vocab_size * c.d_model + last
