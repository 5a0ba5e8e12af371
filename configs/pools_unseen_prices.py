"""configs/pools.py, tested on the evaluation pool at prices that training never draws.

    python -m experiments.train --config=configs/pools_unseen_prices.py --workdir=runs/pools_unseen_prices

As costly as configs/pools.py. Not run yet.
"""

from configs import pools
from configs.catalog import UNSEEN_PRICES
from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = pools.get_config()
    config.world.evaluation_pool = UNSEEN_PRICES
    return config
