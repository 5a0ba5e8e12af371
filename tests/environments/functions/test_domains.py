"""Every shipped task is scored right: gold 1; nothing, a call less, another argument, a word withheld 0."""

import collections

import numpy as np
import pytest

from orchestra_jax.environments.functions.database import Base
from orchestra_jax.environments.functions.domains.courier import make_courier
from orchestra_jax.environments.functions.domains.courier_tasks import generate_courier_tasks
from orchestra_jax.environments.functions.domains.library import make_library
from orchestra_jax.environments.functions.domains.library_tasks import generate_library_tasks
from orchestra_jax.environments.functions.function import FunctionRefused, run_function
from orchestra_jax.environments.functions.success import judge, run_gold

SHIPPED = {"library": (make_library, generate_library_tasks), "courier": (make_courier, generate_courier_tasks)}


def score(domain, task, gold, calls, told):
    """The outcome of a run that makes `calls`, going on behind one that is refused, and says `told`."""
    database = domain.open_database()
    for call in calls:
        try:
            run_function(domain.functions_by_name, database, call.name, call.arguments)
        except FunctionRefused:
            pass
    return judge(gold, task, database, told).outcome


def changed_arguments(task, rng):
    """The golden calls with one argument changed, for each argument: to a value that other golden calls of any task use
    for it, or to the nearest number."""
    for number, call in enumerate(task.gold_calls):
        for name, value in call.arguments.items():
            if isinstance(value, int):
                other = value - 1 if rng.random() < 0.5 and value > 1 else value + 1
            elif name.endswith("_id"):
                other = f"{value[0]}{int(value[1:]) % 4 + 1}"
            else:
                other = f"x{value}"
            changed = call.model_copy(update={"arguments": {**call.arguments, name: other}})
            if other != value:
                yield [*task.gold_calls[:number], changed, *task.gold_calls[number + 1 :]]


def check(name, num_tasks, seed):
    make, generate = SHIPPED[name]
    domain, rng = make(seed), np.random.default_rng(seed)
    tasks = generate(domain, num_tasks, seed)
    assert len({task.task_id for task in tasks}) == num_tasks
    counts = collections.Counter()
    for task in tasks:
        gold, told = run_gold(domain, task), list(task.communicate_info)
        assert score(domain, task, gold, task.gold_calls, told) == 1.0, task
        assert score(domain, task, gold, [], []) == score(domain, task, gold, [], told) == 0.0, task
        wrong = [(task.gold_calls[:k] + task.gold_calls[k + 1 :], told) for k in range(len(task.gold_calls))]
        wrong += [(task.gold_calls, told[:k] + told[k + 1 :]) for k in range(len(told))]
        wrong += [(calls, told) for calls in changed_arguments(task, rng)]
        for calls, said in wrong:
            assert score(domain, task, gold, calls, said) == 0.0, (task, calls, said)
        counts.update(call.name for call in task.gold_calls)
        assert len(task.gold_calls) == task.difficulty
    return tasks, counts


@pytest.mark.parametrize("name", SHIPPED)
def test_gold_scores_one_and_what_is_less_scores_zero(name):
    check(name, 120, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_thousand_tasks(name):
    tasks, counts = check(name, 1000, seed=0)
    assert {task.difficulty for task in tasks} == {1, 2, 3, 4, 5, 6}
    writes = {each.name for each in SHIPPED[name][0](0).functions if each.is_write}
    assert min(counts[each] for each in writes - {"drop_reservation"}) >= 50
    assert max(len(run_gold(SHIPPED[name][0](0), task).database.touched) for task in tasks) >= 6


@pytest.mark.parametrize("name", SHIPPED)
def test_the_database_is_that_of_its_seed_and_one_of_the_data_model(name):
    make, generate = SHIPPED[name]
    first, again, other = make(3), make(3), make(4)
    assert first.data == again.data != other.data
    assert generate(first, 30, 5) == generate(again, 30, 5) != generate(first, 30, 6)
    assert type(first.data).model_validate(first.data.model_dump()) == first.data
    assert isinstance(first.base, Base) and len(first.base.tables) >= 3


def test_a_domain_that_is_too_small_says_so():
    with pytest.raises(ValueError, match="different tasks of difficulties .* are wanted: enlarge its database"):
        generate_library_tasks(make_library(0, num_members=2, num_books=3, num_branches=1), 500, 0)


def test_the_books_balance():
    """In the drawn databases and behind every golden run: who holds what stands on both sides."""
    library = make_library(2)
    for task in generate_library_tasks(library, 60, 0):
        database = run_gold(library, task).database
        holders = {book.book_id: book.holder_id for book in database.books.values() if book.holder_id}
        held = {book_id: member.member_id for member in database.members.values() for book_id in member.book_ids}
        assert holders == held
    courier = make_courier(2)
    for task in generate_courier_tasks(courier, 60, 0):
        database = run_gold(courier, task).database
        weights = {parcel.parcel_id: parcel.weight_g for parcel in database.parcels.values()}
        assert all(van.load_g == sum(weights[each] for each in van.parcel_ids) for van in database.vans.values())
