"""The Grain pipeline: tasks -> shuffle -> instances -> batches, without end, and resumable at any batch.

    source (tasks) -> shuffle -> repeat -> instance making (preference, offers) -> batch of P instances

The iterator's `get_state()` is what a checkpoint keeps; `set_state()` goes on with the very next batch.
`make_training_iterator` is the default world's. `InstanceStream` mixes any sources by weight, gives each host its share
of a batch, may use worker processes, and tokenises the prompts:

    each source -> shuffle -> repeat -> instance making -> mixture by weight -> every N-th for this host -> batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import grain
import numpy as np
from absl import flags

from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.seeds import derive_seed

# An instance is cheap to make: threads would make hundreds of batches ahead and hold up the first one.
_NOTHING_AHEAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class DrawInstance:
    """Draws preference, offers, prices and latencies for a task: a `Part.make`, the same for the same seed."""

    preferences: tuple[Preference, ...]
    world: WorldConfig

    def __call__(self, task: Task, seed: int) -> Instance:
        return self.draw(task, np.random.default_rng(seed))

    def draw(self, task: Task, rng: np.random.Generator) -> Instance:
        preference = self.preferences[int(rng.integers(len(self.preferences)))]
        return make_instance(task, preference, self.world, int(rng.integers(2**31)), self.world.training_pool)


class _MakeInstance(grain.transforms.RandomMap):
    def __init__(self, make: DrawInstance):
        self._make = make

    def random_map(self, element: Task, rng: np.random.Generator) -> Instance:
        return self._make.draw(element, rng)


def make_training_iterator(
    tasks: Sequence[Task], preferences: Sequence[Preference], world: WorldConfig, num_groups: int, seed: int
) -> grain.DatasetIterator:
    """Endless batches, each a list of `num_groups` instances; experts from the world's training pool, if it has one."""
    dataset = (
        grain.MapDataset.source(tasks)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_MakeInstance(DrawInstance(tuple(preferences), world)))
        .batch(num_groups, batch_fn=list)
    )
    return iter(dataset.to_iter_dataset(_NOTHING_AHEAD))


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


@dataclasses.dataclass(frozen=True)
class Part:
    """One ingredient of a mixture.

    `source` gives elements by number (data/sources, or any sequence). `make(element, seed)` is the instance of an
    element; it draws its tools, prices and preference from the seed and from nothing else. With worker processes both
    must be picklable. `weight`: its share of the instances, against the other parts' weights.
    """

    name: str
    source: Sequence
    make: Callable[[object, int], object]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of each batch this host makes; all hosts together make the batch of one host alone."""

    host_index: int = 0
    num_hosts: int = 1


@dataclasses.dataclass(frozen=True)
class PromptedInstance:
    """An instance with the tokens of its prompt."""

    instance: object
    prompt_tokens: list[int]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an instance comes from: the part, and the element's place in the part's stream and in its source."""

    part: Part

    def __call__(self, index: int, number: int) -> tuple[Part, int, int]:
        return self.part, index, number


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """The seed of an instance depends on the stream's seed, the part and the place in the part's stream alone.

    One kind of work after the other over the whole batch: in turns for each instance, they cost nearly twice as much.
    """

    seed: int
    encode: Callable[[object], list[int]] | None

    def __call__(self, places: Sequence[tuple[Part, int, int]]) -> list:
        elements = [part.source[number] for part, _, number in places]
        seeds = [derive_seed(self.seed, part.name, index) for part, index, _ in places]
        instances = [place[0].make(element, seed) for place, element, seed in zip(places, elements, seeds)]
        if self.encode is None:
            return instances
        return [PromptedInstance(instance, self.encode(instance)) for instance in instances]


class InstanceStream:
    """Endless batches of a mixture: the same seed and step give the same batch, whatever the number of workers.

    Args:
      parts: what is mixed; their names differ.
      num_per_batch: instances of a batch, over all hosts.
      seed: of order and draws. Every epoch of a part has an order of its own.
      shard: this host's; its batch is every `num_hosts`-th instance.
      num_workers: processes that make batches ahead; 0 makes them here.
      encode: makes the tokens of an instance's prompt; the batches then hold `PromptedInstance`s.

    Raises:
      ValueError: no part, an empty one, a weight that is not positive, names that repeat, a batch that the hosts do not
        divide, or a host that is not among them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        num_per_batch: int,
        seed: int,
        shard: Shard = Shard(),
        num_workers: int = 0,
        encode: Callable[[object], list[int]] | None = None,
    ):
        _check_parts(parts)
        if not 0 <= shard.host_index < shard.num_hosts or num_per_batch < 1 or num_per_batch % shard.num_hosts:
            raise ValueError(
                f"num_per_batch {num_per_batch} must be a positive multiple of num_hosts {shard.num_hosts}, and "
                f"host_index {shard.host_index} below it"
            )
        streams = [
            grain.MapDataset.range(len(part.source))
            .seed(derive_seed(seed, part.name) % 2**31)
            .shuffle()
            .repeat()
            .map_with_index(_Place(part))
            for part in parts
        ]
        mixed = grain.MapDataset.mix(streams, [part.weight for part in parts]) if len(parts) > 1 else streams[0]
        self._batches = mixed[shard.host_index :: shard.num_hosts].batch(
            num_per_batch // shard.num_hosts, batch_fn=_MakeBatch(seed, encode)
        )
        # What a state must agree on to mean the same batches. The number of workers is not among it.
        self._identity = [seed, num_per_batch, *([part.name, len(part.source), part.weight] for part in parts)]
        self._num_workers, self._next_batch = num_workers, 0
        self._iterator = None

    def __iter__(self) -> InstanceStream:
        return self

    def __next__(self) -> list:
        if self._iterator is None:
            self._iterator = iter(self._dataset())
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, object]:
        """What a checkpoint keeps: JSON, and the same for every number of workers and every host."""
        return {"next_batch": self._next_batch, "identity": self._identity}

    def set_state(self, state: dict[str, object]) -> None:
        """Goes on with the batch that was next. ValueError for the state of another stream."""
        if list(state["identity"]) != self._identity:
            raise ValueError(
                f"the saved stream was {state['identity']} and this one is {self._identity} (seed, batch, parts): give "
                "it the same data, or start a run of its own"
            )
        self._next_batch, self._iterator = int(state["next_batch"]), None

    def _dataset(self) -> grain.IterDataset:
        dataset = self._batches[self._next_batch :].to_iter_dataset(_NOTHING_AHEAD)
        if self._num_workers == 0:
            return dataset
        if not flags.FLAGS.is_parsed():  # Grain's workers read flags, which a notebook or a test has not parsed
            flags.FLAGS.mark_as_parsed()
        return dataset.mp_prefetch(grain.MultiprocessingOptions(self._num_workers))


def _check_parts(parts: Sequence[Part]) -> None:
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise ValueError(f"a mixture has one part at least, and no two of one name; these are named {names}")
    for part in parts:
        if not (part.weight > 0 and math.isfinite(part.weight)) or not len(part.source):
            raise ValueError(
                f"the part {part.name!r} has the weight {part.weight} and {len(part.source)} elements: both must be "
                "positive, or leave it out"
            )
