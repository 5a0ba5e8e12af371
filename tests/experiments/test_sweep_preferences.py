"""The sweep's command line, in processes of its own: absl's flags are global. Training is a stand-in."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Shows what each run was given, and answers with a summary in which everything follows from the weight of the outcome.
EXPERIMENT = """
import sys
import types

from experiments import command_line, sweep_preferences


def run(config, workdir):
    print("TRAIN", (config.data.weights, config.seed, workdir))
    value = config.data.weights[0]
    entry = {"score": value, "accuracy": value / 2, "cost_usd": 0.01 * value, "latency_s": 40.0}
    optimal = {**entry, "score": 1.0, "accuracy": value}
    costs = [0.01 * value + 0.001 * number for number in range(20)]
    policies = {"trained": {"custom": entry}, "optimal": {"custom": optimal}}
    return {"policies": policies, "trained_costs_usd": {"custom": costs}}


sys.modules["orchestra_jax.training"] = types.SimpleNamespace(run=run)
command_line.run(sweep_preferences.main)
"""

CONFIG = """
import dataclasses


@dataclasses.dataclass
class Data:
    weights: tuple[float, ...] = ()


@dataclasses.dataclass
class Config:
    seed: int = 0
    data: Data = dataclasses.field(default_factory=Data)


def get_config():
    return Config()
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "out").mkdir()

    def run_experiment(*arguments):
        command = [sys.executable, "experiment.py", "--config=config.py", "--workdir=out", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run_experiment


def runs(result):
    return [ast.literal_eval(line[len("TRAIN ") :]) for line in result.stdout.splitlines() if line.startswith("TRAIN")]


def test_a_run_per_vector_then_a_table_and_the_front(sweep, tmp_path):
    result = sweep("--weights=1,0,0", "--weights=0.50,0.25,0.25", "--weights=1.0,0,0", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    assert runs(result) == [((1.0, 0.0, 0.0), 3, "out/1_0_0"), ((0.5, 0.25, 0.25), 3, "out/0.5_0.25_0.25")]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["1,0,0", "1.000", "0.500", "10.00", "40.0", "1.000", "10.00", "40.0"] in rows
    assert ["0.5,0.25,0.25", "0.500", "0.250", "5.00", "40.0", "0.500", "5.00", "40.0"] in rows
    # 20 pairs that all differ by half a cent: no sign flips of 2,000 do as well.
    assert "0.5,0.25,0.25 costs $5.000 per 1000 less than 1,0,0: p = 0.0005, 20 pairs" in result.stdout
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "tensorboard --logdir=out" in result.stdout


def test_the_default_vectors_are_preferences(sweep):
    result = sweep()
    assert result.returncode == 0, result.stderr
    weights = [weights for weights, _, _ in runs(result)]
    assert len(set(weights)) == 5
    assert all(sum(vector) == pytest.approx(1) for vector in weights)


@pytest.mark.parametrize("text", ["1,0", "0.5,0.5,x", "0.5,0.5,0.5", "1.5,-0.5,0", "nan,0,1"])
def test_what_is_no_preference_is_told_in_one_sentence_before_any_run(sweep, text):
    result = sweep("--weights=1,0,0", f"--weights={text}")
    assert result.returncode == 2 and runs(result) == []
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"error: --weights={text}: give outcome,cost,latency as three numbers from 0 to 1 with the sum 1"
    )
