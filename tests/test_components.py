"""The parts of a run, and what is refused before anything runs."""

import copy
import json
import math

import pytest

from orchestra_jax import components as module
from orchestra_jax.components import build_components, build_engine
from orchestra_jax.config import RunConfig
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.models.config import MODELS
from orchestra_jax.tools.budget import Account
from orchestra_jax.toolset import build_experts
from orchestra_jax.worlds import build_preferences


def small_config():
    config = RunConfig(model="tiny")
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 2
    return config


def test_the_parts_follow_the_config():
    config = small_config()
    config.episode.temperature, config.world.max_calls, config.world.orchestrator_tokens_per_s = 0.7, 2, 99.0
    parts = build_components(config)
    assert parts.model_config.vocab_size % module.VOCAB_MULTIPLE == 0
    assert 0 <= parts.model_config.vocab_size - parts.chat.vocab_size < module.VOCAB_MULTIPLE
    assert parts.model_config.hidden_size == MODELS["tiny"].hidden_size
    assert (parts.rollout.temperature, parts.rollout.orchestrator_tokens_per_s) == (0.7, 99.0)
    assert parts.environment.max_calls == 2
    assert [objective.name for objective in parts.objectives] == [
        "outcome",
        "cost_usd",
        "latency_s",
        "disallowed_calls",
    ]
    assert len(parts.train_tasks) == len(parts.test_tasks) == 2 * 8
    assert not {task.task_id for task in parts.train_tasks} & {task.task_id for task in parts.test_tasks}
    assert parts.preferences == tuple(PREFERENCES.values())


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("model", "qwen", r"model 'qwen' is not one of \[.*'quickstart'"),
        ("engine", "vllm", r"engine 'vllm' is not one of \['jax', 'sglang'\]"),
        ("prompt.rendering", "llama", r"rendering is 'llama'; choose one of .*'qwen3', 'compact'"),
        ("prompt.tokenizer_directory", "/nowhere", "no /nowhere/tokenizer.json"),
        ("data.corpus_path", "/nowhere.jsonl", "the corpus /nowhere.jsonl does not exist"),
        ("experts.endpoints_path", "/nowhere.json", "the endpoints file /nowhere.json cannot be read"),
        ("experts.descriptions_path", "/nowhere.json", "the descriptions file /nowhere.json cannot be read"),
        ("experts.spend_cap_usd", -1.0, "the spending cap of a run must be 0 dollars or more, got -1.0"),
        ("tools.isolation", "docker", r"isolation 'docker' is not one of \('strongest', 'limits'"),
        ("tools.index_directory", "/nowhere", "no whole index at /nowhere"),
        ("tools.web_provider", "altavista", r"tools.web_provider 'altavista' is not one of \['serper', 'tavily'\]"),
        ("tools.web_provider", "tavily", "costs .0.01 a call and experts.spend_cap_usd is 0"),
        ("tools.mcp_path", "/nowhere.json", "the MCP file /nowhere.json cannot be read"),
        ("tools.limits_path", "/nowhere.json", "the limits file /nowhere.json is not understood"),
        ("faults.fail_rate", 2.0, "faults.fail_rate must be within 0 and 1, got 2.0"),
        ("data.weights", (0.5, 0.5), r"data.weights \(0.5, 0.5\) must be three weights"),
        ("data.num_tasks_per_cell", 10**6, "num_per_cell=1000000, but .* ask for at most"),
        ("grpo.range_rule", "grup", r"grpo.range_rule 'grup' is not one of \['correct', 'group', 'reference'\]"),
        ("grpo.aggregation", "mean", r"grpo.aggregation 'mean' is not one of \["),
        ("grpo.optimizer.name", "sgd", r"grpo.optimizer.name 'sgd' is not one of \['adamw', 'muon'\]"),
        ("grpo.optimizer.precision", "float16", "grpo.optimizer.precision 'float16' is not one of"),
        ("mesh.data", 3, "warm_start.groups_per_micro_batch 4 must be a multiple of mesh.data x mesh.fsdp, which is 3"),
        ("mesh.context", 7, r"grpo.prefix_buckets \(64, 112\) must be multiples of mesh.context, which is 7"),
        ("mesh.tensor", 3, "mesh.tensor 3 must divide the 2 key-value heads of 'tiny'"),
        ("grpo.clip_low", 1.5, "clip_low 1.5 must lie in"),
        ("grpo.num_updates", 0, "grpo.num_updates 0 must be 1 or more"),
        ("grpo.rollout_lag", 2, "grpo.rollout_lag 2 must be 0 or 1, and grpo.max_policy_lag 4 no less"),
        ("grpo.max_resamples", -1, "grpo.max_resamples -1 must be 0 or more"),
        ("grpo.std_ddof", 2, "grpo.std_ddof 2 must be 0 or 1"),
        ("grpo.advantage_clip", 0.0, "grpo.advantage_clip 0.0 positive"),
        ("grpo.group_size", 1, "grpo.group_size 1 must be 2 or more"),
        ("checkpoint_every", 0, "checkpoint_every 0 must be 1 or more"),
        ("episode.max_tokens", 5000, "episode.max_tokens 5000 does not fit jax_engine.max_tokens 192"),
    ],
)
def test_a_mistake_in_the_config_is_one_sentence(path, value, told):
    config = small_config()
    *groups, name = path.split(".")
    holder = config
    for group in groups:
        holder = getattr(holder, group)
    setattr(holder, name, value)
    with pytest.raises(ValueError, match=told):
        build_components(config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ratio": "sequence"}, "'sequence' with grpo.num_updates 1"),
        ({"ratio": "cispo"}, "'cispo' with grpo.num_updates 1"),
        ({"range_floor_latency_s": 1.0}, 'grpo.range_floor with grpo.range_rule "reference"'),
        ({"budget_cost_usd": 0.01}, "grpo.budget with grpo.reward_form 'gated_sum'"),
        ({"reward_form": "weight_then_normalize", "range_rule": "group"}, "'weight_then_normalize', which reads none"),
        ({"std_floor": 0.1, "advantage": "rloo"}, "grpo.std_floor 0.1 with grpo.advantage 'rloo'"),
        ({"max_resamples": 1, "min_group_std": 0.0}, "grpo.max_resamples 1 with grpo.min_group_std 0"),
    ],
)
def test_a_choice_that_would_do_nothing_is_refused(fields, told):
    config = small_config()
    for name, value in fields.items():
        setattr(config.grpo, name, value)
    with pytest.raises(ValueError, match=f"without effect: .*{told}"):
        module.check_config(config)


