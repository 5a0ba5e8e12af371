"""Logits of a few rows against the plain product.

Legend: R rows, D hidden, V vocab.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.generation import head
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


IN_LESS_TIME = """
import time, jax, jax.numpy as jnp, numpy as np
from orchestra_jax.generation.head import LANES, head_logits

rng = np.random.default_rng(0)
arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((LANES, 256), (256, 151_936))]

def cpu_s(function):
    function, times = jax.jit(function), []
    for _ in range(6):
        start_s = time.process_time()
        jax.block_until_ready(function(*arrays))
        times.append(time.process_time() - start_s)
    return min(times)

ours_s, product_s = cpu_s(head_logits), cpu_s(jnp.matmul)
assert ours_s < product_s, (ours_s, product_s)
print("in less time")
"""


@pytest.mark.slow
def test_a_few_rows_take_less_time_than_the_compilers_product():
    """That the sum becomes vectors is up to the compiler: without them, as in its quick mode, it takes ten times more."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(pathlib.Path(head.__file__).parents[2])
    command = [sys.executable, "-c", IN_LESS_TIME]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "in less time" in result.stdout
