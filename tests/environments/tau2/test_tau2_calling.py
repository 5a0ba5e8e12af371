"""tau2's tasks under the rollout driver, the toolkits in the interpreter that has them; skipped without one."""

import sys

import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.data.records import Instance, Preference
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.user import ModelUser, ScriptedUser
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.environments.tau2.server import Tau2Server
from orchestra_jax.environments.tau2.tau2_calling import Tau2Calling, read_task
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tau2_world import golden_turn
from orchestra_jax.types import EpisodeStatus, ToolCall
from tests.environments.tau2.test_tau2_replay import PYTHON, needs_tau2
from tests.experts.conftest import completion, endpoint  # noqa: F401

SETTINGS = FunctionSettings(is_compact=False, max_calls=40)


@needs_tau2
@pytest.mark.slow
@pytest.mark.parametrize("domain", ["retail", "telecom"])
def test_gold_through_the_driver_has_reward_one_and_less_has_not(domain):
    environment = Tau2Calling(domain, PYTHON, ScriptedUser(), SETTINGS)
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "qwen3")
    chosen = [task for task in environment.tasks if len(task.gold_calls) >= 3][:12]
    config = RolloutConfig(20_000, 400_000, 1, 1.0, 0.2, 200.0)

    instances = [Instance(task.task_id, task, Preference("any", "Any.", {}), (), 0) for task in chosen]

    def play(num_dropped):
        scripts = {}
        for each in instances:
            num_calls = len(each.task.gold_calls)
            turns = [golden_turn(environment, each, turn, None, None)[1] for turn in range(num_calls + 1)]
            scripts[each.instance_id] = turns[: num_calls - num_dropped] + turns[num_calls:]

        def script(session_id, turn, prompt_tokens):
            return chat_format.encode_turn(chat, "", [scripts[session_id.split("#")[0]][turn]])

        engine = ScriptedEngine(script, 0)
        return [group.trajectories for group in run_groups(instances, 2, environment, engine, chat, config, 0)]

    for trajectories in play(0):
        assert [each.objectives["outcome"] for each in trajectories] == [1.0, 1.0]  # each on a database of its own
        assert all(each.status == EpisodeStatus.ANSWERED for each in trajectories)
    assert min(each.objectives["outcome"] for trajectories in play(1) for each in trajectories) == 0.0
    environment.close()


@needs_tau2
@pytest.mark.slow
def test_a_model_plays_the_user_of_telecom_on_the_users_phone(endpoint, completion):  # noqa: F811
    answers = iter(
        [
            '<tool_call>{"name": "check_status_bar", "arguments": {}}</tool_call>',
            "It has no service.",
            '<tool_call>{"name": "toggle_airplane_mode", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "toggle_data", "arguments": {}}</tool_call>',
            "It works. ###STOP###",
        ]
    )
    endpoint.respond = lambda body: completion(next(answers))
    user = ModelUser(EndpointExpert(endpoint.url, "user-model", timeout_s=120))
    environment = Tau2Calling("telecom", PYTHON, user, SETTINGS)
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "qwen3")
    toggles = ["toggle_airplane_mode", "toggle_data"]
    task = next(each for each in environment.tasks if [call.name for call in each.gold_calls] == toggles)
    texts = ["What does your status bar show?", "Turn airplane mode off and mobile data on."]

    def script(session_id, turn, prompt_tokens):
        return chat_format.encode_turn(chat, "", [ToolCall("tell_user", {"text": texts[turn]})])

    instance = Instance(task.task_id, task, Preference("any", "Any.", {}), (), 0)
    config = RolloutConfig(20_000, 400_000, 1, 1.0, 0.2, 200.0)
    (group,) = run_groups([instance], 1, environment, ScriptedEngine(script, 0), chat, config, 0)
    (trajectory,) = group.trajectories
    assert trajectory.objectives["outcome"] == 1.0 and trajectory.calls[0].result_text == "It has no service."
    last = endpoint.requests[-1][2]["messages"]
    assert '"check_status_bar"' in last[0]["content"]
    looked = next(number for number, each in enumerate(last) if "check_status_bar" in each["content"] and number)
    assert "Airplane Mode" in last[looked + 1]["content"]  # its own screen, which it alone sees
    environment.close()


def test_what_cannot_be_served_is_said():
    with pytest.raises(ValueError, match="the interpreter '/no/python' of tau2's retail cannot be run"):
        Tau2Server("retail", "/no/python")
    with pytest.raises(ValueError, match="does not serve tau2's chess: tau2 domain 'chess' is not one of"):
        Tau2Server("chess", sys.executable)


def test_a_task_is_read_with_its_scenario_and_gold():
    raw = {
        "id": "7",
        "user_scenario": {
            "persona": None,
            "instructions": {
                "reason_for_call": "Cancel.",
                "known_info": "You are Ada.",
                "unknown_info": None,
                "domain": "retail",
            },
        },
        "evaluation_criteria": {"actions": [{"name": "f", "arguments": {"a": 1}}], "communicate_info": ["9"]},
    }
    task = read_task("retail", raw)
    assert (task.scenario.reason_for_call, task.scenario.known_info, task.scenario.unknown_info) == (
        "Cancel.",
        "You are Ada.",
        "",
    )
    assert task.gold_calls[0].arguments == {"a": 1} and task.communicate_info == ("9",)
    assert read_task("x", {**raw, "user_scenario": {"instructions": "Do it."}}).scenario.reason_for_call == "Do it."
