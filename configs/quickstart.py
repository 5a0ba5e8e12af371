"""An orchestrator of 1M parameters, trained from nothing on two CPU cores.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Takes about 19 minutes and 3 GB. README.md says what it reaches.
"""

from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.episode.num_corrections = (
        0  # after the warm start hardly a turn needs one, and reasons are long for this vocabulary
    )
    return config
