"""What a model that plays the user costs: on receipts of its own, in no objective of the policy, cut or not."""

import asyncio
import time

import pytest

from orchestra_jax.data.records import Budget, Instance
from orchestra_jax.environments.functions.user import ModelUser, ScriptedUser
from orchestra_jax.evaluation.report import format_trajectory
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.ledger import EXPERIMENT, USER, replay_receipts
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, EpisodeStatus, Message, Reason, ToolCall
from tests.environments.functions.test_function_calling import (
    CANCEL,
    LOOK,
    PREFERENCE,
    SCENARIO,
    TASK,
    make_environment,
    play,
    tell,
)
from tests.environments.functions.test_user_tools import Lamp
from tests.experts.conftest import completion, endpoint  # noqa: F401

PRICES = {"input_usd_per_million_tokens": 2.0, "output_usd_per_million_tokens": 8.0}
COST_USD = (70 * 2.0 + 11 * 8.0) / 1e6  # of the tests' endpoint: 70 and 11 tokens a reply
TURNS = [tell("What is your order number?"), CANCEL, LOOK, tell("Done; it is jam.")]


def bills(trajectory):
    return [receipt for receipt in trajectory.receipts if receipt.tool == USER]


def policy_receipts(trajectory):
    return [receipt for receipt in trajectory.receipts if receipt.tool not in EXPERIMENT]


def model_user(endpoint, **settings):  # noqa: F811
    return ModelUser(EndpointExpert(endpoint.url, "user-model", **PRICES, **settings))


def test_an_episode_has_the_users_bill_and_the_policys_is_that_of_a_scripted_user(endpoint, completion):  # noqa: F811
    (scripted,), _ = play(make_environment(user=ScriptedUser()), TURNS)
    answers = iter(["My order number is O1.", "Thank you, that is all.###STOP###"])
    endpoint.respond = lambda body: completion(next(answers))
    user = model_user(endpoint)
    account = user._endpoint.account = Account(1.0)
    (played,), _ = play(make_environment(user=user), TURNS)
    assert played.status == EpisodeStatus.ANSWERED and played.objectives == scripted.objectives
    assert policy_receipts(played) == list(scripted.receipts) and bills(scripted) == []
    first, second = bills(played)
    assert (first.model, first.status, first.input_tokens, first.output_tokens) == ("user-model", "ok", 70, 11)
    assert first.cost_usd == second.cost_usd == pytest.approx(COST_USD) and first.service_s > 0.0
    totals = replay_receipts(played.receipts)
    assert totals.user_cost_usd == pytest.approx(2 * COST_USD) == account.spent_usd and totals.judge_cost_usd == 0.0
    assert (totals.cost_usd, totals.latency_s) == (played.objectives["cost_usd"], played.objectives["latency_s"])
    assert totals.num_calls == len(played.calls) == 4
    shown = format_trajectory(Instance(TASK.task_id, TASK, PREFERENCE, (), seed=0), played, "")
    assert shown.count("\nuser        user-model ok, $0.000228, ") == 2


def test_failed_and_retried_replies_are_charged(endpoint, completion):  # noqa: F811
    answers = iter([(200, "application/json", b"{"), completion("")])
    endpoint.respond = lambda body: next(answers)
    (trajectory,), _ = play(make_environment(user=model_user(endpoint, max_retries=1, first_wait_s=0.01)), TURNS)
    assert trajectory.status == EpisodeStatus.TOOL_FAILURE
    (bill,) = bills(trajectory)
    assert (bill.status, bill.reason, bill.attempt, bill.is_estimated) == ("failed", Reason.UNREADABLE, 2, True)
    assert bill.cost_usd > COST_USD and bill.retry_s > 0.0  # an unreadable reply has cost its input, and was repeated


def test_a_user_whom_the_toolbox_cuts_is_charged_with_the_most(endpoint):  # noqa: F811
    endpoint.respond = lambda body: lambda handler: handler.server.release.wait(30)
    user = model_user(endpoint, max_output_tokens=100)
    user._endpoint.account = Account(1.0)
    environment = make_environment(user=user)
    environment.toolbox._timeout_s = 1.0
    (trajectory,), _ = play(environment, TURNS)
    (bill,) = bills(trajectory)
    assert trajectory.receipts[-1].reason == Reason.DEADLINE and trajectory.receipts[-1].cost_usd == 0.0
    assert (bill.status, bill.reason, bill.output_tokens) == (CallStatus.TIMEOUT, Reason.DEADLINE, 100)
    assert bill.is_estimated and bill.service_s > 0.0
    assert bill.cost_usd == pytest.approx(user._endpoint.account.spent_usd)


