"""Writes the policy of a run as a Hugging Face directory, for transformers, SGLang, or another run to start from.

    python -m experiments.export_model --workdir=runs/quickstart --directory=models/orchestrator

Low-rank factors are merged. What is written is in the last checkpoint's step.
"""

import sys

from absl import app, flags

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
_DIRECTORY = flags.DEFINE_string("directory", None, "The directory to write: new, or without weights.", required=True)
_POLICY = flags.DEFINE_enum("policy", "trained", ["trained", "warm_start"], "Which weights of the checkpoint.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "as_trained", ["as_trained", "float32", "bfloat16", "float16"], "What the weights are stored in."
)


def main(_):
    from orchestra_jax.export import export_policy

    try:
        step = export_policy(_WORKDIR.value, _DIRECTORY.value, _POLICY.value, _DTYPE.value)
    except ValueError as error:
        print(f"export_model: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{_DIRECTORY.value}: the {_POLICY.value} policy of {_WORKDIR.value} after step {step}")


if __name__ == "__main__":
    app.run(main)
