"""Sorting inside a kernel: tl.sort and tl.topk, and what stands in for them in Triton's interpreter, where they take seconds.

Callers pass COUNTING = INTERPRETED; both ways give the same numbers (tests/test_triton_prefill.py).
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def smallest(x, K: tl.constexpr, COUNTING: tl.constexpr):
    """(rows, K): the K smallest of each row of x (rows, N), ascending. N and K are powers of two."""
    N: tl.constexpr = x.shape[1]
    if COUNTING:  # an element's place is the number of those before it
        i = tl.arange(0, N)
        before = (x[:, None, :] < x[:, :, None]) | ((x[:, None, :] == x[:, :, None]) & (i[None, :] < i[:, None])[None])
        place = tl.sum(before.to(tl.int32), 2)  # (rows, N)
        return tl.sum(tl.where(place[:, None, :] == tl.arange(0, K)[None, :, None], x[:, None, :], 0), 2).to(x.dtype)
    elif K == N:
        return tl.sort(x, 1)
    else:
        return ~tl.topk(~x, K)  # topk keeps the largest, in descending order; ~x turns the order round
