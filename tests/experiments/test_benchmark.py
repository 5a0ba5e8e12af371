"""The dispatcher of the benchmarks, and the step compiled ahead of time for simulated devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run_suite(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)


def test_options_are_values_by_name():
    from experiments.benchmark import parse_option

    assert parse_option("num_steps=2") == ("num_steps", 2)
    assert parse_option("model=qwen3-8b") == ("model", "qwen3-8b")
    with pytest.raises(ValueError, match="--option=fsdp: write name=value"):
        parse_option("fsdp")


@pytest.mark.slow
def test_the_8b_step_compiles_for_sixteen_devices_without_being_allocated():
    """Parameters, master copy, moments and gradients of 8.19e9 parameters, a sixteenth of them on each device."""
    result = run_suite("--suite=aot", "--option=model=qwen3-8b", "--option=num_tokens=512")
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(result.stdout)
    share = 8.19e9 / 16
    # In: bfloat16 parameters and float32 gradients; then those with a float32 master and two float32 moments.
    assert figures["gradients_argument_bytes_per_device"] == pytest.approx(share * (2 + 4), rel=0.02)
    assert figures["optimizer_argument_bytes_per_device"] == pytest.approx(share * (2 + 4 + 4 + 8), rel=0.02)
    assert figures["gradients_aliased_bytes_per_device"] == pytest.approx(share * 4, rel=0.02)
    assert figures["optimizer_aliased_bytes_per_device"] == pytest.approx(share * 14, rel=0.02)
