"""Function-calling episodes through the rollout driver: what is shown, what ends them, what they are worth."""

import asyncio
import json

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.data.records import Budget, Instance, Offer, Preference
from orchestra_jax.environments.functions.advisers import EndpointAdviser, SimulatedAdviser
from orchestra_jax.environments.functions.domains.library import make_library
from orchestra_jax.environments.functions.domains.library_tasks import generate_library_tasks
from orchestra_jax.environments.functions.function import make_function
from orchestra_jax.environments.functions.function_calling import FunctionCalling, FunctionSettings
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario
from orchestra_jax.environments.functions.tools import CallPrice
from orchestra_jax.environments.functions.user import ModelUser, ScriptedUser
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.types import CallStatus, EpisodeStatus, Message, Reason, ToolCall
from tests.environments.functions.small_domain import make_domain
from tests.experts.conftest import completion, endpoint  # noqa: F401

NO_BUDGET = Budget()
PREFERENCE = Preference("any", "Any.", {"outcome": 1.0})
OFFER = Offer("expert-1", "gpt-5", False, 2.0, 8.0, 1.5)
SCENARIO = UserScenario(
    reason_for_call="Cancel my order and tell me what is in O2.",
    known_info="Your order number is O1.",
    facts={"order number": "O1"},
    unknown=("password",),
)
GOLD = (
    GoldCall(name="get_order", arguments={"order_id": "O2"}),
    GoldCall(name="cancel_order", arguments={"order_id": "O1"}),
)
TASK = FunctionTask(task_id="t1", domain="shop", scenario=SCENARIO, gold_calls=GOLD, communicate_info=("jam",))


def tell(text):
    return ToolCall("tell_user", {"text": text})


LOOK, CANCEL = (ToolCall(call.name, call.arguments) for call in GOLD)


def make_environment(domain=None, user=None, advisers=None, is_compact=False, max_calls=8):
    domain = domain or make_domain()
    settings = FunctionSettings(is_compact, max_calls, num_spare_calls=2, price=CallPrice(0.001, 2.0))
    return FunctionCalling({domain.name: domain}, user or ScriptedUser(), settings, advisers)


def play(environment, turns, task=TASK, rendering="qwen3", group_size=1, budget=NO_BUDGET, own_usd=0.2):
    """The trajectories of a group whose episodes all make these calls, turn by turn."""
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, rendering)
    scripts = [chat_format.encode_turn(chat, "", [turn]) for turn in turns]
    engine = ScriptedEngine(lambda session_id, turn, prompt_tokens: scripts[turn], 0)
    config = RolloutConfig(2000, 20_000, 1, 1.0, own_usd, 200.0)
    instance = Instance(task.task_id, task, PREFERENCE, (OFFER,), seed=0, budget=budget)
    (group,) = run_groups([instance], group_size, environment, engine, chat, config, seed=0)
    return group.trajectories, chat


@pytest.mark.parametrize(
    ("turns", "outcome"),
    [
        ([LOOK, CANCEL, tell("In O2 is jam.")], 1.0),
        ([tell("What is your order number?"), CANCEL, LOOK, tell("Jam.")], 1.0),
        ([LOOK, CANCEL, tell("All is done.")], 0.0),
        ([CANCEL, tell("In O2 is jam.")], 0.0),
        ([LOOK, tell("In O2 is jam.")], 0.0),
    ],
)
def test_an_episode_is_worth_what_it_left(turns, outcome):
    (trajectory,), _ = play(make_environment(), turns)
    assert trajectory.status == EpisodeStatus.ANSWERED
    assert trajectory.objectives["outcome"] == outcome


def test_the_rollouts_of_a_group_do_not_share_a_database():
    trajectories, _ = play(make_environment(), [CANCEL, LOOK, tell("jam")], group_size=3)
    assert [each.objectives["outcome"] for each in trajectories] == [1.0] * 3
    assert all(each.calls[0].status == CallStatus.OK and each.calls[0].result_text == "done" for each in trajectories)


def test_calls_cost_what_they_cost():
    (trajectory,), _ = play(make_environment(), [LOOK, CANCEL, tell("jam")])
    functions = [each for each in trajectory.receipts if each.tool in ("get_order", "cancel_order")]
    assert [(each.cost_usd, each.service_s) for each in functions] == [(0.001, 2.0)] * 2
    assert trajectory.objectives["calls/get_order"] == 1.0


