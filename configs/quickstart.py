"""An orchestrator of 1M parameters, trained from nothing on two CPU cores.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Takes 13 to 16 minutes on two cores, and 2 GB. README.md says what it reaches.
"""

from orchestra_jax.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    # One rollout in a thousand is malformed behind the warm start, and reasons are long in this small vocabulary.
    config.episode.num_corrections = 0
    # Groups that differ in cents alone do not push as hard as those that hold failures (docs/log.md, 2026-11-28).
    config.grpo.advantage = "batch_std"
    return config