def test_a_slow_user_is_cut_by_no_budget_of_the_policy(endpoint, completion):  # noqa: F811
    def respond(body):
        time.sleep(0.4)
        return completion("Thank you.###STOP###")

    endpoint.respond = respond
    (trajectory,), _ = play(make_environment(user=model_user(endpoint)), [tell("Jam.")], budget=Budget(latency_s=0.3))
    assert trajectory.status == EpisodeStatus.ANSWERED
    assert bills(trajectory)[0].service_s >= 0.4 > 0.3 > trajectory.objectives["latency_s"]


def test_what_is_tried_again_is_said_once(endpoint, completion):  # noqa: F811
    answers = iter([(500, "text/plain", b""), completion("It is O1."), completion("Thank you.###STOP###")])
    endpoint.respond = lambda body: next(answers)
    environment = make_environment(user=model_user(endpoint, max_retries=0))
    limits = {"tell_user": Limits(20.0, max_attempts=2, first_wait_s=0.01)}
    environment.toolbox = Toolbox(environment.toolbox.tools, 20.0, limits)
    (trajectory,), _ = play(environment, [TURNS[0], tell("Done; it is jam.")])
    assert trajectory.status == EpisodeStatus.ANSWERED and len(bills(trajectory)) == 3
    *_, last = (body["messages"] for _, _, body in endpoint.requests)
    texts = [message["content"] for message in last]
    assert texts[-3:] == [TURNS[0].arguments["text"], "It is O1.", "Done; it is jam."]
    assert [message["role"] for message in last] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_each_reply_of_a_user_with_functions_is_charged_though_a_function_breaks(endpoint, completion):  # noqa: F811
    answers = iter(['<tool_call>{"name": "switch"}</tool_call>', "It is on."])
    endpoint.respond = lambda body: completion(next(answers, '<tool_call>{"name": "dim"}</tool_call>'))
    said, charged = [Message("assistant", "Switch it on.")], []
    asyncio.run(model_user(endpoint).reply(SCENARIO, said, Lamp(), charged.append))
    assert [receipt.tool for receipt in charged] == [USER] * 2
    environment = make_environment(user=model_user(endpoint))
    opened, environment.open = environment.open, lambda instance: broken_lamp(opened(instance))
    (trajectory,), _ = play(environment, TURNS)
    assert trajectory.receipts[-1].reason == Reason.BROKEN_FUNCTION
    assert [bill.cost_usd for bill in bills(trajectory)] == [pytest.approx(COST_USD)]


def broken_lamp(session):
    session.user_tools = Lamp(is_broken=True)
    return session


def test_a_replay_has_the_same_bill_and_pays_nobody(endpoint, completion, tmp_path):  # noqa: F811
    answers = iter(["My order number is O1.", "Thank you.###STOP###"])
    endpoint.respond = lambda body: completion(next(answers))

    def played(mode, account):
        expert = EndpointExpert(endpoint.url, "user-model", **PRICES)
        expert.account = account
        (trajectory,), _ = play(make_environment(user=ModelUser(RecordedExpert(expert, Store(tmp_path, mode)))), TURNS)
        return trajectory

    recorded, account = played("record", Account(1.0)), Account(0.0)
    replayed = played("replay", account)
    assert [bill.cost_usd for bill in bills(replayed)] == [bill.cost_usd for bill in bills(recorded)]
    assert all(bill.is_cache_hit for bill in bills(replayed)) and account.spent_usd == 0.0
    assert replay_receipts(replayed.receipts).user_cost_usd == pytest.approx(2 * COST_USD)


def test_a_policy_that_names_its_call_user_charges_nobody():
    (trajectory,), _ = play(make_environment(), [ToolCall("user", {"text": "{}"}), *TURNS])
    assert trajectory.receipts[1].tool == "user?" and bills(trajectory) == []
