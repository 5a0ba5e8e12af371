"""tau2's tasks under the rollout driver, the toolkits in the interpreter that has them; skipped without one."""

import sys

import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.data.records import Instance, Preference
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.user import ScriptedUser
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.environments.tau2.server import Tau2Server
from orchestra_jax.environments.tau2.tau2_calling import Tau2Calling, read_task
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.types import EpisodeStatus, ToolCall
from tests.environments.tau2.test_tau2_replay import PYTHON, needs_tau2

SETTINGS = FunctionSettings(is_compact=False, max_calls=40)


@needs_tau2
@pytest.mark.slow
def test_gold_through_the_driver_has_reward_one_and_less_has_not():
    environment = Tau2Calling("retail", PYTHON, ScriptedUser(), SETTINGS)
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "qwen3")
    told = {task.task_id: "; ".join(task.communicate_info) or "Done." for task in environment.tasks}
    chosen = [task for task in environment.tasks if len(task.gold_calls) >= 3][:12]
    config = RolloutConfig(20_000, 400_000, 1, 1.0, 0.2, 200.0)

    def play(num_dropped):
        scripts = {}
        for task in chosen:
            calls = [ToolCall(each.name, each.arguments) for each in task.gold_calls]
            scripts[task.task_id] = [
                *calls[: len(calls) - num_dropped],
                ToolCall("tell_user", {"text": told[task.task_id]}),
            ]

        def script(session_id, turn, prompt_tokens):
            return chat_format.encode_turn(chat, "", [scripts[session_id.split("#")[0]][turn]])

        instances = [Instance(task.task_id, task, Preference("any", "Any.", {}), (), 0) for task in chosen]
        engine = ScriptedEngine(script, 0)
        return [group.trajectories for group in run_groups(instances, 2, environment, engine, chat, config, 0)]

    for trajectories in play(0):
        assert [each.objectives["outcome"] for each in trajectories] == [1.0, 1.0]  # each on a database of its own
        assert all(each.status == EpisodeStatus.ANSWERED for each in trajectories)
    assert min(each.objectives["outcome"] for trajectories in play(1) for each in trajectories) == 0.0
    environment.close()


def test_what_cannot_be_played_or_served_is_said():
    with pytest.raises(ValueError, match="'telecom' is not one of .*: it can be replayed, not played"):
        Tau2Calling("telecom", sys.executable, ScriptedUser(), SETTINGS)
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