def test_a_budget_is_told_and_what_cannot_be_paid_is_refused():
    """A function costs $.001 and 2 s, advice $.00168 and 1.5 s."""
    ask = ToolCall("call_expert", {"expert": "expert-1"})
    environment = make_environment(advisers=lambda model: SimulatedAdviser({"gpt-5": 1.0}))
    (trajectory,), chat = play(
        environment, [LOOK, ask, CANCEL, tell("jam")], budget=Budget(cost_usd=0.0025), own_usd=0.0
    )
    told = chat_format.decode(chat, trajectory.tokens[: trajectory.num_prompt_tokens])
    assert "budget $0.0025" in told
    assert [call.status for call in trajectory.calls] == ["ok", "refused", "ok", "ok"]
    reasons = [each.reason for each in trajectory.receipts if each.tool != "orchestrator"]
    assert reasons == ["", Reason.OVER_BUDGET, "", ""]
    assert "this can cost $0.0017" in trajectory.calls[1].result_text
    (late,), _ = play(environment, [LOOK, LOOK, tell("jam")], budget=Budget(latency_s=4.0))
    assert [call.status for call in late.calls[:2]] == ["ok", "refused"]
    assert "this takes 2 s" in late.calls[1].result_text


def test_the_user_answers_in_the_conversation():
    turns = [tell("What is your order number?"), tell("And your password?"), CANCEL, LOOK, tell("jam")]
    (trajectory,), chat = play(make_environment(), turns)
    assert trajectory.calls[0].result_text == "My order number is O1."
    assert trajectory.calls[1].result_text == "I do not know my password."
    assert "My order number is O1." in chat_format.decode(chat, trajectory.tokens)


def test_an_episode_that_the_user_did_not_end_is_worth_nothing():
    (trajectory,), _ = play(make_environment(max_calls=3), [LOOK, CANCEL, tell("Is it jam?")])
    assert trajectory.status == EpisodeStatus.TURN_LIMIT and trajectory.objectives["outcome"] == 0.0
    assert trajectory.objectives["database_equal"] == trajectory.objectives["information_told"] == 1.0


def test_calls_beyond_those_of_the_task_are_refused():
    (trajectory,), _ = play(make_environment(max_calls=8), [LOOK] * 4 + [CANCEL, LOOK, CANCEL, tell("jam")])
    statuses = [record.status for record in trajectory.calls]
    assert statuses == [CallStatus.OK] * 5 + [CallStatus.REFUSED] * 3  # two golden calls, one to tell, two to spare
    assert trajectory.calls[-1].result_text == "all 5 calls are spent" and trajectory.objectives["outcome"] == 0.0


def test_what_a_function_refuses_is_read_and_what_breaks_it_ends_the_episode():
    def explode(database):
        """Break."""
        raise ZeroDivisionError("boom")

    domain = make_domain(explode)
    turns = [ToolCall("get_order", {"order_id": "O9"}), ToolCall("explode", {})]
    (trajectory,), chat = play(make_environment(domain), turns)
    assert trajectory.calls[0].result_text == "refused: there is no order O9"
    assert trajectory.status == EpisodeStatus.TOOL_FAILURE
    assert trajectory.calls[1].result_text == "explode raised ZeroDivisionError: boom"
    assert trajectory.receipts[-1].reason == "broken_function"


def test_the_prompt_holds_rules_wish_preference_and_calls():
    environment = make_environment(advisers=lambda model: SimulatedAdviser({"gpt-5": 1.0}))
    instance = Instance("t1", TASK, PREFERENCE, (OFFER,), seed=0)
    (system, user), schemas = environment.prompt(instance)
    assert system.content.startswith("Be brief.") and "expert" in system.content
    assert user.content.splitlines()[:3] == [SCENARIO.reason_for_call, "Any.", "calls 5"] and "expert-1" in user.content
    names = [schema["function"]["name"] for schema in schemas]
    assert names == ["get_order", "cancel_order", "add_note", "tell_user", "call_expert"]
    (short,), none = make_environment(is_compact=True).prompt(instance)
    assert short.content.endswith("calls 5") and not none


def test_an_expert_advises_at_the_price_of_its_offer():
    ask = ToolCall("call_expert", {"expert": "expert-1"})
    right = make_environment(advisers=lambda model: SimulatedAdviser({"gpt-5": 1.0}))
    (trajectory,), _ = play(right, [ask, LOOK, CANCEL, ask, tell("jam")])
    assert trajectory.calls[0].result_text == 'get_order {"order_id": "O2"}'
    assert trajectory.calls[3].result_text == "tell_user jam" and trajectory.objectives["outcome"] == 1.0
    receipt = next(each for each in trajectory.receipts if each.tool == "call_expert")
    assert receipt.cost_usd == pytest.approx((600 * 2 + 60 * 8) / 1e6) and receipt.service_s == 1.5
    wrong = make_environment(advisers=lambda model: SimulatedAdviser({"gpt-5": 0.0}))
    (trajectory,), _ = play(wrong, [ask, ToolCall("call_expert", {"expert": "expert-9"}), tell("bye")])
    assert trajectory.calls[0].result_text in ("cancel_order", "add_note")
    assert trajectory.calls[1].status == CallStatus.REFUSED


def test_library_tasks_are_solved_through_the_driver():
    library = make_library(0)
    for task in generate_library_tasks(library, 12, 0):
        turns = [ToolCall(call.name, call.arguments) for call in task.gold_calls]
        told = "; ".join(task.communicate_info) or "done"
        (trajectory,), _ = play(make_environment(library), [*turns, tell(told)], task)
        assert trajectory.objectives["outcome"] == 1.0, task


