"""An orchestrator of 1M parameters, trained from nothing on two CPU cores.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Took 17 minutes on two quiet cores with the settings before the present ones, and takes 1.4 GB. README.md says
what it reaches.
"""

from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    return RunConfig()
