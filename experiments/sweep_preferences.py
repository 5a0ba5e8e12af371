"""How far does one knob move a policy? A run per preference vector, then the cost-accuracy front over the runs.

    python -m experiments.sweep_preferences --config=configs/quickstart.py --workdir=runs/sweep \
        --weights=1,0,0 --weights=0.5,0.5,0

Each run is the config's with that one preference in place of the five, in <workdir>/<outcome>_<cost>_<latency>, one
after another. The same command goes on where it was stopped: training.run returns the summary of a finished run. At
the end: a table, front.png in the workdir, and whether the run with the most weight on cost costs less than the one
with the least, by a paired permutation test on the instances of the evaluation. `tensorboard --logdir=<workdir>` shows
the runs side by side.
"""

from __future__ import annotations

import copy
import math
import pathlib

import numpy as np
from absl import flags

from experiments import command_line
from orchestra_jax.evaluation.report import format_front_table, plot_front
from orchestra_jax.evaluation.significance import permutation_p_value

_WORKDIR = flags.DEFINE_string("workdir", "runs/sweep", "Holds a run directory for each preference vector.")
# From the right answer at any price to almost any answer that is cheap; in between the optimum's cost falls evenly.
_WEIGHTS = flags.DEFINE_multi_string(
    "weights",
    ["1,0,0", "0.8,0.2,0", "0.5,0.5,0", "0.2,0.8,0", "0.05,0.95,0"],
    "Weights of outcome, cost and latency, with the sum 1. Repeat the flag: one run each.",
)


def parse_weights(text: str) -> tuple[float, float, float]:
    """The weights of outcome, cost_usd and latency_s in "1,0,0"; ValueError for anything that is no preference."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= weight <= 1 for weight in weights) or not math.isclose(sum(weights), 1):
        raise ValueError(f"--weights={text}: give outcome,cost,latency as three numbers from 0 to 1 with the sum 1")
    return weights


def compare_costs(dear: str, cheap: str, summaries) -> str:
    """Does the run labelled `cheap` cost less than the one labelled `dear`? They were evaluated on the same draws."""
    costs = [np.concatenate(list(summaries[label]["trained_costs_usd"].values())) for label in (dear, cheap)]
    p_value = permutation_p_value(*costs, seed=0)
    saved = 1000 * (costs[0] - costs[1]).mean()
    return f"{cheap} costs ${saved:.3f} per 1000 less than {dear}: p = {p_value:.4f}, {len(costs[0])} pairs"


def main(config):
    vectors = list(dict.fromkeys(parse_weights(text) for text in _WEIGHTS.value))
    from orchestra_jax.training import run  # takes seconds to import: what is wrong with the flags is said before

    workdir = pathlib.Path(_WORKDIR.value)
    summaries = {}
    for number, weights in enumerate(vectors, 1):
        names = [f"{weight:.6g}" for weight in weights]
        run_path = workdir / "_".join(names)
        print(f"run {number} of {len(vectors)}: {run_path}", flush=True)
        run_config = copy.deepcopy(config)
        run_config.data.weights = weights
        summaries[",".join(names)] = run(run_config, str(run_path))
    print(format_front_table(summaries))
    if len(summaries) > 1:
        labels = sorted(summaries, key=lambda label: float(label.split(",")[1]))
        print(compare_costs(labels[0], labels[-1], summaries))
    plot_front(summaries, workdir / "front.png")
    print(f"picture: {workdir / 'front.png'}; curves: tensorboard --logdir={workdir}")


if __name__ == "__main__":
    command_line.run(main)
