"""The function-calling world of a run: who solves it before any training, its tokens, and what a config gets wrong."""

import asyncio
import json

import numpy as np
import pytest

from configs.quickstart_functions import get_config
from experiments import build_functions_tokenizer
from experiments.build_tokenizer import build
from orchestra_jax import chat as chat_format
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.functions.task import UserScenario
from orchestra_jax.environments.functions.user import ModelUser
from orchestra_jax.evaluation.functions import format_solved, summarize
from orchestra_jax.function_world import build_user
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.recording import Store
from orchestra_jax.types import EpisodeStatus, Message, Reason, ToolCall
from tests.experts.conftest import completion, endpoint  # noqa: F401


@pytest.fixture(scope="module")
def parts():
    return build_components(get_config())


def gold_turn(environment, instance, turn, shown, rng):
    """The golden calls, then the information: the policy that knows."""
    task = instance.task
    if turn < len(task.gold_calls):
        call = task.gold_calls[turn]
        return "", ToolCall(call.name, call.arguments)
    return "", ToolCall("tell_user", {"text": " ".join(task.communicate_info) or "done"})


def play(parts, turn, num_per_preference=60):
    instances = evaluation_instances(parts.test_tasks, parts.preferences, get_config().world, num_per_preference, 0)
    groups = demonstrate(instances, 1, parts.environment, parts.chat, parts.rollout, 0, turn)
    return instances, [group.trajectories[0] for group in groups]


def test_the_policy_that_knows_solves_all_and_the_warm_starts_clerk_few(parts):
    instances, known = play(parts, gold_turn)
    assert all(each.objectives["outcome"] == 1.0 for each in known)
    _, guessed = play(parts, parts.demonstrated_turn)
    assert all(each.status == EpisodeStatus.ANSWERED for each in guessed)
    summary = summarize(instances, guessed)
    assert 0.05 < summary["outcome"] <= 0.3
    assert summary["solved_by_difficulty"]["1"] > summary["solved_by_difficulty"]["3"]
    assert summarize(instances, known)["solved_by_difficulty"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert format_solved({"guessed": summary}).splitlines()[1].startswith("guessed")


def test_training_and_held_out_tasks_share_no_database(parts):
    domains = {task.domain for task in parts.train_tasks}, {task.domain for task in parts.test_tasks}
    assert len(domains[0]) == len(domains[1]) == 8 and not domains[0] & domains[1]
    assert {len(task.gold_calls) for task in parts.test_tasks} == {1, 2, 3}


def test_what_the_policy_reads_and_writes_is_short(parts):
    config = get_config()
    _, trajectories = play(parts, gold_turn)
    most_prompt = max(each.num_prompt_tokens for each in trajectories)
    assert most_prompt - 1 <= max(config.grpo.prefix_buckets)
    assert max(len(each.tokens) for each in trajectories) < config.episode.max_tokens
    assert np.mean([each.num_completion_tokens for each in trajectories]) <= max(config.grpo.completion_buckets)


@pytest.mark.parametrize("unit", [*build_functions_tokenizer.NUMBERS, *build_functions_tokenizer.WORDS])
def test_numbers_and_words_are_one_token_wherever_they_stand(parts, unit):
    encode = lambda text: parts.chat.content_encoder.encode(text).ids  # noqa: E731
    (token,) = encode(unit)
    assert encode(f"lend {unit}\n")[2:] == [token, *encode("\n")]


def test_a_call_is_an_opening_its_numbers_and_an_end(parts):
    call = ToolCall("lend", {"book_id": "B12", "member_id": "M7"})
    tokens = chat_format.encode_turn(parts.chat, "", [call])
    assert len(tokens) == 8  # tag, opening, B12, joint, M7, end, tag, end of turn
    (read,) = chat_format.parse_turn(parts.chat, tokens).calls
    assert read == call


def test_the_committed_tokenizer_is_what_the_script_makes():
    path = get_config().prompt.tokenizer_directory + "/tokenizer.json"
    made = build([" "], build_functions_tokenizer.UNITS, build_functions_tokenizer.PATTERN)
    assert open(path, encoding="utf-8").read() == made


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("domain", "bank", r"functions.domain 'bank' is not one of \['courier', 'library'\]"),
        ("domain", "courier", "functions.has_short_wishes is for the library"),
        ("preferences", ("cheap", "rude"), r"functions.preferences \['rude'\] must be some of"),
        ("preferences", (), "must be some of"),
        ("num_databases", 0, "functions.num_databases 0 must lie in 1 to 999"),
        ("difficulties", (0, 1), r"functions.difficulties \(0, 1\) must be 1 or more each"),
        ("num_spare_calls", -1, "functions.num_spare_calls -1 0 or more"),
        ("num_tasks", 4_000, "enlarge its database"),
    ],
)
def test_a_mistake_is_named(field, value, told):
    config = get_config()
    setattr(config.functions, field, value)
    if field == "num_tasks":
        config.functions.difficulties, config.functions.num_databases = (1,), 1
        config.functions.num_people, config.functions.num_things = 4, 8
    with pytest.raises(ValueError, match=told):
        build_components(config)
    config.environment = "chess"
    with pytest.raises(ValueError, match="environment 'chess' is not one of"):
        build_components(config)


