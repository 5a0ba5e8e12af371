"""The quickstart in miniature: every stage runs, nothing is learned.

    python -m experiments.train --config=configs/smoke.py --workdir=runs/smoke

Under two minutes on two cores, most of it compilation.
"""

from configs import quickstart
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.data.num_tasks_per_cell = 20
    config.data.num_test_tasks_per_cell = 5
    config.warm_start.num_steps = 30
    config.warm_start.num_groups = 8
    config.jax_engine.num_rows = 64
    config.grpo.num_steps = 3
    config.grpo.num_groups = 8
    config.grpo.groups_per_micro_batch = 8
    config.checkpoint_every = 2
    config.evaluation.num_per_preference = 20
    config.evaluation.num_clairvoyant_draws = 2
    return config
