"""Trains an orchestrator from end to end and evaluates it.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on with a run that was interrupted. Look at it while it runs: tensorboard --logdir runs
"""

import ctypes
import sys

from absl import flags

from experiments import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: new, empty, or this run's own.", required=True)
# Of glibc's mallopt, the largest sizes that it takes: what is freed is kept, up to 2 GB.
ALLOCATION = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def main(config):
    from orchestra_jax.training import run  # jax starts here, so that --help and mistakes answer at once

    keep_freed_memory()
    run(config, _WORKDIR.value)


def keep_freed_memory():
    """XLA CPU allocates its temporaries anew at each call, and pages fresh from the kernel cost time."""
    if sys.platform == "linux" and hasattr(c := ctypes.CDLL(None), "mallopt"):  # musl has none
        for parameter, value in ALLOCATION.items():
            c.mallopt(parameter, value)


if __name__ == "__main__":
    command_line.run(main)
