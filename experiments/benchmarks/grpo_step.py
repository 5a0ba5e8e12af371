"""A GRPO train step of a published size on the accelerator at hand, random weights: seconds, model FLOP/s, memory.

    python -m experiments.benchmark --suite=grpo_step
    python -m experiments.benchmark --suite=grpo_step --option=num_tokens=16384

The product's own `train_step` on packed rows, with the log-probabilities of a reference policy of its own, gradients
and the optimizer's step. What is counted as work, whatever is computed twice:

    update     6 x (parameters without embedding and head) a token, 6 x head a scored token, 3 x causal attention
    reference  a third of it
    LoRA       4 for 6, and 2 x causal attention more than the reference's: frozen weights have no gradients
"""

from __future__ import annotations

import statistics
import time

from experiments.benchmarks.published import device_figures, published_config


def run(
    model: str = "qwen3-8b",
    num_layers: int = 0,  # 0: the model's own
    num_tokens: int = 4096,  # of a row
    num_rows: int = 1,  # of a micro-batch
    num_micro_batches: int = 1,
    num_segments: int = 4,  # of equal length, the later half of each scored
    precision: str = "bfloat16_stochastic_lean",
    remat: str = "feed_forward",
    attention: str = "auto",
    chunk: int = 2048,
    lora_rank: int = 0,
    is_state_on_host: bool = False,
    num_steps: int = 5,
    peak_tflops: float = 989.0,
    trace: str = "",  # a directory for a profile of one more step, that TensorBoard and Perfetto read
) -> dict[str, object]:
    """The figures of `num_steps` steps behind two that compile and warm up; seconds are medians on the wall.

    ValueError for segments that do not fill a row.
    """
    if num_tokens % num_segments:
        raise ValueError(f"num_tokens {num_tokens} in {num_segments} segments: choose a divisor")
    import jax

    config = published_config(model, num_layers, remat=remat, attention=attention)
    learner = Learner(config, precision, chunk, lora_rank, is_state_on_host)
    batches = [packed_batch(config, num_rows, num_tokens, num_segments, seed) for seed in range(num_micro_batches)]

    def seconds(function):
        start_s = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start_s

    first_s = seconds(lambda: learner.step(batches))
    learner.step(batches)
    step_s = statistics.median(seconds(lambda: learner.step(batches)) for _ in range(num_steps))
    parts = {name: statistics.median(seconds(part) for _ in range(3)) for name, part in learner.parts(batches).items()}
    update, reference = model_flops(config, num_micro_batches * num_rows, num_tokens, num_segments, lora_rank > 0)
    update_s = step_s - num_micro_batches * parts["reference_s"]
    if trace:
        learner.gradients = None  # of the parts: a step has its own
        with jax.profiler.trace(trace, create_perfetto_trace=True):
            jax.block_until_ready(learner.step(batches))
    return {
        **device_figures(), "model": model, "num_layers": config.num_layers,
        "num_tokens": num_tokens, "num_rows": num_rows, "num_micro_batches": num_micro_batches,
        "num_segments": num_segments, "precision": precision, "remat": remat, "attention": attention, "chunk": chunk,
        "lora_rank": lora_rank, "is_state_on_host": is_state_on_host,
        "first_step_s": first_s, "step_s": step_s, **parts, "update_s": update_s,
        "update_tflop": update / 1e12, "reference_tflop": reference / 1e12,
        "mfu_update": update / update_s / 1e12 / peak_tflops,
        "mfu_step": (update + reference) / step_s / 1e12 / peak_tflops,
        "mfu_step_reference_not_counted": update / step_s / 1e12 / peak_tflops,
        "tokens_per_s": num_micro_batches * num_rows * num_tokens / step_s,
        "loss": learner.metrics["loss"],
    }  # fmt: skip


