"""The training loop over two real servers, of which one is killed while it samples."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from orchestra_jax.generation.sglang.weight_directory import version_of, whole_version
from orchestra_jax.models.transformer import init_params
from tests.generation.sglang.real_servers import (
    ROOT,
    START_S,
    ask,
    checksums,
    label,
    served_model_config,
    wait_for,
)

pytestmark = pytest.mark.sglang


def test_the_quickstart_trains_through_a_kill(served, tmp_path):
    """Three steps; versions 0 to 3 on the server that stays, each with other weights; every rollout once, and whole.

    The other dies with requests of step 1 under way. The trainer goes on, is held behind that step until the server is
    there again, with weights that are old by then, and must bring them up to date before it asks.
    """
    steady, killed = served.urls
    asyncio.run(served.engine().update_weights(init_params(served_model_config(served.config), jax.random.key(9)), 99))
    pid, run, log = served.pid(killed), tmp_path / "run", tmp_path / "train.log"
    command = [
        sys.executable, "-m", "experiments.train", "--config=configs/smoke.py", f"--workdir={run}",
        *served.overrides, "--config.sglang.max_attempts=40", "--config.grpo.max_sampler_gap=0.001",
        "--config.grpo.min_group_std=0.0", "--config.grpo.entropy_coefficient=0.01",  # each step moves the weights
        "--config.grpo.num_groups=4", "--config.grpo.groups_per_micro_batch=4", "--config.warm_start.num_steps=5",
        "--config.evaluation.num_per_preference=4", "--config.checkpoint_every=1",
    ]  # fmt: skip
    with (
        watching(look_at, steady) as seen,
        watching(look_at, killed) as there,
        watching(kill_at_work, served, killed, "1") as deaths,
    ):
        with open(log, "wb") as output:
            trainer = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            wait_for(lambda: trainer.poll() is not None or deaths, 600.0, "kill")
            with held(trainer):  # or its next weights may be there before the successor takes the present ones
                wait_for(lambda: served.pid(killed) != pid, START_S, "successor")
            wait_for(lambda: trainer.poll() is not None or seen[-1][0] == "2", 600.0, "step after a kill")
            assert trainer.poll() is None, log.read_text()[-3000:]
            with held(trainer):
                wait_for(lambda: label(killed), START_S, "restarted server")
                assert label(killed) == "1"
                num_before = served.num_generated(killed)
            trainer.wait(600)
        finally:
            trainer.kill()
    assert trainer.returncode == 0, log.read_text()[-3000:]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [(step["sampler/gap_mean"], step["loss/sampler_gap_max"]) for step in steps]
    print(f"quickstart, gap mean and max by step: {figures}; killed with {deaths} requests under way")
    assert deaths and [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["loss/sampler_gap_max"] <= 1e-3 for step in steps)  # one update a step: same weights in both
    assert all(step["filter/failed_share"] == 0 and "episode/status/engine_failure" not in step for step in steps)
    assert [version for version, _ in seen][:5] == ["99", "0", "1", "2", "3"]
    assert len({json.dumps(sums, sort_keys=True) for _, sums in seen[1:5]}) == 4
    for step in range(3):
        lines = (run / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines()
        rollouts = [each for line in lines for each in json.loads(line)["trajectories"]]
        assert len({(each["instance_id"], each["rollout_index"]) for each in rollouts}) == len(rollouts) == 4 * 4
        for each in rollouts:
            versions = {
                v for v, is_sampled in zip(each["policy_versions"], each["loss_mask"], strict=True) if is_sampled
            }
            assert versions == {step}
    assert dict(there)["3"] == dict(seen)["3"]  # the weights of the last step; the evaluation sends its own
    assert label(killed) == label(steady) == str(version_of(whole_version(served.directory / "weights")))
    assert served.num_generated(killed) > num_before


@contextlib.contextmanager
def held(process):
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def watching(look, *arguments):
    """Calls look(found, ...) again and again in a thread of its own; `found` is a list."""
    found, stop = [], threading.Event()

    def run():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                look(found, *arguments)
            time.sleep(0.05)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def look_at(found, url):
    """(version, checksums) of each version that the server has had."""
    before, sums, after = label(url), checksums(url), label(url)
    if before == after and (not found or found[-1][0] != after):
        found.append((after, sums))


def kill_at_work(found, served, url, version):
    """Ends the server once, while it samples with the weights of `version`; finds how many requests were under way."""
    if found or label(url) != version:
        return
    running = sum(each["num_running_reqs"] for each in ask(url, "/v1/loads?include=core")["loads"])
    if running and label(url) == version:
        os.kill(served.pid(url), signal.SIGKILL)
        found.append(running)
