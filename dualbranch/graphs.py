"""Decoding on a GPU by CUDA graphs: the hundreds of kernels that a token takes are launched by two calls instead of one by one from Python.

`GraphRunner` does for a few new tokens of one row what `DualBranchModel.forward` does for any, and returns the same; `model.py` hands such passes over
once `compile_decode` made one. A token's pass has two pieces, the stem with the gate and, by the branch it chose, the rest. A piece is recorded with the
addresses it read and wrote and replayed on whatever lies there then, so positions are tensors in it, and one recording serves all positions up to a
power of two. Needs the Triton kernels, which read positions on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualbranch.cache import KVCache
from dualbranch.packed import logits_of
from dualbranch.routing import Decide, Partition, TokenGroup, goes_slow
from kernels import FEW_QUERIES, AttentionPlan, get_backend

if TYPE_CHECKING:
    from dualbranch.model import DualBranchModel, ModelOutput

logger = logging.getLogger(__name__)

#: Keys that the first recording serves; each next one serves twice as many.
FEWEST_KEYS = 256

#: Records what a function launches, without running it: a function that replays it, and where its results lie then.
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def unavailable(model: DualBranchModel) -> str | None:
    """Why `model` can't decode by CUDA graphs; None where it can."""
    backend = get_backend(torch.empty(1, 1, 1, model.config.head_dim, dtype=model.cache_dtype, device=model.device))
    return None if backend == "triton" else f"CUDA graphs need the Triton kernels, and attention runs on {backend}"