def test_whole_tasks_with_experts_and_a_user_that_a_model_plays():
    config = RunConfig(environment="functions")
    config.prompt.rendering = "qwen3"
    config.functions.domain, config.functions.has_experts = "courier", True
    config.functions.num_databases, config.functions.num_tasks, config.functions.num_test_tasks = 1, 12, 6
    config.functions.user_endpoint, config.functions.user_model = "http://127.0.0.1:9/v1", "m"
    parts = build_components(config)
    assert "call_expert" in parts.environment.toolbox.names
    assert {len(task.gold_calls) for task in parts.train_tasks} == {1, 2, 3, 4, 5, 6}
    user = build_user(config.functions, Account())
    assert isinstance(user, ModelUser)


def test_faults_and_limits_are_those_of_the_functions_too(tmp_path):
    config = get_config()
    config.functions.num_databases, config.functions.num_tasks, config.functions.num_test_tasks = 1, 6, 6
    (tmp_path / "limits.json").write_text(json.dumps({"tell_user": {"timeout_s": 20, "max_attempts": 2}}))
    config.tools.limits_path, config.faults.busy_rate = str(tmp_path / "limits.json"), 1.0
    parts = build_components(config)
    trajectory = play_one(parts, config, ToolCall("tell_user", {"text": "hello"}))
    receipt = trajectory.receipts[1]
    assert (receipt.tool, receipt.reason, receipt.attempt) == ("tell_user", Reason.RATE_LIMITED, 2)
    config.tools.limits_path = ""
    config.tools.mcp_path = "servers.json"
    with pytest.raises(ValueError, match="tools.mcp_path 'servers.json' is without effect"):
        build_components(config)


def play_one(parts, config, call):
    instances = evaluation_instances(parts.test_tasks, parts.preferences, config.world, 1, 0)[:1]
    groups = demonstrate(instances, 1, parts.environment, parts.chat, parts.rollout, 0, lambda *_: ("", call))
    return groups[0].trajectories[0]


def test_a_user_that_a_model_plays_is_recorded_and_replayed(endpoint, completion, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SOME_KEY", "k")
    endpoint.respond = lambda body: completion(f"message {len(endpoint.requests)}")
    settings = RunConfig().functions
    settings.user_endpoint, settings.user_model, settings.user_key_variable = endpoint.url, "m", "SOME_KEY"
    settings.user_usd_per_million_tokens = (1.0, 1.0)
    scenario, said = UserScenario(reason_for_call="Cakes."), [Message("assistant", "Hello?")]

    def reply(account, mode):
        user = build_user(settings, account, Store(tmp_path, mode))
        return asyncio.run(user.reply(scenario, said)).text

    account = Account(1.0)
    assert [reply(account, "record") for _ in range(2)] == ["message 1"] * 2
    assert account.spent_usd == pytest.approx(81e-6)
    monkeypatch.delenv("SOME_KEY")
    assert reply(Account(0.0), "replay") == "message 1" and len(endpoint.requests) == 1


def test_a_user_that_costs_money_has_a_price_and_a_cap(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k")
    settings = RunConfig().functions
    settings.user_endpoint, settings.user_model = "http://127.0.0.1:9/v1", "m"
    settings.user_key_variable = "SOME_KEY"
    with pytest.raises(ValueError, match=r"user_usd_per_million_tokens \(\) must be the prices of input and output"):
        build_user(settings, Account(1.0))
    settings.user_usd_per_million_tokens = (1.0, 2.0)
    with pytest.raises(ValueError, match="experts.spend_cap_usd is 0"):
        build_user(settings, Account(0.0))
    assert isinstance(build_user(settings, Account(1.0)), ModelUser)
