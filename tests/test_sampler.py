"""Who plays which step by which weights: `Sampler`, with an engine that only remembers its weights."""

import asyncio
import threading
import time

import pytest

from orchestra_jax.sampler import Sampler


class RememberingEngine:
    def __init__(self):
        self.weights, self.num_releases, self.num_forgotten = "v0", 0, 0

    async def generate(self):
        return self.weights

    async def update_weights(self, params, version):
        self.weights = params

    async def forget(self):
        self.num_forgotten += 1

    async def release_memory(self):
        self.num_releases += 1


class CountingBatches:
    """An iterator with a state, as the data pipeline's."""

    def __init__(self):
        self.next_index = 0

    def __next__(self):
        self.next_index += 1
        return [f"batch {self.next_index - 1}"]

    def get_state(self):
        return {"next_index": self.next_index}


def make_with(gate: threading.Event):
    def make(engine, draw, step, multipliers):
        instances, weights = draw(), asyncio.run(engine.generate())
        assert gate.wait(10)
        return step, weights, instances, dict(multipliers)

    return make


@pytest.fixture
def gate():
    event = threading.Event()
    event.set()
    return event


def test_in_turn_the_engine_has_the_newest_weights(gate):
    with Sampler(make_with(gate), RememberingEngine(), CountingBatches(), 0) as sampler:
        assert sampler.take(0, {}) == (0, "v0", ["batch 0"], {})
        sampler.update_weights("v1", 1)
        assert sampler.version == 1
        assert sampler.take(1, {"cost_usd": 2.0}) == (1, "v1", ["batch 1"], {"cost_usd": 2.0})
        assert sampler.data_state() == {"next_index": 2}


def test_ahead_the_caller_goes_on_and_the_data_state_is_from_before(gate):
    engine, batches = RememberingEngine(), CountingBatches()
    with Sampler(make_with(gate), engine, batches, 0) as sampler:
        sampler.take(0, {})
        gate.clear()
        multipliers = {"cost_usd": 1.0}
        sampler.begin(1, multipliers)
        multipliers["cost_usd"] = 5.0  # what the update beside it does
        while batches.next_index < 2:  # drawn beside us
            time.sleep(0.001)
        assert sampler.data_state() == {"next_index": 1}
        sampler.release_memory()
        assert engine.num_releases == 0  # it is at work
        with pytest.raises(AssertionError, match="one version"):
            sampler.update_weights("v1", 1)
        with pytest.raises(AssertionError, match="one step ahead"):
            sampler.begin(2, {})
        gate.set()
        assert sampler.take(1, multipliers) == (1, "v0", ["batch 1"], {"cost_usd": 1.0})
        sampler.update_weights("v1", 1)
        sampler.begin(2, multipliers)
        assert sampler.take(2, {}) == (2, "v1", ["batch 2"], {"cost_usd": 5.0})
        sampler.release_memory()
        assert (engine.num_releases, engine.num_forgotten) == (1, 2) and sampler.data_state() == {"next_index": 3}


def test_what_fails_ahead_is_raised_where_it_is_taken():
    def fail(*_):
        raise RuntimeError("the servers are gone")

    with Sampler(fail, RememberingEngine(), CountingBatches(), 0) as sampler:
        sampler.begin(0, {})
        with pytest.raises(RuntimeError, match="the servers are gone"):
            sampler.take(0, {})


def test_leaving_abandons_what_is_ahead_with_its_next_turn():
    turns, has_begun = [], threading.Event()

    def make(engine, draw, step, multipliers):
        while True:
            turns.append(asyncio.run(engine.generate()))
            has_begun.set()

    with pytest.raises(ZeroDivisionError), Sampler(make, RememberingEngine(), CountingBatches(), 0) as sampler:
        sampler.begin(0, {})
        assert has_begun.wait(10)
        raise ZeroDivisionError  # in the update
    num_turns = len(turns)
    time.sleep(0.05)
    assert len(turns) == num_turns
