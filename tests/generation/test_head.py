"""Logits of a few rows against the plain product.

Legend: R rows, D hidden, V vocab.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.generation.head import LANES, LEAST_VOCAB_SIZE, NUM_COLUMNS, head_logits

logits = jax.jit(head_logits)


def some(num_rows, num_dims, vocab_size, dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden_RD = rng.standard_normal((num_rows, num_dims), np.float32)
    return jnp.asarray(hidden_RD, dtype), jnp.asarray(rng.standard_normal((num_dims, vocab_size), np.float32), dtype)


@pytest.mark.parametrize("num_rows", [1, 2, LANES, LANES + 1])
def test_logits_are_those_of_a_plain_product_up_to_the_last_column(num_rows):
    hidden_RD, head_DV = some(num_rows, 32, LEAST_VOCAB_SIZE + NUM_COLUMNS // 2 + 3)
    expected_RV = np.asarray(hidden_RD, np.float64) @ np.asarray(head_DV, np.float64)
    np.testing.assert_allclose(logits(hidden_RD, head_DV), expected_RV, atol=2e-5)


def test_a_rows_logits_are_the_same_to_the_last_bit_whatever_the_others_hold():
    hidden_RD, head_DV = some(LANES, 32, LEAST_VOCAB_SIZE + 1)
    others_RD = hidden_RD.at[0].set(jnp.nan).at[2:].mul(1e3)
    np.testing.assert_array_equal(logits(hidden_RD, head_DV)[1], logits(others_RD, head_DV)[1])
    np.testing.assert_array_equal(logits(hidden_RD, head_DV)[:2], logits(hidden_RD[:2], head_DV))


def test_a_few_rows_are_not_multiplied_by_the_compilers_product_and_others_are():
    def has_product(*shape, dtype=np.float32):
        return "dot_general" in str(jax.make_jaxpr(head_logits)(*some(*shape, dtype)))

    assert jax.default_backend() != "cpu" or not has_product(LANES, 32, LEAST_VOCAB_SIZE)
    for num_rows, num_dims, vocab_size in (
        (1, 32, LEAST_VOCAB_SIZE),
        (LANES + 1, 32, LEAST_VOCAB_SIZE),
        (LANES, 32, 64),
    ):
        assert has_product(num_rows, num_dims, vocab_size)
    assert has_product(LANES, 32, LEAST_VOCAB_SIZE, dtype=jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order of reading is for XLA CPU")
def test_a_few_rows_take_less_time_than_the_compilers_product():
    """That the sum becomes vectors is up to the compiler: without them it takes several times as long."""
    arrays = some(LANES, 256, 151_936)

    def cpu_s(function):
        function = jax.jit(function, compiler_options={"xla_backend_optimization_level": 3})  # conftest.py says 0
        jax.block_until_ready(function(*arrays))
        times = []
        for _ in range(5):
            start_s = time.process_time()
            jax.block_until_ready(function(*arrays))
            times.append(time.process_time() - start_s)
        return min(times)

    assert cpu_s(head_logits) < cpu_s(jnp.matmul)
