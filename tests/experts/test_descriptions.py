"""Descriptions of simulated experts, written by a real endpoint, from the library and from the command line."""

import asyncio
import json
import pathlib
import subprocess
import sys

import pytest

from orchestra_jax.data.questions import build_tasks
from orchestra_jax.data.records import Offer
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.descriptions import INSTRUCTION, describe
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig

OFFER = Offer("expert-1", "gpt-5", False, 0.0, 0.0, 1.0)
REPOSITORY = pathlib.Path(__file__).parents[2]


def test_the_writer_sees_tasks_replies_and_verdicts_and_no_name(endpoint, completion):
    endpoint.respond = lambda body: completion("<think>hm</think>Strong at\n sums.")
    tasks = build_tasks("train", 5, 0)

    async def go():
        writer = EndpointExpert(endpoint.url, "m")
        made = await describe(OFFER, SimulatedExperts(WorldConfig()), tasks, writer, seed=0)
        await writer.close()
        return made

    made = asyncio.run(go())
    system, user = (message["content"] for message in endpoint.requests[0][2]["messages"])
    assert system == INSTRUCTION and user.count("Task (") == made.num_tasks == 10
    assert (made.text, made.num_solved) == ("Strong at sums.", user.count("\nright")) and 0 < made.num_solved < 10
    assert "gpt-5" not in user and len(made.replies) == 11
    assert asyncio.run(go()) == made or endpoint.requests[1][2]["messages"][1]["content"] == user


def test_too_few_tasks_and_a_silent_writer_are_named(endpoint):
    experts, tasks = SimulatedExperts(WorldConfig()), build_tasks("train", 2, 0)
    with pytest.raises(ValueError, match="99 tasks are to be sampled of 16"):
        asyncio.run(describe(OFFER, experts, tasks, None, 0, 99))
    endpoint.respond = lambda body: (403, "text/plain", b"")
    with pytest.raises(ValueError, match="gave no description of gpt-5: server_error"):
        asyncio.run(describe(OFFER, experts, tasks, EndpointExpert(endpoint.url, "m"), 0, 3))


@pytest.mark.slow
def test_the_command_line_describes_every_expert(endpoint, completion, tmp_path):
    endpoint.respond = lambda body: completion("<answer>Strong at sums.</answer>")
    path, output = tmp_path / "endpoints.json", tmp_path / "descriptions.json"
    path.write_text(json.dumps({"gpt-5": {"endpoint": endpoint.url, "model": "m"}}))
    command = [sys.executable, "-m", "experiments.describe_experts", f"--endpoints={path}", f"--output={output}"]
    command.append(f"--recording_directory={tmp_path / 'store'}")
    done = subprocess.run([*command, "--writer=gpt-5", "--num_tasks=2"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written, num_requests = output.read_text(), len(endpoint.requests)
    replayed = [*command, "--writer=gpt-5", "--num_tasks=2", "--recording_mode=replay"]
    done = subprocess.run(replayed, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, output.read_text(), len(endpoint.requests)) == (0, written, num_requests), done.stderr
    assert list(json.loads(output.read_text())) == [entry.model for entry in EXPERTS]
    assert "$0.0000 spent" in done.stdout
    done = subprocess.run([*command, "--writer=gpt-6"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "the writer 'gpt-6' has no endpoint: choose one of ['gpt-5']" in done.stderr
