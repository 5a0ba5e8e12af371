"""Trains an orchestrator from end to end and evaluates it.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on with a run that was interrupted. Look at it while it runs: tensorboard --logdir runs
"""

from absl import flags

from experiments import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: new, empty, or this run's own.", required=True)


def main(config):
    from orchestra_jax.training import run  # jax starts here, so that --help and mistakes answer at once

    run(config, _WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
