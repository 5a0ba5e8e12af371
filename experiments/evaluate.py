"""Evaluates the policy of a run in another world: experts, prices or latencies that its training never drew.

    python -m experiments.train --config=configs/pools.py --workdir=runs/pools
    python -m experiments.evaluate --config=configs/pools_unseen_models.py --policy_of=runs/pools \\
        --workdir=runs/pools_on_unseen_models
    python -m experiments.evaluate --config=configs/pools_unseen_prices.py --policy_of=runs/pools \\
        --workdir=runs/pools_on_unseen_prices

Nothing is trained. Any field that says what is evaluated may differ from the run's (`--config.world...`,
`--config.evaluation...`); model and prompt are the run's own. It prints the table of a run and leaves summary.json,
sample_trajectories.txt and cost_accuracy.png in the workdir.
"""

from absl import flags

from experiments import command_line

_POLICY_OF = flags.DEFINE_string("policy_of", None, "The directory of the run that has trained the policy.")
_EVALUATED = flags.DEFINE_string("workdir", None, "A new or empty directory, or this evaluation's own.")


def main(config):
    from orchestra_jax.trained_policy import evaluate_elsewhere

    evaluate_elsewhere(config, _POLICY_OF.value, _EVALUATED.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["policy_of", "workdir"])
    command_line.run(main)
