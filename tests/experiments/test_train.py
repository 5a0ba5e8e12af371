"""The training command in processes of its own: exit codes, Ctrl-C, and that the committed configs are sound."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from orchestra_jax.components import check_config
from orchestra_jax.config import RunConfig
from orchestra_jax.run_directory import config_as_dict, open_run_directory

ROOT = pathlib.Path(__file__).parents[2]
# The miniature, smaller still.
OVERRIDES = (
    "--config.model=tiny",
    "--config.data.num_tasks_per_cell=2",
    "--config.data.num_test_tasks_per_cell=2",
    "--config.warm_start.num_steps=1",
    "--config.jax_engine.num_rows=16",
    "--config.jax_engine.row_buckets=(16,)",
    "--config.jax_engine.slot_buckets=()",
    "--config.grpo.num_groups=2",
    "--config.grpo.group_size=4",
    "--config.grpo.groups_per_micro_batch=2",
    "--config.grpo.num_steps=25",
    "--config.grpo.min_group_std=0.0",
    "--config.evaluation.num_per_preference=8",
    "--config.checkpoint_every=1000",
)


def command(workdir, *arguments):
    return [
        sys.executable, "-m", "experiments.train", "--config=configs/smoke.py", f"--workdir={workdir}", *arguments
    ]  # fmt: skip


def train(workdir, *arguments):
    return subprocess.run(command(workdir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def smoke_config():
    return importlib.import_module("configs.smoke").get_config()


@pytest.mark.parametrize("name", ["smoke", "quickstart"])
def test_the_committed_configs_are_sound(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert isinstance(config, RunConfig)
    check_config(config)
    assert config.grpo.num_groups % config.grpo.groups_per_micro_batch == 0


def test_a_directory_of_another_config_is_one_sentence_and_stays_as_it_is(tmp_path):
    directory = open_run_directory(tmp_path / "run", config_as_dict(smoke_config()))
    directory.write_summary({"score": 1.0})
    before = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
    result = train(directory.path, "--config.grpo.num_steps=4")
    assert result.returncode == 2 and result.stdout == ""
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("error: ") and "grpo.num_steps is 3 there, 4 here" in sentence
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_finished_run_says_so_and_a_mistake_makes_no_directory(tmp_path):
    directory = open_run_directory(tmp_path / "run", config_as_dict(smoke_config()))
    directory.write_summary({"score": 1.0})
    result = train(directory.path)
    assert (result.returncode, result.stdout) == (0, f"{directory.path} holds this run, finished\n")
    result = train(tmp_path / "new", "--config.engine=vllm")
    assert result.returncode == 2 and "engine 'vllm' is not one of ['jax', 'sglang']" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_finishes(tmp_path):
    workdir = tmp_path / "run"
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(
            command(workdir, *OVERRIDES), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, env=os.environ
        )
        try:
            deadline = time.monotonic() + 240
            while not (workdir / "metrics.jsonl").exists() and process.poll() is None:
                assert time.monotonic() < deadline, "no step within four minutes"
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            process.kill()
    told = (tmp_path / "stderr").read_text()
    assert "the same command goes on from the last save" in told and "experiments.train" in told
    assert "Traceback" not in told
    num_done = len((workdir / "metrics.jsonl").read_text().splitlines())
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 1 <= num_done < 25 and saved == [0, num_done] and not (workdir / "summary.json").exists()
    result = train(workdir, *OVERRIDES)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(25))
    assert "trained" in json.loads((workdir / "summary.json").read_text())["policies"]
    assert "score by preference" in result.stdout


@pytest.mark.slow
def test_a_sampler_that_is_not_the_trainers_stops_the_run(tmp_path):
    """Not even the embedded engine agrees to the last bit."""
    result = train(tmp_path / "run", *OVERRIDES, "--config.grpo.max_sampler_gap=0.0")
    assert result.returncode == 1 and "SamplerGapError" in result.stderr
    assert "nats on average, and grpo.max_sampler_gap is 0.0" in result.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
