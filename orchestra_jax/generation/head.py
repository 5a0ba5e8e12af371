"""The logits of the rows that are decoded: one product of a few hidden rows with the whole head.

XLA CPU's own product first copies the matrix into the order of its kernel, which a few rows never repay. For them the
head is read once, where it lies: logits[v] += head[d, v] * hidden[d], a vector over the rows, LANES numbers wide.
Each logit is a sum in the order of d, whatever the other rows hold.

Legend: R rows, D hidden, V vocab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from orchestra_jax import sharding

LANES = 8  # rows side by side in a vector register
# Dims of one pass: their hidden numbers stay in registers. Only with sixteen does XLA CPU make vectors of the sum.
NUM_DIMS = 16
NUM_COLUMNS = 4_096  # of a block, whose sums stay in a core's cache
LEAST_VOCAB_SIZE = 32_768  # below, the copy is cheap


def head_logits(hidden_RD, head_DV):
    """-> logits_RV, float32."""
    head_DV = head_DV.astype(hidden_RD.dtype)
    if _is_read_in_place(hidden_RD, head_DV):
        return _read_in_place(hidden_RD, head_DV)
    return jnp.matmul(hidden_RD, head_DV, preferred_element_type=jnp.float32)


def _is_read_in_place(hidden_RD, head_DV) -> bool:
    num_rows, num_dims = hidden_RD.shape
    return (
        jax.default_backend() == "cpu"
        and not sharding.has_mesh()
        and hidden_RD.dtype == jnp.float32
        and 1 < num_rows <= LANES  # a single row is not copied for
        and num_dims % NUM_DIMS == 0
        and head_DV.shape[1] >= LEAST_VOCAB_SIZE
    )


def _read_in_place(hidden_RD, head_DV):
    num_rows, (num_dims, vocab_size) = len(hidden_RD), head_DV.shape
    hidden_DR = _rows_last(jnp.pad(hidden_RD, ((0, LANES - num_rows), (0, 0))).T)

    def write_block(number, logits_VR):
        start = jnp.minimum(number * NUM_COLUMNS, vocab_size - NUM_COLUMNS)  # the last block may repeat columns

        def add_dims(number, sum_VR):
            first = number * NUM_DIMS
            # Without the barrier the compiler reads single numbers instead of vectors.
            few_DR = jax.lax.optimization_barrier(jax.lax.dynamic_slice(hidden_DR, (first, 0), (NUM_DIMS, LANES)))
            for d in range(NUM_DIMS):
                (column_V,) = jax.lax.dynamic_slice(head_DV, (first + d, start), (1, NUM_COLUMNS))
                sum_VR = sum_VR + column_V[:, None] * few_DR[d][None, :]
            return sum_VR

        zeros_VR = jnp.zeros((NUM_COLUMNS, LANES), jnp.float32)
        block_VR = jax.lax.fori_loop(0, num_dims // NUM_DIMS, add_dims, zeros_VR)
        return jax.lax.dynamic_update_slice(logits_VR, block_VR, (start, 0))

    num_blocks = -(-vocab_size // NUM_COLUMNS)
    logits_VR = jax.lax.fori_loop(0, num_blocks, write_block, jnp.zeros((vocab_size, LANES), jnp.float32))
    return _rows_last(logits_VR).T[:num_rows]


def _rows_last(array_XR):
    """Holds the rows to be side by side in memory: the transpose around it would have them apart, and no vectors."""
    return with_layout_constraint(array_XR, Layout(major_to_minor=(0, 1)))
