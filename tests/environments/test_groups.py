"""Many episodes at once: what comes back is in order, and what an engine is asked does not depend on the clock."""

import asyncio
import dataclasses

import pytest

from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.environments import groups
from orchestra_jax.environments.groups import run_groups

GROUP_SIZE = 3
WEIGHTS = {"outcome": 1.0}
INSTANCES = [
    Instance(name, Task(name, "geography", "one_hop", "", "", "search"), Preference("p", "", WEIGHTS), (), 0)
    for name in ("a", "b")
]
NUM_TURNS = {("a", 0): 3, ("a", 1): 1, ("a", 2): 2, ("b", 0): 2, ("b", 1): 3, ("b", 2): 0}


class BatchingEngine:
    """Answers all that was asked in one turn of the event loop together, and keeps a list of it."""

    def __init__(self):
        self.batches, self._pending = [], []

    async def generate(self, prompt_tokens, sampling, *, request_id, session_id):
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._answer)
        future = asyncio.get_running_loop().create_future()
        self._pending.append((session_id, future))
        return await future

    def _answer(self):
        batch, self._pending = self._pending, []
        self.batches.append([session_id for session_id, _ in batch])
        for _, future in batch:
            future.set_result(None)


@dataclasses.dataclass(frozen=True)
class Played:
    instance_id: str
    rollout_index: int


def play(monkeypatch, delay_s, fails=None):
    async def run_episode(instance, index, environment, engine, chat, config, seed, prompt_tokens):
        assert prompt_tokens == [f"prompt of {instance.instance_id}"]
        session_id = f"{instance.instance_id}{index}"
        for turn in range(NUM_TURNS[instance.instance_id, index]):
            await engine.generate((), None, request_id=f"{session_id}@{turn}", session_id=session_id)
            await asyncio.sleep(delay_s(session_id, turn))
            if (session_id, turn) == fails:
                raise RuntimeError(f"bug in {session_id}")
        return Played(instance.instance_id, index)

    encoded = []

    def encode_instance(instance, environment, chat):
        encoded.append(instance.instance_id)
        return [f"prompt of {instance.instance_id}"]

    monkeypatch.setattr(groups, "run_episode", run_episode)
    monkeypatch.setattr(groups, "encode_instance", encode_instance)
    engine = BatchingEngine()
    played = run_groups(INSTANCES, GROUP_SIZE, None, engine, None, None, 0)
    assert encoded == ["a", "b"]  # once for all rollouts
    return played, engine.batches


DELAYS = {
    "none": lambda session_id, turn: 0.0,
    "the first are slow": lambda session_id, turn: 0.02 * (session_id < "b"),
    "rising, then falling": lambda session_id, turn: 0.004 * (int(session_id[1]) if turn else 3 - int(session_id[1])),
}


@pytest.mark.parametrize("name", DELAYS)
def test_the_engine_is_asked_the_same_however_long_the_tools_take(monkeypatch, name):
    played, batches = play(monkeypatch, DELAYS[name])
    assert batches == [["a0", "a1", "a2", "b0", "b1"], ["a0", "a2", "b0", "b1"], ["a0", "b1"]]
    assert [group.instance_id for group in played] == ["a", "b"]
    assert [group.weights for group in played] == [WEIGHTS, WEIGHTS]
    assert [group.trajectories for group in played] == [
        tuple(Played(name, index) for index in range(GROUP_SIZE)) for name in ("a", "b")
    ]


@pytest.mark.parametrize("fails", [("a1", 0), ("b1", 1), ("a0", 2)])
def test_a_bug_in_one_episode_ends_all_of_them(monkeypatch, fails):
    with pytest.raises(RuntimeError, match=f"bug in {fails[0]}"):
        play(monkeypatch, DELAYS["none"], fails)


def test_no_instances_are_no_groups():
    assert run_groups([], GROUP_SIZE, None, None, None, None, 0) == []
