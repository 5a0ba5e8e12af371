"""A run on tau2's tasks: a checkout's training and test splits, its golden calls as demonstrations, its evaluation."""

import json
import os
import sys

import pytest

from orchestra_jax import training
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.demonstrations import demonstrate
from tests.environments.tau2.test_checkout import SPLITS, checkout  # noqa: F401


def small_config(directory):
    config = RunConfig(environment="tau2", model="tiny")
    config.tau2.checkout, config.tau2.takes_any_version = directory, True
    config.prompt.rendering = "qwen3"
    config.episode.max_tokens, config.episode.max_turn_tokens = 1024, 64
    config.jax_engine.max_tokens, config.jax_engine.num_rows = 1024, 16
    config.warm_start.num_steps, config.warm_start.num_groups = 1, 2
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.groups_per_update = 1, 2, 2
    config.grpo.min_group_std, config.evaluation.num_per_preference = 0.0, 1
    return config


def test_the_splits_are_the_runs_and_golden_demonstrations_score_one(checkout):  # noqa: F811
    config = small_config(checkout)
    config.model = "qwen3-8b"  # its context: nothing of it is computed here
    parts = build_components(config)
    # Task 3, of the training split, needs a judge.
    assert [[task.task_id for task in tasks] for tasks in (parts.train_tasks, parts.test_tasks)] == [["1"], ["4"]]
    instances = evaluation_instances(parts.test_tasks, parts.preferences, config.world, 1, 0)
    groups = demonstrate(instances, 2, parts.environment, parts.chat, parts.rollout, 0, parts.demonstrated_turn)
    outcomes = [each.objectives["outcome"] for group in groups for each in group.trajectories]
    assert outcomes == [1.0] * 6  # two episodes under each of three preferences
    parts.resources.close()


@pytest.mark.slow
def test_a_run_trains_and_evaluates_on_tau2s_tasks(checkout, tmp_path):  # noqa: F811
    summary = training.run(small_config(checkout), str(tmp_path / "run"))
    assert set(summary["policies"]["trained"]["solved_by_difficulty"]) == {"1"}
    assert 0.0 <= summary["policies"]["trained"]["outcome"] <= 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: setattr(config.prompt, "rendering", "compact"), 'set prompt.rendering to "qwen3"'),
        (lambda config: setattr(config.tau2, "domain", "chess"), "tau2 domain 'chess' is not one of"),
        (lambda config: setattr(config.tau2, "server_python", "/no/python"), "the interpreter '/no/python' of tau2's"),
        (lambda config: setattr(config.tau2, "takes_any_version", False), "pinned are 1.0.1"),
    ],
)
def test_what_cannot_be_built_is_said(checkout, change, told):  # noqa: F811
    config = small_config(checkout)
    change(config)
    with pytest.raises(ValueError, match=told):
        build_components(config)


def test_a_checkout_without_the_splits_of_a_run_is_refused(checkout):  # noqa: F811
    path = os.path.join(checkout, "data/tau2/domains/retail/split_tasks.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"base": SPLITS["base"]}, file)
    config = small_config(checkout)
    config.tau2.server_python = sys.executable
    with pytest.raises(
        ValueError, match=r"tau2-bench 9.9.9 has no tasks in a split 'train', its splits are \['base'\]"
    ):
        build_components(config)
