"""Runs whose experts come from a pool: what the oracle makes of them, and that the loop takes them by configuration."""

import dataclasses

import numpy as np
import pytest

from configs import pools, pools_unseen_models, pools_unseen_prices
from configs.catalog import EVALUATION, TRAINING, UNSEEN_MODELS, UNSEEN_PRICES
from orchestra_jax import chat as chat_format
from orchestra_jax import training
from orchestra_jax.components import build_components, check_config
from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.pipeline import evaluation_instances, make_training_iterator
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import ROLES, Task
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.question_answering import restate
from orchestra_jax.evaluation.baselines import evaluate_baselines
from orchestra_jax.evaluation.oracle import (
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
    statistic_names,
)
from orchestra_jax.evaluation.trajectory_value import expected_statistics
from orchestra_jax.experts.catalog import Listing, Pool
from orchestra_jax.experts.world import WorldConfig, check_pools, skill_tables
from orchestra_jax.types import ToolCall

TASK = Task("t", "geography", "two_hop", "Which?", "x", "search", ("a",), query="q", poor_query="p", wrong_answer="y")
CHEAP, DEAR = (
    Listing("answer", f"a-{n}", f"m-{n}", price, price, 10.0 * n, True) for n, price in ((1, 1.0), (2, 10.0))
)
WRITERS = tuple(Listing(role, role[:1], "w", 1.0, 1.0, 5.0, True) for role in ROLES[:2])
SMALL = Pool((*WRITERS, CHEAP, DEAR))


def world(training=SMALL, evaluation=SMALL, **settings):
    return WorldConfig(training_pool=training, evaluation_pool=evaluation, **settings)


def test_what_a_model_knows_is_the_same_in_every_pool_and_rises_with_its_price():
    tables = [skill_tables(world(TRAINING, other)) for other in (EVALUATION, UNSEEN_MODELS)]
    one, two = ({m: t.answer_FKEV[:, :, e] for e, m in enumerate(t.models)} for t in tables)
    for model in set(one) & set(two):
        np.testing.assert_array_equal(one[model], two[model])
    assert {"gpt-5", "deepseek-math-7b"} <= set(two) and "deepseek-math-7b" not in one
    everything = np.stack([*two.values()])
    assert 0.3 * 0.6 - 1e-9 <= everything.min() and everything.max() <= 0.97
    many = [skill_tables(world(seed=seed)).answer_FKEV[..., 1].mean((0, 1)) for seed in range(200)]
    assert np.diff(np.mean(many, 0))[:1] == pytest.approx(0.12, abs=0.02)  # m-1 at $1, m-2 at $10
    assert skill_tables(WorldConfig()).models[0] == "gpt-5"  # the quickstart's own table


def test_the_optimum_of_one_writer_and_two_answerers_by_hand():
    config = world(orchestrator_nominal_turn_tokens=0, orchestrator_nominal_context_tokens=0)
    instance = make_instance(TASK, PREFERENCES["balanced"], config, 1, SMALL)
    tables = skill_tables(config)
    family, kind = 2, 1  # geography, two hops
    p = {m: tables.answer_FKEV[family, kind, e] for e, m in enumerate(tables.models)}
    found = tables.writer_FE[family, tables.models.index("w")]

    def value(model, price, seconds, evidence):
        search_usd, search_s = 700e-6, 5.0  # 500 + 200 tokens at $1, 5 s: a writer's own seconds, no share of them
        cost = price * (1.5e-3 + (0.5e-3 if evidence == 1 else 0.0)) + (search_usd if evidence >= 0 else 0.0)
        seconds += search_s if evidence >= 0 else 0.0
        right = p[model][max(evidence, 0)]
        return right * (0.2 + 0.4 * (1 - min(cost / 0.012, 1)) + 0.4 * (1 - min(seconds / 50, 1)))

    def best(evidence):  # -1: not searched, 0: in vain, 1: found
        return max(value("m-1", 1.0, 10.0, evidence), value("m-2", 10.0, 20.0, evidence))

    by_hand = max(best(-1), found * best(1) + (1 - found) * best(0))
    optimum = evaluate(make_charges([instance], config), optimal_policy)[0][0, 0]
    assert optimum == pytest.approx(by_hand, rel=1e-9)


@pytest.fixture(scope="module")
def parts():
    config = pools.get_config()
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 4
    built = build_components(config)
    yield config, built
    built.resources.close()


