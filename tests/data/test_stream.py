"""InstanceStream: the same seed and step give the same batch, for any number of hosts and workers and any resume."""

import collections
import dataclasses
import functools
import json

import pytest

from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, encode_prompt, load_chat
from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.pipeline import InstanceStream, Part, PromptedInstance, Shard
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Task
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.types import Message

NUM_PER_BATCH = 6
NUMBERS, LETTERS = tuple(range(20)), tuple("abcde")


def pair(element, seed):
    return element, seed


PARTS = (Part("numbers", NUMBERS, pair, 3.0), Part("letters", LETTERS, pair, 1.0))


def batches(stream, num_batches):
    return [next(stream) for _ in range(num_batches)]


def stream(parts=PARTS, seed=0, **options):
    return InstanceStream(parts, NUM_PER_BATCH, seed, **options)


def test_parts_are_mixed_by_weight_and_each_epoch_has_its_own_order_and_draws():
    flat = [instance for batch in batches(stream(), 20) for instance in batch]  # 120: 90 numbers, 30 letters
    numbers = [element for element, _ in flat if element in NUMBERS]
    letters = [element for element, _ in flat if element in LETTERS]
    assert (len(numbers), len(letters)) == (90, 30)
    epochs = [tuple(numbers[start : start + 20]) for start in range(0, 80, 20)]
    assert all(sorted(epoch) == list(NUMBERS) for epoch in epochs) and len(set(epochs)) == 4
    assert len({seed for _, seed in flat}) == 120
    assert batches(stream(), 20) == batches(stream(), 20) != batches(stream(seed=1), 20)


def test_a_part_draws_the_same_whatever_stands_beside_it():
    mixed = [instance for batch in batches(stream(), 20) for instance in batch if instance[0] in NUMBERS]
    alone = [instance for batch in batches(stream(PARTS[:1]), 15) for instance in batch]
    assert mixed == alone


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 6])
def test_all_hosts_together_make_the_batch_of_one(num_hosts):
    whole = batches(stream(), 7)
    shards = [stream(shard=Shard(index, num_hosts)) for index in range(num_hosts)]
    for batch in whole:
        parts = [next(shard) for shard in shards]
        assert {len(part) for part in parts} == {NUM_PER_BATCH // num_hosts}
        assert [instance for row in zip(*parts) for instance in row] == batch


@pytest.mark.parametrize("num_before", [0, 1, 5])
def test_a_saved_state_goes_on_with_the_very_next_batch(num_before):
    whole = batches(stream(), num_before + 6)
    first = stream()
    batches(first, num_before)
    state = json.loads(json.dumps(first.get_state()))  # a checkpoint keeps it as text
    batches(first, 3)
    second = stream()
    second.set_state(state)
    assert batches(second, 6) == whole[num_before:]
    first.set_state(state)  # back on the same stream
    assert next(first) == whole[num_before]
    third = stream(shard=Shard(1, 2))  # another number of hosts
    third.set_state(state)
    assert next(third) == whole[num_before][1::2]


@pytest.mark.parametrize(
    "other",
    [
        stream(seed=1),
        stream(PARTS[:1]),
        stream((PARTS[0], Part("letters", "abcd", pair, 1.0))),
        InstanceStream(PARTS, 12, 0),
    ],
)
def test_the_state_of_another_stream_is_refused(other):
    with pytest.raises(ValueError, match="the saved stream was"):
        other.set_state(stream().get_state())


@pytest.mark.parametrize(
    ("parts", "options", "told"),
    [
        ((), {}, "one part at least"),
        ((PARTS[0], PARTS[0]), {}, "no two of one name"),
        ((dataclasses.replace(PARTS[0], weight=0.0),), {}, "'numbers' has the weight 0.0"),
        ((dataclasses.replace(PARTS[0], source=()),), {}, "0 elements"),
        (PARTS, {"shard": Shard(2, 2)}, "host_index 2 below it"),
        (PARTS, {"shard": Shard(0, 4)}, "multiple of num_hosts 4"),
    ],
)
def test_what_no_stream_can_be_made_of_is_refused(parts, options, told):
    with pytest.raises(ValueError, match=told):
        stream(parts, **options)


def make_question(task, seed):
    preferences = list(PREFERENCES.values())
    return make_instance(task, preferences[seed % len(preferences)], WorldConfig(), seed)


def encode(instance, chat):
    return encode_prompt(chat, [Message("user", f"{instance.task.question}\n{instance.preference.text}")], [])


def test_prompts_are_tokenised_and_offers_and_prices_drawn_anew():
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
    tasks = [Task(f"t/{number}", "geography", "one_hop", f"Which is {number}?", "x", "search") for number in range(9)]
    parts = (Part("questions", tasks, make_question),)
    made = stream(parts, encode=functools.partial(encode, chat=chat))
    flat = [prompted for batch in batches(made, 6) for prompted in batch]
    assert all(isinstance(each, PromptedInstance) for each in flat)
    assert all(each.prompt_tokens == encode(each.instance, chat) for each in flat)
    by_task = collections.defaultdict(set)
    for each in flat:
        by_task[each.instance.task.task_id].add(each.instance.offers)
    assert len(by_task) == 9 and all(len(offers) > 1 for offers in by_task.values())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_make_the_same_batches(num_workers):
    whole = batches(stream(), 7)
    assert batches(stream(num_workers=num_workers), 4) == whole[:4]
    resumed = stream(num_workers=num_workers)
    before = stream()
    batches(before, 3)
    resumed.set_state(before.get_state())
    assert batches(resumed, 4) == whole[3:]