def test_episodes_beyond_the_models_context_are_refused():
    config = small_config()
    config.episode.max_tokens = config.jax_engine.max_tokens = 5000
    with pytest.raises(ValueError, match="episode.max_tokens 5000 is beyond the 4096 of 'tiny'"):
        build_components(config)


def test_a_lag_that_cannot_be_is_refused():
    config = small_config()
    config.grpo.rollout_lag = 1
    module.check_config(config)
    for fields, told in (
        ({"max_policy_lag": 0}, "grpo.rollout_lag 1 must be 0 or 1, and grpo.max_policy_lag 0 no less"),
        ({"correction": "none"}, "grpo.rollout_lag 1 with grpo.correction 'none'"),
    ):
        changed = copy.deepcopy(config)
        vars(changed.grpo).update(fields)
        with pytest.raises(ValueError, match=told):
            module.check_config(changed)
    config.mesh.data = 2
    config.warm_start.groups_per_micro_batch = config.grpo.groups_per_micro_batch = 2
    with pytest.raises(ValueError, match="grpo.rollout_lag 1 on a mesh needs engine 'sglang'"):
        module.check_config(config)
    config.engine = "sglang"
    module.check_config(config)
    config.grpo.kl = "k1_reward"
    with pytest.raises(ValueError, match="not 'sglang' and 'k1_reward'"):
        module.check_config(config)
    config.sglang.is_colocated = True
    with pytest.raises(ValueError, match="grpo.rollout_lag 1 with sglang.is_colocated"):
        module.check_config(config)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("context_length", 100, "sglang.context_length 100 must hold episode.max_tokens 192 and be 4080 at most"),
        ("context_length", 4096, "sglang.context_length 4096 must hold"),
        ("dtype", "fp8", "sglang.dtype 'fp8' is not one of"),
        ("weight_route", "nccl", r"sglang.weight_route 'nccl' is not one of \['disk', 'tensor'\]"),
    ],
)
def test_servers_that_cannot_serve_the_run_are_refused(field, value, told):
    config = small_config()
    config.engine = "sglang"
    module.check_config(config)
    setattr(config.sglang, field, value)
    with pytest.raises(ValueError, match=told):
        module.check_config(config)


def test_weights_take_the_place_of_the_preferences():
    (preference,) = build_preferences((2.0, 1.0, 1.0))
    assert preference.weights == {"outcome": 0.5, "cost_usd": 0.25, "latency_s": 0.25, "disallowed_calls": 0.0}
    assert (preference.name, preference.text) == ("balanced", PREFERENCES["balanced"].text)
    config = small_config()
    config.data.weights = (0.0, 1.0, 0.0)
    assert [each.weights["cost_usd"] for each in build_components(config).preferences] == [1.0]


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, -0.1, 0.1), (math.nan, 1.0, 0.0), (math.inf, 1, 1)]
)
def test_what_is_no_preference_is_refused(weights):
    with pytest.raises(ValueError, match="data.weights .* must be three weights"):
        build_preferences(weights)


def test_a_corpus_of_the_user_takes_the_place_of_the_built_one(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [{"id": "a", "title": "Ada", "text": "Ada wrote it."}, {"id": "b", "title": "Bob", "text": "Bob read it."}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def found(config, query):
        search = next(tool for tool in build_components(config).environment.toolbox.tools if tool.name == "search")
        return [document.document_id for document, _ in search._index.search(query, 3)]

    config = small_config()
    assert found(config, "ada") == [] and found(config, "capital of France") != []
    config.data.corpus_path = str(path)
    assert found(config, "ada") == ["a"] and found(config, "capital of France") == []


def test_the_engine_is_the_one_that_is_named(monkeypatch):
    made = []
    monkeypatch.setitem(module.ENGINES, "scripted", lambda *arguments: made.append(arguments) or "the engine")
    config = small_config()
    config.engine = "scripted"
    config.episode.max_tokens = 4096  # no size of the embedded engine binds another one
    parts = build_components(config)
    assert build_engine(config, parts, "params", 7) == "the engine"
    assert made == [(config, parts, "params", 7)]


def test_an_endpoint_stands_in_for_its_model_alone(tmp_path):
    config = small_config()
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"gpt-5": {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}}))
    config.experts.endpoints_path = str(path)
    experts = build_experts(config, Account(0.0))
    assert isinstance(experts("gpt-5"), EndpointExpert)
    assert isinstance(experts("gpt-5-mini"), SimulatedExperts)
