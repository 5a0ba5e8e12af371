"""configs/pools.py, tested on models that training never offers in the same role.

    python -m experiments.train --config=configs/pools_unseen_models.py --workdir=runs/pools_unseen_models

As costly as configs/pools.py. Not run yet.
"""

from configs import pools
from configs.catalog import UNSEEN_MODELS
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = pools.get_config()
    config.world.evaluation_pool = UNSEEN_MODELS
    return config
