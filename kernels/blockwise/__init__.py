"""The fast plain-PyTorch attention: same results as `reference.py`, memory linear in T. Called by `ops.py` only.

Ways through, chosen by shape alone (but the last two, by how far neighbours agree):
- dense (`dense.py`): `is_causal` SDPA for a whole prefix, otherwise masked SDPA in chunks of queries;
- masked (`sparse.py`): sparse with a mask per KV head, for rows so short that a mask costs less than gathering;
- by index (`by_index.py`): each query names the rows of the key table it reads, and nothing is copied; for decode on a CPU, dense and sparse;
- gathered (`sparse.py`): the same with copies of what is read; for decode elsewhere, and where gradients are wanted;
- by row (`by_row.py`): prefill of longer rows. Neighbouring queries choose much the same blocks, so a tile of them meets all that one of them reads, with a
  mask;
- turned round (`turned.py`): where neighbours do not agree, each block meets the queries that chose it.
Arguments are checked already. bf16 on a CPU is computed in fp32, which is far faster there, but for products of whole prefixes and with masks where the
CPU has units for bf16.
"""

from kernels.blockwise.dense import dense_attention
from kernels.blockwise.select import select_blocks
from kernels.blockwise.sparse import sparse_attention
from kernels.reference import pool_keys

__all__ = ["dense_attention", "pool_keys", "select_blocks", "sparse_attention"]
