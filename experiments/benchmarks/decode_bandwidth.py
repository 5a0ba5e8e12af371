"""Decode steps of a published size on the accelerator at hand, random weights, against its memory's bandwidth.

    python -m experiments.benchmark --suite=decode_bandwidth --option=num_rows=64

The embedded engine's own `decode` on a full lane. The bound: the weights of layers and head, and the keys and values of
the tokens seen, each read once a step.
"""

from __future__ import annotations

import statistics
import time

from experiments.benchmarks.published import device_figures, published_config


def run(
    model: str = "qwen3-8b",
    num_layers: int = 0,  # 0: the model's own
    num_rows: int = 64,
    num_seen: int = 1024,  # tokens in the cache of each row
    num_steps: int = 32,  # of a dispatch
    num_dispatches: int = 5,
    attention: str = "auto",
    bandwidth_gb_s: float = 4800.0,  # an H200's data sheet
    trace: str = "",  # a directory for a profile of one more dispatch, that TensorBoard and Perfetto read
) -> dict[str, object]:
    """Milliseconds of a step, the median of `num_dispatches`, behind one that compiles; the bound, and its share."""
    import jax
    import jax.numpy as jnp

    from orchestra_jax.generation.decoding import Limits, decode
    from orchestra_jax.models.kv_cache import empty_cache
    from orchestra_jax.models.transformer import init_params

    config = published_config(model, num_layers, attention=attention)
    params = init_params(config, jax.random.key(0))
    num_slots = -(-(num_seen + num_steps) // 64) * 64
    lane = empty_cache(config, num_rows, num_slots)
    turns = endless_turns(num_rows, num_seen, num_steps)
    limits = Limits(jnp.int32(num_steps), jnp.int32(num_rows + 1))

    def dispatch(lane):
        return jax.block_until_ready(decode(params, lane, turns, limits, config=config, max_steps=num_steps))

    times_s = []
    for _ in range(num_dispatches + 1):  # the first one compiles
        start_s = time.perf_counter()
        lane, sampled = dispatch(lane)
        times_s.append(time.perf_counter() - start_s)
    if trace:
        with jax.profiler.trace(trace, create_perfetto_trace=True):
            lane, sampled = dispatch(lane)
    step_s = statistics.median(times_s[1:]) / int(sampled.num_steps)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - (
        0 if config.is_tied else params["embedding"].nbytes
    )
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * lane.keys_LCKHS.dtype.itemsize
    read_bytes = weight_bytes + num_rows * (num_seen + (num_steps - 1) / 2) * token_bytes
    bound_s = read_bytes / bandwidth_gb_s / 1e9
    return {
        **device_figures(), "model": model, "num_layers": config.num_layers,
        "num_rows": num_rows, "num_seen": num_seen, "num_slots": num_slots, "first_dispatch_s": times_s[0],
        "step_ms": 1e3 * step_s, "tokens_per_s": num_rows / step_s, "read_gb": read_bytes / 1e9,
        "bound_ms": 1e3 * bound_s, "share_of_bandwidth": bound_s / step_s,
    }  # fmt: skip


def endless_turns(num_rows: int, num_seen: int, num_steps: int):
    """Turns at temperature 1 that no id ends, each row with a key of its own."""
    import numpy as np

    from orchestra_jax.generation.decoding import Turns
    from orchestra_jax.generation.sampling import SamplingRows

    def whole(number):
        return np.full(num_rows, number, np.int32)

    ones_R = np.ones(num_rows, np.float32)
    key_data_R2 = np.arange(2 * num_rows, dtype=np.uint32).reshape(-1, 2)
    no_ids_RE = np.full((num_rows, 2), -1, np.int32)
    sampling = SamplingRows(ones_R, whole(0), ones_R, 0 * ones_R, key_data_R2)
    return Turns(whole(num_seen), whole(1), whole(num_steps), no_ids_RE, no_ids_RE, sampling)
