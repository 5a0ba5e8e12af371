"""The quickstart with six times the rollouts.

    python -m experiments.train --config=configs/quickstart_long.py --workdir=runs/quickstart_long

About 100 minutes on two CPU cores at the 2.4 seconds a step of the quickstart; the aim is 90. Not run yet.
"""

from configs import quickstart
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    config.grpo.num_steps = 2500
    config.checkpoint_every = 200
    return config
