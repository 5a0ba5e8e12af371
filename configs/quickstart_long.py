"""The quickstart with seven times the rollouts.

    python -m experiments.train --config=configs/quickstart_long.py --workdir=runs/quickstart_long

Meant for about 90 minutes on two CPU cores. Not measured yet.
"""

from configs import quickstart
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.grpo.num_steps = 3000
    config.checkpoint_every = 200
    return config
