"""Success is three things at once; each of them fails alone."""

import pytest

from orchestra_jax.environments.functions.success import BadTask, is_told, judge, keep_sound_tasks, replay, run_gold
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario
from tests.environments.functions.small_domain import make_domain


def order_call(name, order_id):
    return GoldCall(name=name, arguments={"order_id": order_id})


READ, CANCEL = order_call("get_order", "O2"), order_call("cancel_order", "O1")


def make_task(*calls, told=("jam",)):
    scenario = UserScenario(reason_for_call="Cancel O1 and say what is in O2.")
    return FunctionTask(
        task_id="t1", domain="shop", scenario=scenario, gold_calls=calls or (READ, CANCEL), communicate_info=told
    )


@pytest.mark.parametrize(
    ("calls", "text", "expected"),
    [
        ([READ, CANCEL], "It is jam.", (True, True, True)),
        ([CANCEL, READ], "JAM", (True, True, True)),  # the order is free where the outcome is the same
        ([READ], "It is jam.", (False, True, False)),
        ([CANCEL], "It is jam.", (True, True, False)),  # guessed
        ([READ, CANCEL], "It is jamboree.", (True, False, True)),
        ([READ, CANCEL, order_call("cancel_order", "O3")], "It is jam.", (False, True, True)),
        ([], "", (False, False, False)),
    ],
)
def test_the_three_parts(calls, text, expected):
    domain, task = make_domain(), make_task()
    success = judge(run_gold(domain, task), task, replay(domain, calls)[0], [text])
    assert (success.is_database_equal, success.is_information_told, success.is_all_touched) == expected
    assert success.outcome == float(all(expected))


@pytest.mark.parametrize(
    ("information", "text", "is_said"),
    [
        ("42", "It costs 42.", True),
        ("42", "It costs 142.", False),
        ("42", "It costs 42.50.", False),
        ("42", "The 42nd.", False),
        ("1200", "It costs $1,200!", True),
        ("Gate B4", "please go to gate  b4", True),
        ("-5", "(-5)", True),
        ("a.b", "axb", False),
    ],
)
def test_information_is_told_as_whole_words(information, text, is_said):
    assert is_told(information, ["Hello.", text]) == is_said


def test_a_task_whose_golden_calls_fail_is_named_and_skipped_or_refused():
    domain = make_domain()
    good, bad = make_task(), make_task(order_call("cancel_order", "O2"))
    told = r"task t1: golden call 1, cancel_order\(\{'order_id': 'O2'\}\), fails: order O2 is shipped"
    with pytest.raises(BadTask, match=told):
        keep_sound_tasks(domain, [good, bad], should_skip=False)
    sound, reasons = keep_sound_tasks(domain, [good, bad], should_skip=True)
    assert sound == [good] and len(reasons) == 1 and "O2 is shipped" in reasons[0]
