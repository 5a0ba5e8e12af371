"""Measures one part of the system and prints the figures as JSON, units in their names.

    python -m experiments.benchmark --suite=logprobs
    python -m experiments.benchmark --suite=aot --option=model=qwen3-0.6b

A suite is a module with a `run(...) -> dict`; its parameters are the options.
"""

import importlib
import json

from absl import app, flags

SUITES = {
    "aot": "experiments.benchmarks.aot",
    "decode": "experiments.benchmarks.decode",
    "decode_bandwidth": "experiments.benchmarks.decode_bandwidth",
    "environments": "experiments.benchmarks.environments",
    "grpo_step": "experiments.benchmarks.grpo_step",
    "logprobs": "experiments.benchmarks.logprobs",
    "pipeline": "experiments.benchmarks.pipeline",
    "sglang": "experiments.benchmarks.sglang",
    "tools": "experiments.benchmarks.tools",
    "train_step": "experiments.benchmarks.train_step",
}
_SUITE = flags.DEFINE_enum("suite", "train_step", sorted(SUITES), "What to measure.")
_OPTIONS = flags.DEFINE_multi_string("option", [], "name=value for the suite's run(), value in JSON or a plain word.")


def parse_option(text: str) -> tuple[str, object]:
    """("model", "qwen3-8b") of "model=qwen3-8b", ("num_steps", 2) of "num_steps=2"; ValueError without a "="."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise ValueError(f"--option={text}: write name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(_):
    suite = importlib.import_module(SUITES[_SUITE.value])
    print(json.dumps(suite.run(**dict(map(parse_option, _OPTIONS.value))), indent=2))


if __name__ == "__main__":
    app.run(main)