def cuda_graph(device: torch.device, piece: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """`piece` as a CUDA graph on `device`: what `Record` says. Raises RuntimeError for what can't be recorded."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = piece()
    return graph.replay, results


class Recorded:
    """`piece`, which runs as it is the first time (kernels are compiled then), is recorded the second, and replayed from then on.

    What a call returns is overwritten by the next.
    """

    def __init__(self, piece: Callable[[], Any], record: Record) -> None:
        self.piece, self.record = piece, record
        self.replay: Callable[[], None] | None = None
        self.results: Any = None

    def __call__(self) -> Any:
        if self.results is None:
            self.results = self.piece()
            return self.results
        if self.replay is None:
            self.replay, self.results = self.record(self.piece)
        self.replay()
        return self.results


class Step:
    """A pass of `n_new` tokens that follow at least `lowest` others in the first `n_keys` slots of a cache's one row, in pieces.

    `begin()` gives the stem's output `(n_new, E)` and the gate's values or None; `rest[slow]()`, called after it, logits `(n_new, V)` and the residual
    stream `(n_new, E)`. `place` says which tokens, where, and in which cache, always the same or one on the same memory; it is not kept longer than
    the pass. The pieces write to it; its counts are not theirs.
    """

    @torch.inference_mode(False)  # these tensors are written to in any mode
    @torch.no_grad()
    def __init__(self, model: DualBranchModel, n_new: int, n_keys: int, lowest: int, record: Record) -> None:
        self.model, self.n_keys, self.lowest = model, n_keys, lowest
        self.cache: KVCache | None = None
        self.offsets = torch.arange(n_new, device=model.device)
        self.tokens, self.q_pos = torch.zeros(2, 1, n_new, dtype=torch.int64, device=model.device).unbind(0)
        every = torch.arange(n_keys, device=model.device)
        dtype, ropes = model.compute_dtype(n_new), (model.rope, model.sliding_rope)
        self.angles = [None if rope is None else [x.to(dtype) for x in rope(every, n_keys)] for rope in ropes]  # of all positions
        self.begin = Recorded(self._begin, record)
        self.rest = {slow: Recorded(partial(self._rest, slow), record) for slow in (True, False)}

    def place(self, tokens: Tensor, start: int, cache: KVCache) -> None:
        """The next pass is of `tokens (1, n_new)` at positions from `start` on in `cache`."""
        self.cache = cache
        self.tokens.copy_(tokens)
        torch.add(self.offsets, start, out=self.q_pos[0])

    def _begin(self) -> tuple[Tensor, Tensor | None]:
        model = self.model
        x = self._blocks(model.embed(self.tokens)[0], range(model.config.n_stem), slow=True)
        return x, None if model.gate is None else model.gate(x)

    def _rest(self, slow: bool) -> tuple[Tensor, Tensor]:
        model, c = self.model, self.model.config
        x = self.begin.results[0]  # where a recording left it: `begin` has been recorded when this is, for it runs at least as often
        x = self._blocks(x, c.dual_layers, slow)
        x = self._blocks(x, range(c.n_layers - c.n_tail, c.n_layers), slow=True)
        return logits_of(model.norm, model.out, c.logit_softcap, x), x

    def _blocks(self, x: Tensor, layers: range, slow: bool) -> Tensor:
        at = self.q_pos[0]
        angles, sliding = (None if table is None else tuple(x.index_select(0, at) for x in table) for table in self.angles)
        plan = AttentionPlan.within(self.q_pos, self.n_keys, self.lowest)  # anew in each piece: what it keeps depends on the positions
        partition = Partition.uniform(TokenGroup(plan, *angles, (1, len(at)), sliding=sliding), slow)
        for i in layers:
            x = self.model.blocks[i](x, partition, partial(self._store, i))
        return x

    def _store(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The `KVStore` of layer `i`. Mean keys are written of every block a token is in, and mean something once that is complete."""
        cache, at, block_size = self.cache, self.q_pos[0], self.cache.config.sparse.block_size
        for cached, new in ((cache.k[i], k), (cache.v[i], v)):
            cached[0].index_copy_(0, at, new.to(cached.dtype))
        pooled = cache.pooled.get(i)
        if pooled is not None:
            block = at // block_size
            keys = cache.k[i][0].unflatten(0, (-1, block_size)).index_select(0, block)  # (n_new, block_size, Hk, D)
            pooled[0].index_copy_(0, block, keys.float().mean(1))
        return cache.k[i][:, : self.n_keys], cache.v[i][:, : self.n_keys], pooled


class GraphRunner:
    """Runs up to `FEW_QUERIES` tokens of single rows of `model`. Keeps the recordings for one cache, the one it saw last."""

    def __init__(self, model: DualBranchModel, record: Record | None = None) -> None:
        self.model, self.record = model, record or partial(cuda_graph, model.device)
        self.blocks = model.blocks  # for many tokens
        self.steps: dict[tuple[int, int], Step] = {}  # by new tokens and keys
        self.place: tuple[int, ...] = ()  # where the cache's tensors lie

    def takes(self, tokens: Tensor, route: str | Tensor, cache: KVCache | None) -> bool:
        """Whether a pass is one for it: a few new tokens of one cached row, all by one branch, without gradient."""
        if cache is None or len(tokens) > 1 or torch.is_grad_enabled() or get_backend(cache.k[0]) != "triton":
            return False
        if isinstance(route, str) and route in ("slow", "fast"):
            return tokens.numel() <= FEW_QUERIES
        return tokens.numel() == 1 and (isinstance(route, Tensor) or route == "auto")

    def __call__(self, tokens: Tensor, route: str | Tensor, decide: Decide, cache: KVCache, last_only: bool) -> ModelOutput:
        """As `DualBranchModel.forward` of `tokens (1, T)`. Advances the cache."""
        from dualbranch.model import ModelOutput

        n_new = tokens.numel()
        start = cache.next_slot(n_new)
        self.model.config.check_length(start + n_new)
        step = self._step(n_new, start + n_new, cache)
        step.place(tokens, start, cache)
        _, gate = self._run(step.begin)
        g, use_slow = decide(lambda: gate.clone())
        slow = goes_slow(route, use_slow)
        logits, hidden = self._run(step.rest[slow])
        step.cache = None
        cache.fill_slots(n_new, slow)
        wanted = slice(-1, None) if last_only else slice(None)
        return ModelOutput(logits[None, wanted].clone(), hidden[None, wanted].clone(), g, use_slow)

    def logits(self, x: Tensor) -> Tensor:
        """Those of a single token, whoever computed it: `(1, E)` to `(1, V)`."""
        return logits_of(self.model.norm, self.model.out, self.model.config.logit_softcap, x)

    def _step(self, n_new: int, n_filled: int, cache: KVCache) -> Step:
        """The step of passes that fill so many slots of `cache`."""
        place = (cache.capacity, *(t.data_ptr() for t in (*cache.k, *cache.v, *cache.pooled.values())))
        if place != self.place:
            self.steps, self.place = {}, place
        most = max(FEWEST_KEYS, 1 << (n_filled - 1).bit_length())
        if (n_new, most) not in self.steps:
            lowest = 0 if most == FEWEST_KEYS else most // 2 + 1 - n_new
            self.steps[n_new, most] = Step(self.model, n_new, min(most, cache.capacity), lowest, self.record)
        return self.steps[n_new, most]

    def _run(self, piece: Recorded) -> Any:
        """What `piece` returns; where it can't be recorded the log says why, and the model goes on without graphs."""
        try:
            return piece()
        except RuntimeError as error:
            logger.warning("decoding runs without CUDA graphs: %s", str(error).strip()[:300])
            self.model.runner = None
            piece.results = piece.piece()
            return piece.results
