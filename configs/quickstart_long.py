"""The quickstart with six times the rollouts.

    python -m experiments.train --config=configs/quickstart_long.py --workdir=runs/quickstart_long

Meant for at most 90 minutes on two CPU cores, at 1.75 to 2 seconds a step. Not measured yet.
"""

from configs import quickstart
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.grpo.num_steps = 2500
    config.checkpoint_every = 200
    return config
