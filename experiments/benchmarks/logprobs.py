"""The log-probability path at Qwen3's vocabulary, from XLA's memory analysis; nothing is run.

    python -m experiments.benchmark --suite=logprobs

Bytes of the temporaries of value and gradient: all logits at once, and in chunks where a mask is set.
"""

from __future__ import annotations

VOCAB_SIZE, HIDDEN_SIZE, NUM_ROWS = 151_936, 256, 8


def run(num_tokens: int = 512, chunk: int = 256) -> dict[str, object]:
    """Temporaries at `num_tokens` and at twice as many."""
    import jax
    import jax.numpy as jnp

    from orchestra_jax.models.logprobs import token_logprobs

    def full(hidden_BTD, head_DV, targets_BT, mask_BT):
        logprobs_BTV = jax.nn.log_softmax(hidden_BTD @ head_DV)
        return jnp.where(mask_BT, jnp.take_along_axis(logprobs_BTV, targets_BT[:, :, None], axis=2)[:, :, 0], 0).sum()

    def chunked(hidden_BTD, head_DV, targets_BT, mask_BT):
        return token_logprobs(hidden_BTD, head_DV, targets_BT, jnp.ones(NUM_ROWS), chunk, mask_BT).sum()

    def temporary_bytes(loss, num_tokens):
        rows = (NUM_ROWS, num_tokens)
        shapes = (
            ((*rows, HIDDEN_SIZE), "float32"),
            ((HIDDEN_SIZE, VOCAB_SIZE), "float32"),
            (rows, "int32"),
            (rows, bool),
        )
        inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return {
        "full_logits_bytes": NUM_ROWS * num_tokens * VOCAB_SIZE * 4,
        "temporary_bytes_full": temporary_bytes(full, num_tokens),
        "temporary_bytes_chunked": temporary_bytes(chunked, num_tokens),
        "temporary_bytes_chunked_twice_the_tokens": temporary_bytes(chunked, 2 * num_tokens),
        "platform": jax.default_backend(),
    }