class Learner:
    """A train state, its reference policy, and the product's step over them."""

    def __init__(self, config, precision: str, chunk: int, lora_rank: int, is_state_on_host: bool):
        import jax

        from orchestra_jax import sharding
        from orchestra_jax.grpo.train_state import init_state
        from orchestra_jax.grpo.train_step import LossSettings
        from orchestra_jax.models import lora
        from orchestra_jax.models.transformer import init_params
        from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
        from orchestra_jax.precision import cast_parameters, recipe_of

        self.config = config
        self.settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "token_mean", chunk)
        self.gradient_dtype = recipe_of(precision).gradients
        self.optimizer = make_optimizer(
            OptimizerConfig(name="adamw", learning_rate=1e-6, beta2=0.99, precision=precision), num_steps=1000
        )
        params = init_params(config, jax.random.key(0))
        self.base = params if lora_rank else None
        self.reference = params if lora_rank else jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))(params)
        if lora_rank:
            params = lora.init_lora(lora.LoraConfig(rank=lora_rank), params, jax.random.key(1))
        params = cast_parameters(params, precision)
        self.state = jax.jit(lambda params: init_state(params, self.optimizer), donate_argnums=0)(params)
        if is_state_on_host:
            moments = self.state.optimizer_state
            moments = sharding.place(moments, sharding.host_shardings(moments))
            self.state = self.state._replace(optimizer_state=moments)

    def step(self, batches):
        """One train step over the micro-batches -> the new state."""
        from orchestra_jax.grpo.train_step import train_step

        self.state, self.metrics = train_step(
            self.state, batches, 1.0, self.reference, 0.001, config=self.config, settings=self.settings,
            optimizer=self.optimizer, num_updates=1, gradient_dtype=self.gradient_dtype, base_params=self.base,
        )  # fmt: skip
        return self.state

    def parts(self, batches):
        """{name: what to run}: a micro-batch's reference log-probabilities and gradients, and the optimizer's step."""
        from orchestra_jax.grpo.train_state import take_step
        from orchestra_jax.grpo.train_step import add_gradients, batch_logprobs, zero_gradients

        first, chunk = batches[0], self.settings.logprob_chunk

        def reference():
            return batch_logprobs(self.reference, first, 1.0, config=self.config, chunk=chunk)

        reference_BC = reference()
        self.gradients = zero_gradients(self.state.params, config=self.config, dtype=self.gradient_dtype)

        def gradients():
            self.gradients, _ = add_gradients(
                self.gradients, self.state.params, first, None, reference_BC, 1.0, 0.001, 1000.0, self.base,
                config=self.config, settings=self.settings,
            )  # fmt: skip
            return self.gradients

        def optimizer():
            self.state, _ = take_step(self.state, self.gradients, config=self.config, optimizer=self.optimizer)
            return self.state

        return {"reference_s": reference, "gradients_s": gradients, "optimizer_s": optimizer}


def packed_batch(config, num_rows: int, num_tokens: int, num_segments: int, seed: int):
    """A PackedBatch of random tokens: full rows of equal segments, the later half of each scored."""
    import numpy as np

    from orchestra_jax.grpo.packing import PackedBatch

    rng = np.random.default_rng(seed)
    length = num_tokens // num_segments
    place_T = np.arange(num_tokens)
    is_scored_T = place_T % length >= length // 2
    return PackedBatch(
        tokens_RT=rng.integers(0, config.vocab_size, (num_rows, num_tokens), np.int32),
        loss_mask_RT=np.broadcast_to(is_scored_T, (num_rows, num_tokens)).copy(),
        sampler_logprobs_RT=np.full((num_rows, num_tokens), -12.0, np.float32),
        segment_lengths_RS=np.full((num_rows, num_segments), length, np.int32),
        advantages_RS=rng.normal(size=(num_rows, num_segments)).astype(np.float32),
        numbers_RS=np.arange(num_rows * num_segments, dtype=np.int32).reshape(num_rows, num_segments),
    )


def model_flops(config, num_rows: int, num_tokens: int, num_segments: int, is_lora: bool) -> tuple[float, float]:
    """(of the update, of the reference's log-probabilities); see the top of the file."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    num_weights = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    length = num_tokens // num_segments
    products = 2 * num_rows * (
        num_weights * num_tokens + config.hidden_size * config.vocab_size * (length - length // 2) * num_segments
    )  # fmt: skip
    # Scores and weighted values, 2 x 2 operations for each pair of a token and one that it sees, half of length^2.
    scores = 2 * num_rows * num_segments * length**2 * config.num_heads * config.head_dim * config.num_layers
    return float((2 if is_lora else 3) * products + 3 * scores), float(products + scores)
