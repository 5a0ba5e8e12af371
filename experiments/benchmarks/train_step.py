"""The train step at Qwen3's vocabulary: forward, backward, AdamW on one core; tokens per CPU second, temporaries.

    python -m experiments.benchmark --suite=train_step
    python -m experiments.benchmark --suite=train_step --option=peer_python=VENV/bin/python

The second runs google-tunix (_tunix_step.py) behind it, under an interpreter that has it: pip install
google-tunix==0.1.7, or that and a checkout of its repository (--option=peer_path=DIRECTORY).

The product's own step (supervised.supervised_step) on 8 rows of 256 prompt tokens and 256 scored ones, so half of the
8 x 512 tokens are scored. CPU seconds are those of the process, after a first step that compiles. Its two programs hand
the gradients to each other, which count as a temporary, as they do in the peer's one program.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time

NUM_ROWS, NUM_PROMPT_TOKENS, NUM_SCORED_TOKENS = 8, 256, 256


def run(
    num_steps: int = 2,
    chunk: int = 256,
    remat: str = "full",
    peer_python: str = "",
    peer_path: str = "",
    peer_chunk: int = 64,
) -> dict[str, object]:
    """The figures of `num_steps` steps, pinned to one core; those of the peer behind them, if an interpreter has it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax starts its threads

    learner = Learner(chunk, remat)
    loss = learner.step()
    start_s = time.process_time()
    for _ in range(num_steps):
        loss = learner.step()
    cpu_s = (time.process_time() - start_s) / num_steps
    num_tokens = NUM_ROWS * (NUM_PROMPT_TOKENS + NUM_SCORED_TOKENS)
    temporary_bytes = learner.temporary_bytes()
    del learner
    return {
        "tokens_per_cpu_s": num_tokens / cpu_s,
        "cpu_s_per_step": cpu_s,
        "temporary_bytes": temporary_bytes,
        "loss_nats": float(loss),
        "chunk": chunk,
        "remat": remat,
        "num_steps": num_steps,
        **(measure_peer(peer_python, peer_path, num_steps, peer_chunk) if peer_python else {}),
    }


def measure_peer(peer_python: str, peer_path: str, num_steps: int, chunk: int) -> dict[str, object]:
    """What _tunix_step.py prints under the interpreter `peer_python`, on the same core.

    `chunk`: tokens of a sequence at a time.
    """
    script = pathlib.Path(__file__).with_name("_tunix_step.py")
    sizes = map(str, (NUM_ROWS, NUM_PROMPT_TOKENS, NUM_SCORED_TOKENS, num_steps, chunk))
    environment = {**os.environ, "PYTHONPATH": peer_path, "JAX_PLATFORMS": "cpu"}
    command = [peer_python, script, *sizes]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


class Learner:
    """A train state, a batch, and the product's step over them."""

    def __init__(self, chunk: int, remat: str):
        import jax

        from orchestra_jax.grpo.train_state import init_state
        from orchestra_jax.models.config import ModelConfig
        from orchestra_jax.models.transformer import init_params
        from orchestra_jax.optimizers import OptimizerConfig, make_optimizer

        self.chunk = chunk
        self.config = ModelConfig(
            vocab_size=151_936, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=4,
            head_dim=32, is_tied=False, compute_dtype="float32", remat=remat,
        )  # fmt: skip
        self.optimizer = make_optimizer(OptimizerConfig(name="adamw", learning_rate=1e-6), num_steps=100)
        self.state = init_state(init_params(self.config, jax.random.key(0)), self.optimizer)
        self.batch = random_batch(self.config.vocab_size)

    def step(self):
        """-> the loss; the state is replaced."""
        import jax

        from orchestra_jax.supervised import supervised_step

        self.state, loss = jax.block_until_ready(
            supervised_step(self.state, [self.batch], config=self.config, optimizer=self.optimizer, chunk=self.chunk)
        )
        return loss

    def temporary_bytes(self) -> int:
        """What the step holds at most beside state and batch: its programs' temporaries, and the gradients."""
        import jax

        from orchestra_jax.grpo.train_state import apply_gradients
        from orchestra_jax.supervised import add_supervised_gradients

        gradients = self.state.params  # of the gradients' shapes
        options = {"config": self.config}
        add = add_supervised_gradients.lower(None, self.state.params, self.batch, 1.0, chunk=self.chunk, **options)
        take = apply_gradients.lower(self.state, gradients, optimizer=self.optimizer, **options)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(gradients))
        return num_bytes + max(each.compile().memory_analysis().temp_size_in_bytes for each in (add, take))


def random_batch(vocab_size: int):
    import numpy as np

    from orchestra_jax.grpo.batching import MicroBatch

    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, NUM_SCORED_TOKENS)
    return MicroBatch(
        prefix_tokens_PT=rng.integers(0, vocab_size, (NUM_ROWS, NUM_PROMPT_TOKENS), np.int32),
        prefix_lengths_P=np.full(NUM_ROWS, NUM_PROMPT_TOKENS, np.int32),
        input_tokens_BI=rng.integers(0, vocab_size, shape, np.int32),
        input_lengths_B=np.full(NUM_ROWS, NUM_SCORED_TOKENS, np.int32),
        targets_BC=rng.integers(0, vocab_size, shape, np.int32),
        loss_mask_BC=np.ones(shape, bool),
        sampler_logprobs_BC=np.zeros(shape, np.float32),
        advantages_B=np.zeros(NUM_ROWS, np.float32),
    )