def test_domains_of_one_environment_have_the_same_functions():
    add = make_function(say_nothing, is_write=False)
    domains = {"a": make_domain(), "b": make_domain()}
    FunctionCalling(domains, ScriptedUser(), FunctionSettings(False, 5))
    domains["b"].functions.append(add)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] must be one or more with the same functions"):
        FunctionCalling(domains, ScriptedUser(), FunctionSettings(False, 5))


def say_nothing(database) -> str:
    """Say nothing."""
    return ""


def test_a_task_of_another_domain_is_refused():
    stray = TASK.model_copy(update={"domain": "bank"})
    with pytest.raises(ValueError, match=r"t1 is no task of the domains \['shop'\]"):
        play(make_environment(), [LOOK], stray)


def test_a_model_plays_the_user(endpoint, completion):  # noqa: F811
    answers = iter(["It is O1.", "<think>done</think>Great. ###STOP###"])
    endpoint.respond = lambda body: completion(next(answers))
    user = ModelUser(EndpointExpert(endpoint.url, "user-model", timeout_s=120))
    turns = [tell("What is your order number?"), CANCEL, LOOK, tell("Done; it is jam.")]
    (trajectory,), _ = play(make_environment(user=user), turns)
    assert trajectory.objectives["outcome"] == 1.0 and trajectory.calls[0].result_text == "It is O1."
    first, second = (body["messages"] for _, _, body in endpoint.requests)
    assert "<scenario>" in first[0]["content"] and "What you know: Your order number is O1." in first[0]["content"]
    assert [each["role"] for each in second] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert second[-1]["content"] == "Done; it is jam." and second[2]["content"] == SCENARIO.reason_for_call


def test_a_user_whose_endpoint_breaks_is_a_failure_of_infrastructure(endpoint, completion):  # noqa: F811
    endpoint.respond = lambda body: (500, "text/plain", b"no")
    user = ModelUser(EndpointExpert(endpoint.url, "user-model", timeout_s=120, max_retries=0))
    (trajectory,), _ = play(make_environment(user=user), [tell("Hello?")])
    assert trajectory.status == EpisodeStatus.TOOL_FAILURE
    assert trajectory.receipts[-1].reason == "server_error"


def test_an_adviser_behind_an_endpoint_sees_rules_functions_and_transcript(endpoint, completion):  # noqa: F811
    endpoint.respond = lambda body: completion("Cancel O1 now.")
    adviser = EndpointAdviser(EndpointExpert(endpoint.url, "m", timeout_s=120))
    turns = [LOOK, ToolCall("call_expert", {"expert": "expert-1"}), tell("bye")]
    (trajectory,), _ = play(make_environment(advisers=lambda model: adviser), turns)
    assert trajectory.calls[1].result_text == "Cancel O1 now."
    receipt = next(each for each in trajectory.receipts if each.tool == "call_expert")
    assert (receipt.input_tokens, receipt.output_tokens) == (70, 11)
    system, user = (each["content"] for each in endpoint.requests[0][2]["messages"])
    assert "Be brief." in system and json.dumps("cancel_order") in system
    assert user.startswith(f"User: {SCENARIO.reason_for_call}") and 'Call: get_order {"order_id": "O2"}' in user


def test_a_sampled_turn_of_nonsense_is_harmless():
    """Whatever JSON a policy writes into a call: the episode goes on or ends, and nothing raises."""
    rng = np.random.default_rng(0)
    values = ["O1", 1, None, [], {}, True, -1e9, "x" * 300]
    for _ in range(20):
        turns = [
            ToolCall(
                str(rng.choice(["get_order", "add_note", "tell_user", "fly"])), {"order_id": values[rng.integers(8)]}
            )
            for _ in range(6)
        ]
        (trajectory,), _ = play(make_environment(max_calls=6), turns)
        assert trajectory.status == EpisodeStatus.TURN_LIMIT and trajectory.objectives["outcome"] == 0.0


def test_the_scripted_user():
    def say(text, *earlier):
        said = [Message("user", SCENARIO.reason_for_call), *earlier, Message("assistant", text)]
        return asyncio.run(ScriptedUser().reply(SCENARIO, said))

    assert say("Your order is cancelled.").signal == "###STOP###"
    assert say("I will transfer you to a human agent.").signal == "###TRANSFER###"
    assert say("What is your order number, and your password?").text == (
        "My order number is O1. I do not know my password."
    )
    assert say("I will cancel O1. Shall I proceed?").text == "Yes, please."
    shrug = say("Which colour?")
    assert shrug.text == f"{SCENARIO.reason_for_call} {SCENARIO.known_info}" and not shrug.signal
    assert say("Which size?", Message("assistant", "Which colour?"), Message("user", shrug.text)).signal == (
        "###OUT-OF-SCOPE###"
    )
