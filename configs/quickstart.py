"""An orchestrator of 1M parameters, trained from nothing on two CPU cores.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Costs about 17 minutes and 1.4 GB. README.md says what it reaches.
"""

from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    return RunConfig()
