"""The same step by google-tunix, for an interpreter that has it (pip install google-tunix==0.1.7); prints JSON.

Its Qwen3 and its `compute_per_token_logps` at the shapes of train_step.py, with the same split into prompt and scored
completion, in chunks of the sequence where its version has them. Run by the suite (train_step.py).
"""

import inspect
import json
import os
import sys
import time


def main(num_rows, num_prompt_tokens, num_scored_tokens, num_steps, chunk):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import common

    config = qwen3.ModelConfig(
        num_layers=4, vocab_size=151_936, embed_dim=256, hidden_dim=768, num_heads=8, head_dim=32, num_kv_heads=4,
        rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=False,
    )  # fmt: skip
    graph, params = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-6)
    has_chunks = "chunk_size" in inspect.signature(common.compute_per_token_logps).parameters
    options = {"chunk_size": chunk} if has_chunks else {}

    def loss(params, prompt_BT, completion_BT):
        return -common.compute_per_token_logps(
            graph, params, prompt_BT, completion_BT, pad_id=0, eos_id=1, stop_gradient=False, **options
        ).mean()

    def step(state, prompt_BT, completion_BT):
        params, optimizer_state = state
        value, gradients = jax.value_and_grad(loss)(params, prompt_BT, completion_BT)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    rng = np.random.default_rng(0)
    tokens = [rng.integers(2, 151_936, (num_rows, width), np.int32) for width in (num_prompt_tokens, num_scored_tokens)]
    state = (params, optimizer.init(params))
    compiled = jax.jit(step, donate_argnums=0).lower(state, *tokens).compile()
    state, value = jax.block_until_ready(compiled(state, *tokens))
    start_s = time.process_time()
    for _ in range(num_steps):
        state, value = jax.block_until_ready(compiled(state, *tokens))
    cpu_s = (time.process_time() - start_s) / num_steps
    figures = {
        "peer_tokens_per_cpu_s": num_rows * (num_prompt_tokens + num_scored_tokens) / cpu_s,
        "peer_cpu_s_per_step": cpu_s,
        "peer_temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peer_loss_nats": float(value),
        "peer_chunk": options.get("chunk_size", 0),
        "peer_jax": jax.__version__,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
