"""The training pipeline: the same for the same seed, resumable at any batch, and nothing but its own tasks."""

import collections
import json

import pytest

from orchestra_jax.data.pipeline import evaluation_instances, make_training_iterator
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Task
from orchestra_jax.experts.world import WorldConfig

CONFIG = WorldConfig()
PREFERENCE_LIST = list(PREFERENCES.values())
NUM_TASKS, NUM_GROUPS = 30, 7  # batches do not divide an epoch
TASKS = tuple(
    Task(f"train/{number}", "geography", "one_hop", f"Which is {number}?", "x", "search") for number in range(NUM_TASKS)
)


def iterator(seed=0, tasks=TASKS, preferences=PREFERENCE_LIST):
    return make_training_iterator(tasks, preferences, CONFIG, NUM_GROUPS, seed)


def batches(source, num_batches):
    return [next(source) for _ in range(num_batches)]


def test_the_seed_decides_every_batch():
    assert batches(iterator(), 12) == batches(iterator(), 12)
    assert batches(iterator(), 2) != batches(iterator(seed=1), 2)


@pytest.mark.parametrize("num_before", [0, 1, 6])
def test_a_saved_state_goes_on_with_the_very_next_batch(num_before):
    whole = batches(iterator(), num_before + 8)
    first = iterator()
    batches(first, num_before)
    state = first.get_state()
    ahead = batches(first, 3)  # going on does not change a state that was taken
    second = iterator()
    second.set_state(json.loads(json.dumps(state)))  # a checkpoint keeps it as text
    assert batches(second, 8) == whole[num_before:]
    assert ahead == whole[num_before : num_before + 3]
    first.set_state(state)  # back on the same iterator
    assert next(first) == whole[num_before]


def test_every_epoch_holds_each_task_once_in_another_order_and_draws_anew():
    flat = [instance for batch in batches(iterator(), 3 * NUM_TASKS // NUM_GROUPS + 1) for instance in batch]
    epochs = [flat[number * NUM_TASKS : (number + 1) * NUM_TASKS] for number in range(3)]
    orders = [[instance.task.task_id for instance in epoch] for epoch in epochs]
    assert all(sorted(order) == sorted(task.task_id for task in TASKS) for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and orders[0] != [task.task_id for task in TASKS]
    by_task = collections.defaultdict(set)
    for instance in flat:
        by_task[instance.task.task_id].add(instance.offers)
    assert sum(len(offers) > 1 for offers in by_task.values()) == NUM_TASKS
    assert len({instance.instance_id for instance in flat}) == len(flat)


def test_nothing_but_the_given_tasks_and_preferences_comes_out():
    some, two = TASKS[:11], PREFERENCE_LIST[:2]
    flat = [instance for batch in batches(iterator(tasks=some, preferences=two), 8) for instance in batch]
    assert {instance.task.task_id for instance in flat} == {task.task_id for task in some}
    assert {instance.preference.name for instance in flat} == {preference.name for preference in two}


def test_preferences_are_drawn_evenly_and_independently_of_the_task():
    num_batches = 100
    flat = [instance for batch in batches(iterator(), num_batches) for instance in batch]
    counts = collections.Counter(instance.preference.name for instance in flat)
    expected = len(flat) / len(PREFERENCES)
    assert all(abs(counts[name] - expected) < 4 * expected**0.5 for name in PREFERENCES)
    per_task = collections.defaultdict(set)
    for instance in flat:
        per_task[instance.task.task_id].add(instance.preference.name)
    assert all(len(names) == len(PREFERENCES) for names in per_task.values())


def test_evaluation_plays_the_same_draws_under_every_preference():
    made = evaluation_instances(TASKS, PREFERENCE_LIST, CONFIG, 40, seed=9)
    assert made == evaluation_instances(TASKS, PREFERENCE_LIST, CONFIG, 40, seed=9)
    blocks = [made[number * 40 : (number + 1) * 40] for number in range(len(PREFERENCE_LIST))]
    for preference, block in zip(PREFERENCE_LIST, blocks):
        assert {instance.preference.name for instance in block} == {preference.name}
        assert [(i.task.task_id, i.offers, i.seed) for i in block] == [
            (i.task.task_id, i.offers, i.seed) for i in blocks[0]
        ]
    counts = collections.Counter(instance.task.task_id for instance in blocks[0])
    assert sorted(counts.values()) == [1] * 20 + [2] * 10  # tasks in turn
    assert len({instance.instance_id for instance in made}) == len(made)
    repeated = [i for i in blocks[0] if counts[i.task.task_id] == 2]
    assert len({(i.task.task_id, i.seed) for i in repeated}) == 20  # a task that comes again is drawn anew
    assert made != evaluation_instances(TASKS, PREFERENCE_LIST, CONFIG, 40, seed=10)
