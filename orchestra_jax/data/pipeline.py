"""The Grain pipeline: tasks -> shuffle -> instances -> batches, without end, and resumable at any batch.

    source (tasks) -> shuffle -> repeat -> instance making (preference, offers) -> batch of P instances

The iterator's `get_state()` is what a checkpoint keeps; `set_state()` goes on with the very next batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.experts.world import WorldConfig


class _MakeInstance(grain.transforms.RandomMap):
    """Draws preference, offers, prices and latencies for a task."""

    def __init__(self, preferences: Sequence[Preference], world: WorldConfig):
        self._preferences, self._world = tuple(preferences), world

    def random_map(self, element: Task, rng: np.random.Generator) -> Instance:
        preference = self._preferences[int(rng.integers(len(self._preferences)))]
        return make_instance(element, preference, self._world, int(rng.integers(2**31)), self._world.training_pool)


def make_training_iterator(
    tasks: Sequence[Task], preferences: Sequence[Preference], world: WorldConfig, num_groups: int, seed: int
) -> grain.DatasetIterator:
    """Endless batches, each a list of `num_groups` instances; experts from the world's training pool, if it has one."""
    dataset = (
        grain.MapDataset.source(tasks)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_MakeInstance(preferences, world))
        .batch(num_groups, batch_fn=list)
    )
    # An instance is cheap to make: threads would make hundreds of batches ahead and hold up the first one.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_instances(
    tasks: Sequence[Task], preferences: Sequence[Preference], world: WorldConfig, num_per_preference: int, seed: int
) -> list[Instance]:
    """The same `num_per_preference` draws under every preference, tasks in turn: preference after preference.

    Experts come from the world's evaluation pool, if it has one.
    """
    order = np.random.default_rng(seed).permutation(len(tasks))
    return [
        make_instance(tasks[order[number % len(tasks)]], preference, world, seed + number, world.evaluation_pool)
        for preference in preferences
        for number in range(num_per_preference)
    ]
