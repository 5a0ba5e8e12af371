"""The quickstart's policy on the paper's pools: trained on subsets of one, tested on another.

    python -m experiments.train --config=configs/pools.py --workdir=runs/pools

What the models know is simulated (experts/world.py), prices and latencies are the published ones. Aliases are shuffled
in training, so price, time and place are all that a prompt says of an expert; the optimum knows the models besides and
is a bound. Up to 23 experts stand in a prompt: hours on two CPU cores. Not run yet but in miniature.
"""

from configs import quickstart
from configs.catalog import EVALUATION, TRAINING
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.world.training_pool = TRAINING
    config.world.evaluation_pool = EVALUATION
    config.world.reference_latency_s = 120.0
    config.episode.max_turn_tokens = 640
    config.episode.max_tokens = config.jax_engine.max_tokens = 1408
    config.jax_engine.slot_buckets = ()
    config.jax_engine.chunk_buckets = (32, 128, 704)
    config.grpo.prefix_buckets = (384, 704)
    config.grpo.completion_buckets = (256,)
    config.grpo.tokens_per_row = 1408
    return config
