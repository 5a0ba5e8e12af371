"""The fused kernels against plain attention: what they are handed here, what they compute where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.grpo.packing import layout
from orchestra_jax.models import attention
from orchestra_jax.models.fused_attention import cudnn_segments

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def test_cudnn_is_told_of_every_token_once_the_padding_as_a_segment_of_its_own():
    lengths_BM, starts_BM = cudnn_segments(jnp.array([[3, 2, 0], [4, 0, 0], [1, 2, 5], [0, 0, 0]]), 8)
    np.testing.assert_array_equal(lengths_BM, [[3, 2, -1, 3], [4, -1, -1, 4], [1, 2, 5, -1], [-1, -1, -1, 8]])
    np.testing.assert_array_equal(
        starts_BM, [[0, 3, -1, 5, -1], [0, -1, -1, 4, -1], [0, 1, 3, -1, -1], [-1, -1, -1, 0, -1]]
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("implementation", ["cudnn", "cudnn by a mask", "pallas"])
def test_kernels_of_a_gpu_equal_plain_attention(implementation):
    """Values and gradients of packed rows with grouped heads: one full, one with a single segment, one of padding."""
    segment_lengths_BM = jnp.array([[300, 84, 0, 128], [200, 0, 0, 0], [1, 2, 300, 0], [0, 0, 0, 0]])
    segments_BT, positions_BT = layout(segment_lengths_BM, 512)
    is_real_BT11 = (segments_BT > 0)[:, :, None, None]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 512, 8, 128), (4, 512, 2, 128), (4, 512, 2, 128), (4, 512, 8, 128)]
    *arrays, cotangent_BTNH = [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]
    if implementation == "cudnn by a mask":
        implementation, segment_lengths_BM = "cudnn", None

    def loss(arrays, name, lengths_BM):
        visibility = attention.own_visibility(positions_BT, segments_BT, lengths_BM)
        own = attention.KeyBlock(*attention.for_products(*arrays[1:]), visibility)
        out_BTNH = jnp.where(is_real_BT11, attention.attend(arrays[0], [own], name), 0)
        return (out_BTNH.astype(jnp.float32) * cotangent_BTNH).sum(), out_BTNH

    gradient_of = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    with jax.default_matmul_precision("float32"):
        expected = gradient_of(arrays, "xla", None)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    actual = gradient_of(halves, implementation, segment_lengths_BM)
    for got, true in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, true = np.asarray(got, np.float64), np.asarray(true, np.float64)
        assert np.linalg.norm(got - true) < 0.01 * np.linalg.norm(true)
