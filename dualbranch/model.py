"""The dual-branch decoder, whole: embedding -> stem -> gate -> dual blocks -> tail -> norm -> head.

Read this file first, then `block.py` for the formula and `kernels/reference.py` for sparse attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dualbranch import accounting, graphs
from dualbranch.block import Block
from dualbranch.cache import KVCache, NoCache
from dualbranch.config import DualBranchConfig
from dualbranch.gate import Calibration, GatingController, check_budget
from dualbranch.layers import Rope, ScaledEmbedding
from dualbranch.memory import move_to_huge_pages
from dualbranch.packed import PackedLinear, logits_of, product_dtype
from dualbranch.routing import Grid, Partition, TokenGroup
from dualbranch.runner import Runner

logger = logging.getLogger(__name__)

ROUTES = ("slow", "fast", "auto", "soft")
#: Tokens of a long prompt that are read at once: more need more memory and are no faster (docs/experiments.md).
PROMPT_AT_ONCE = 2048


@dataclass(frozen=True)
class ModelOutput:
    """`logits (B, T, V)` fp32, or `(B, 1, V)` with last_only. `hidden (B, T, E)`: residual stream before the final norm (same T).
    `g (B, T)`: weight of the fast branch, None where the gate did not run. `use_slow (B, T)` bool: who computed each token
    (meaningless at padding); None for all-slow and for soft."""

    logits: Tensor
    hidden: Tensor
    g: Tensor | None
    use_slow: Tensor | None


class _SkipInit(TorchFunctionMode):
    """Modules made inside keep parameters as they come. (On the meta device, `normal_` alone would import all of torch._dynamo.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class DualBranchModel(nn.Module):
    """A decoder whose dual blocks compute each token in a fast or a slow branch. `config.is_dense`: a conventional decoder."""

    def __init__(self, config: DualBranchConfig) -> None:
        super().__init__()
        self.config = config
        self.calibration: Calibration | None = None
        self.precision = "fp32"  # of packed weights: precision.py
        self.runner: Runner | graphs.GraphRunner | None = None
        scaled = config.embed_scale != 1.0
        self.embed = ScaledEmbedding(config.vocab_size, config.d_model, config.embed_scale) if scaled else nn.Embedding(config.vocab_size, config.d_model)
        self.rope = Rope(config)
        self.sliding_rope = None if config.sliding_rope_theta is None else Rope(config, sliding=True)
        self.blocks = nn.ModuleList(Block(config, i in config.dual_layers, i in config.sliding_layers) for i in range(config.n_layers))
        self.gate = None if config.is_dense or config.fast_only else GatingController(config)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def without_weights(cls, config: DualBranchConfig) -> DualBranchModel:
        """A model whose parameters have shapes but no storage, made in no time; give it weights by `load_state_dict(weights, assign=True)`."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    def init_weights(self, seed: int) -> None:
        """Normal(0, 1/sqrt(fan_in)) matrices, residual outputs scaled by 1/sqrt(2 L) (GPT-2), small embeddings. Same seed, same weights."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
                continue
            std = 0.02 if name.startswith("embed") else p.shape[1] ** -0.5
            if name.endswith(("w_o.weight", "w_down.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualBranchModel:
        """Of `to`, `float` and their kind: the runner holds the weights as they were."""
        self.runner = None
        return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As PyTorch's; afterwards decoding runs uncompiled until the next `compile_decode`."""
        self.runner = None
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def out(self) -> nn.Module:
        """What makes logits of the normed residual stream: the head or, tied, the embedding."""
        return self.embed if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def compute_dtype(self, n_tokens: int) -> torch.dtype:
        """What products of so many tokens are computed in: the weights' dtype, that of `torch.autocast` where it is on, or that of packed weights."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return product_dtype(n_tokens, self.device) if self.packs_keys else self.dtype

    def cost(self, route: str | float = "slow", n_cached: int = 0) -> accounting.Cost:
        """Parameters, FLOPs and KV bytes of one token with `n_cached` tokens before it; `route` is "slow", "fast" or a share of slow tokens."""
        return accounting.token_cost(self.config, route, n_cached, kv_element_bytes=self.cache_dtype.itemsize)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values in the cache: the model's, and bf16 where the matrices that make them are packed (what those lose in rounding is more)."""
        return torch.bfloat16 if self.packs_keys else self.dtype

    @property
    def packs_keys(self) -> bool:
        """Whether the matrices of keys and values are packed, and with them the slow branch's."""
        return isinstance(self.blocks[0].kv.w_k, PackedLinear)

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """An empty cache on this model's device and in `cache_dtype`."""
        return KVCache(self.config, n_rows, capacity, self.cache_dtype, self.device)

    def forward(
        self,
        tokens: Tensor,
        route: str | Tensor = "slow",
        *,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        doc_start: Tensor | None = None,
        budget: float | None = None,
        threshold: float | Tensor | None = None,
        last_only: bool = False,
        logits_at: Tensor | None = None,
    ) -> ModelOutput:
        """Logits of `tokens (B, T)` int64, right-padded.

        `lengths (B,)` valid tokens per row (None = T). `doc_start (B, T)` start of each token's document in a packed row.
        `route`: "slow" | "fast" | "auto" | "soft", or hard decisions `(B, T)` bool (True = slow). For "auto", `threshold` on g, one or
        `(B, 1)`, or `budget` looked up in the calibration (its default if neither is given). With `cache`, tokens follow what is cached; the cache
        is written and advanced. `last_only`: logits of each row's last valid token alone. `logits_at (B, T)` bool: of those tokens alone,
        in row-major order, `(n, V)` (training does not pay for tokens that no loss looks at).
        Raises ValueError for an unknown route, a budget outside [0, 1], a threshold or cache of another shape, a missing calibration, and CacheFull.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (B, T) with T >= 1, got {tuple(tokens.shape)}; an empty prompt needs at least <bos>")
        if self.config.fast_only and (bool(route.any()) if isinstance(route, Tensor) else route != "fast"):
            asked = "a slow token" if isinstance(route, Tensor) else f"route {route!r}"
            raise ValueError(f"{asked}: this model was exported with its fast branch alone; it runs on route fast only (mode fast)")
        if isinstance(route, str) and route not in ROUTES:
            raise ValueError(f"unknown route {route!r}; choose one of {', '.join(ROUTES)}")
        if isinstance(route, Tensor) and route.shape != tokens.shape:
            raise ValueError(f"route decides for tokens of shape {tuple(route.shape)}, and they are {tuple(tokens.shape)}; give one decision per token")
        if budget is not None:
            check_budget(budget)
        B, T = tokens.shape
        if cache is not None and cache.n_rows != B:
            raise ValueError(f"{B} rows of tokens do not fit a cache of {cache.n_rows}; give the cache's rows that they continue (KVCache.rows)")
        if isinstance(threshold, Tensor) and threshold.shape not in ((), (1,), (1, 1), (B, 1)):
            raise ValueError(f"threshold has shape {tuple(threshold.shape)}; give one number, or one per row, ({B}, 1)")
        if self.runner is not None and logits_at is lengths is doc_start is None and self.runner.takes(tokens, route, cache):
            decide = partial(self._decide, route=route, budget=budget, threshold=threshold, shape=(B, T))
            return self.runner(tokens, route, decide, cache, last_only)
        if B == 1 and T > PROMPT_AT_ONCE and cache is not None and last_only and lengths is doc_start is None and not torch.is_grad_enabled():
            x, g, use_slow = self._in_parts(tokens, route, cache, budget, threshold)
        else:
            x, g, use_slow = self._stream(tokens, route, cache, lengths, doc_start, budget, threshold, last_only)
        return ModelOutput(self.logits(x if logits_at is None else x[logits_at]), x, g, use_slow)

    def _stream(
        self,
        tokens: Tensor,
        route: str | Tensor,
        cache: KVCache | None,
        lengths: Tensor | None,
        doc_start: Tensor | None,
        budget: float | None,
        threshold: float | Tensor | None,
        last_only: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `forward` gives before the final norm and head: `hidden`, `g` and `use_slow`."""
        B, T = tokens.shape
        grid, keys, n_new = self._place(tokens, cache, lengths, doc_start)
        whole = grid.whole()
        all_slow = Partition.uniform(whole, slow=True)
        c = self.config
        last = None  # the tokens that the last layer computes: where the others would go nowhere but into logits that nobody reads, only these
        if last_only and T > 1 and c.n_layers - 1 not in c.dual_layers:
            last = grid.subset(torch.arange(B, device=tokens.device) * T + (n_new - 1).clamp(min=0).to(tokens.device))
        x = self.embed(tokens).flatten(0, 1)  # (B * T, E)
        blocks = self.blocks if self.runner is None or torch.is_grad_enabled() else self.runner.blocks

        def ordinary_layers(x: Tensor, begin: int, end: int) -> Tensor:
            for i in range(begin, end):
                x = blocks[i](x, all_slow, keys.layer(i, None), last if i == c.n_layers - 1 else None)
            return x

        x = ordinary_layers(x, 0, c.n_stem)
        g, use_slow = self._decide(lambda: self.gate(x), route, budget, threshold, (B, T))
        if isinstance(route, str) and route == "soft" and g is not None:
            for i in c.dual_layers:
                x = blocks[i].mix(x, whole, keys.layer(i, None), g.flatten())
        else:
            partition = all_slow if use_slow is None else self._partition(grid, whole, route, use_slow)
            if partition.order is not None:
                x = x.index_select(0, partition.order)
            for i in c.dual_layers:
                x = blocks[i](x, partition, keys.layer(i, partition.order))
            if partition.order is not None:
                x = x.new_zeros(B * T, c.d_model).index_copy(0, partition.order, x)
        x = ordinary_layers(x, c.n_layers - c.n_tail, c.n_layers)

        keys.advance(use_slow)
        x = x.view(B, -1, c.d_model)
        if last_only and x.shape[1] > 1:
            at = (n_new - 1).clamp(min=0).to(x.device)
            x = x[torch.arange(B, device=x.device), at][:, None]
        return x, g, use_slow

    def _in_parts(
        self, tokens: Tensor, route: str | Tensor, cache: KVCache, budget: float | None, threshold: float | Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `_stream` gives for one long row and its last token, in parts of at most `PROMPT_AT_ONCE` tokens."""
        n_keys = int(cache.n_cached[0]) + tokens.shape[1]
        cache.check_room(n_keys)  # all of them fit, or nothing is written
        self.config.check_length(n_keys)
        parts = tokens.split(PROMPT_AT_ONCE, 1)  # round ones, but for the last: what products and attention fill up (packed.multiply) stays small
        routes = route.split([p.shape[1] for p in parts], 1) if isinstance(route, Tensor) else [route] * len(parts)
        found = [self._stream(part, of_part, cache, None, None, budget, threshold, True) for part, of_part in zip(parts, routes, strict=True)]
        g, use_slow = (None if x[0] is None else torch.cat(x, 1) for x in ([f[1] for f in found], [f[2] for f in found]))
        return found[-1][0], g, use_slow

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: residual stream `(..., E)` to fp32 `(..., V)`."""
        if self.runner is not None and x.shape[:-1].numel() == 1 and not torch.is_grad_enabled():
            return self.runner.logits(x.reshape(1, -1).contiguous()).view(*x.shape[:-1], -1)
        return logits_of(self.norm, self.out, self.config.logit_softcap, x)

    def logits_in_slices(self) -> Callable[[Tensor], Tensor]:
        """`logits` for many calls under autocast, which casts a matrix that doesn't train anew at each of them: here it is cast once."""
        out, device = self.out, self.device.type
        weight = getattr(out, "weight", None)
        if weight is None or weight.requires_grad or not torch.is_autocast_enabled(device):
            return self.logits
        return partial(logits_of, self.norm, weight.to(torch.get_autocast_dtype(device)), self.config.logit_softcap)

    def compile_decode(self, build: bool = False) -> bool:
        """Decodes with compiled code from now on, where it was built for such a model (`dualbranch compile`), or can be and `build` says so: a few rows, of
        packed matrices up to `runner.FEW_OF_ROWS`. On a GPU single rows by CUDA graphs (graphs.py), which need no building.

        Returns whether it does; where not, the log says why. It does so until the weights are moved or replaced (`to`, `load_state_dict`). Compiled, the
        weights move to memory of their own (`memory.move_to_huge_pages`).
        """
        from dualbranch import compiled

        if self.device.type == "cuda":
            reason = graphs.unavailable(self)
            if reason is not None:
                logger.warning("decoding runs without CUDA graphs: %s", reason)
                return False
            self.runner = graphs.GraphRunner(self)
            return True
        reason = compiled.unavailable(self, build and not compiled.is_built(self, self.precision))
        steps = None
        while reason is steps is None:
            was_there = compiled.is_built(self, self.precision)
            if build:
                compiled.build(self, logger.info)
            steps = compiled.load_steps(self)
            if not (build and was_there):  # else it was damaged, and is built anew
                break
        if steps is None:
            logger.warning("decoding runs uncompiled: %s", reason or "nothing was built yet for such a model on this machine (`dualbranch compile`)")
            return False
        move_to_huge_pages([*self.parameters(), *self.buffers()])
        self.runner = Runner(self, steps)
        return True

    def _place(self, tokens: Tensor, cache: KVCache | None, lengths: Tensor | None, doc_start: Tensor | None) -> tuple[Grid, object, Tensor]:
        """Positions on the key axis, and where keys are stored."""
        (B, T), device = tokens.shape, tokens.device
        n_new = torch.full((B,), T) if lengths is None else lengths.cpu()
        t = torch.arange(T, device=device).expand(B, T)
        if cache is None:
            keys, q_pos, n_keys = NoCache(B, T), t, T
        else:
            if doc_start is not None:
                raise ValueError("doc_start describes packed training rows; it cannot be combined with a cache")
            keys = cache.writer(n_new, T)
            q_pos, n_keys = t + cache.n_cached.to(device)[:, None], keys.n_keys
        self.config.check_length(n_keys)
        positions = q_pos if doc_start is None else q_pos - doc_start
        positions, n_positions = positions.flatten(), n_keys if lengths is None else n_keys + T
        dtype = self.compute_dtype(B * T)
        angles, sliding = (None if rope is None else tuple(x.to(dtype) for x in rope(positions, n_positions)) for rope in (self.rope, self.sliding_rope))
        if lengths is not None:
            q_pos = torch.where(t < n_new.to(device)[:, None], q_pos, -1)
        return Grid(q_pos, doc_start, n_keys, *angles, sliding), keys, n_new

    def _decide(
        self, gate: Callable[[], Tensor], route: str | Tensor, budget: float | None, threshold: float | Tensor | None, shape: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """`g (B, T)` and `use_slow (B, T)`, each None where it has no meaning; `gate()` gives the gate's values `(B * T,)`."""
        if self.config.is_dense or (isinstance(route, str) and route == "slow"):
            return None, None
        if isinstance(route, Tensor):
            return None, route
        if route == "fast":
            return None, torch.zeros(shape, dtype=torch.bool, device=self.device)
        g = gate().view(shape)
        if route == "soft":
            return g, None
        if threshold is None:
            if self.calibration is None:
                raise ValueError("route 'auto' needs a calibrated gate; train one (python train.py), or pass threshold=")
            threshold = self.calibration.threshold(self.calibration.default_budget if budget is None else budget)
        return g, (g >= threshold).logical_not()  # slow, should a gate give NaN

    @staticmethod
    def _partition(grid: Grid, whole: TokenGroup, route: str | Tensor, use_slow: Tensor) -> Partition:
        if isinstance(route, str) and route == "fast":
            return Partition.uniform(whole, slow=False)
        return Partition.split(grid, whole, use_slow)