def test_demonstrations_over_a_pool_come_to_the_random_policy(parts):
    config, built = parts
    instances = evaluation_instances(built.test_tasks, built.preferences, config.world, 60, 0)
    charges = make_charges(instances, config.world)
    groups = demonstrate(instances, 2, built.environment, built.chat, built.rollout, 5)
    played_IS = np.mean(
        [expected_statistics(charges, [group.trajectories[k] for group in groups]) for k in range(2)], axis=0
    )
    random_IS = evaluate(charges, random_policy)[0]
    for column in range(7):  # utility, accuracy, cost, latency, calls of each tool
        error = played_IS[:, column].std() / np.sqrt(len(played_IS) / 5)  # the five preferences share their draws
        assert abs(played_IS[:, column].mean() - random_IS[:, column].mean()) < 4 * error + 1e-9
    tables = evaluate_baselines(instances, charges, skill_tables(config.world))
    best_I = evaluate(charges, optimal_policy)[0][:, 0]
    assert all((table_IS[:, 0] <= best_I + 1e-12).all() for table_IS in tables.values())
    assert statistic_names(config.world)[7:] == tuple(f"calls/{m}" for m in skill_tables(config.world).models)


def test_training_instances_come_from_the_training_pool_and_fit_the_configs_sizes(parts):
    config, built = parts
    (batch,) = [
        next(make_training_iterator(built.train_tasks, built.preferences, config.world, 200, seed)) for seed in (3,)
    ]
    assert {offer.model for each in batch for offer in each.offers} == {each.model for each in TRAINING.listings}
    assert len({len(each.offers) for each in batch}) > 5
    call = ToolCall("enhance_reasoning", {"model": "answer-math-2"})
    for instance in batch:
        prompt = chat_format.encode_prompt(built.chat, *built.environment.prompt(instance))
        turn = chat_format.encode_turn(built.chat, restate(instance), [call])
        assert len(prompt) <= config.grpo.prefix_buckets[-1] and len(turn) <= config.episode.max_turn_tokens
        assert len(prompt) + len(turn) + 50 <= config.episode.max_tokens


@pytest.mark.parametrize(
    ("module", "pool"),
    [(pools, EVALUATION), (pools_unseen_models, UNSEEN_MODELS), (pools_unseen_prices, UNSEEN_PRICES)],
)
def test_the_evaluation_pool_is_the_configs(module, pool):
    config = module.get_config()
    check_config(config)
    made = evaluation_instances([TASK], [PREFERENCES["cheap"]], config.world, 20, 0)
    assert {offer.model for each in made for offer in each.offers} == {each.model for each in pool.listings}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (world(evaluation=Pool()), "training_pool and world.evaluation_pool go together"),
        (world(evaluation=dataclasses.replace(SMALL, is_shuffled=True)), "takes it as known who stands behind"),
        (world(TRAINING, EVALUATION, max_calls=6), "max_calls 6 makes a tree of 271453 nodes for the oracle"),
        (WorldConfig(max_calls=5), "max_calls 5 makes a tree of 346201 nodes"),
    ],
)
def test_what_the_oracle_cannot_evaluate_is_refused(config, told):
    with pytest.raises(ValueError, match=told):
        check_pools(config)


def test_a_pool_fills_each_role_and_lists_no_model_twice_in_one():
    with pytest.raises(ValueError, match="for 'answer', and none twice, got \\[\\]"):
        Pool(WRITERS)
    with pytest.raises(ValueError, match="for 'search', and none twice, got \\['w', 'w'\\]"):
        Pool((*WRITERS, CHEAP, dataclasses.replace(WRITERS[0], alias="z")))


@pytest.mark.slow
def test_a_run_over_the_pools_trains_and_is_compared_with_the_optimum(tmp_path):
    config = pools.get_config()
    config.model = "tiny"
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 2
    config.warm_start.num_steps, config.warm_start.num_groups = 1, 2
    config.jax_engine.num_rows, config.jax_engine.row_buckets = 16, (16,)
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.groups_per_micro_batch = 1, 2, 2
    config.grpo.min_group_std, config.evaluation.num_per_preference = 0.0, 8
    summary = training.run(config, str(tmp_path / "run"))
    policies = summary["policies"]
    assert "gpt-5" in policies["optimal"]["cheap"]["calls"] and "expert-1" not in policies["optimal"]["cheap"]["calls"]
    assert policies["optimal"]["cheap"]["score"] == 1.0 and summary["price_response"] == {}
    assert "trained" in policies and (tmp_path / "run" / "sample_trajectories.txt").read_text().count("answer-math")
