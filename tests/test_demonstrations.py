"""Demonstrations: valid episodes whose route says nothing about question, price or preference."""

import itertools

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.question_answering import restate
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.types import CallStatus, EpisodeStatus

CONFIG = RunConfig()
GROUP_SIZE = 8
MAX_PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 89, 46


@pytest.fixture(scope="module")
def instances(components):
    return evaluation_instances(components.train_tasks, list(PREFERENCES.values()), CONFIG.world, 32, seed=1)


@pytest.fixture(scope="module")
def groups(components, instances):
    return demonstrate(instances, GROUP_SIZE, components.environment, components.chat, components.rollout, seed=0)


@pytest.fixture(scope="module")
def first_calls(instances, groups):
    """(instance, tool, offer) of the first call of every demonstration."""
    return [
        (instance, trajectory.calls[0].call.name, instance.offer(trajectory.calls[0].call.arguments["model"]))
        for instance, group in zip(instances, groups)
        for trajectory in group.trajectories
    ]


def chi_square_excess(pairs, expected_shares=None):
    """How many standard deviations the chi-square statistic of a table of pairs lies above its mean, if independent."""
    rows, columns = (sorted(set(values)) for values in zip(*pairs))
    table = np.array([[sum(pair == (row, column) for pair in pairs) for column in columns] for row in rows], float)
    shares = table.sum(axis=0) / table.sum() if expected_shares is None else np.asarray(expected_shares)
    expected = table.sum(axis=1, keepdims=True) * shares[None]
    assert expected.min() > 5
    freedom = (len(rows) - (expected_shares is None)) * (len(columns) - 1)
    return (((table - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_every_demonstration_is_well_formed_on_offer_and_answers(components, instances, groups):
    for instance, group in zip(instances, groups):
        assert (group.instance_id, group.weights) == (instance.instance_id, instance.preference.weights)
        assert [trajectory.rollout_index for trajectory in group.trajectories] == list(range(GROUP_SIZE))
        for trajectory in group.trajectories:
            assert trajectory.status == EpisodeStatus.ANSWERED and trajectory.instance_id == instance.instance_id
            assert 1 <= len(trajectory.calls) <= components.environment.max_calls
            assert all(record.status == CallStatus.OK for record in trajectory.calls)
            assert all(instance.offer(record.call.arguments["model"]) for record in trajectory.calls)
            assert [record.call.name == "answer" for record in trajectory.calls].index(True) == len(
                trajectory.calls
            ) - 1


def test_the_first_turn_restates_and_no_other_turn_thinks(components, instances, groups):
    chat = components.chat
    for instance, group in zip(instances[::9], groups[::9]):
        for trajectory in group.trajectories:
            text = chat_format.decode(chat, trajectory.tokens[trajectory.num_prompt_tokens :])
            assert text.startswith(f"<think>\n{restate(instance)}\n</think>")
            assert text.count("<think>") == 1


def test_the_first_tool_is_uniform_and_independent_of_question_and_preference(first_calls):
    uniform = [1 / 3] * 3
    for key in (
        lambda instance: instance.preference.name,
        lambda instance: f"{instance.task.family} {instance.task.kind}",
        lambda instance: instance.task.evidence_tool,
    ):
        pairs = [(key(instance), ROLES.index(tool)) for instance, tool, _ in first_calls]
        assert chi_square_excess(pairs, uniform) < 4


def test_the_first_expert_is_uniform_and_independent_of_question_and_preference(first_calls):
    num_offered = len(first_calls[0][0].offers)
    uniform = [1 / num_offered] * num_offered
    for key in (lambda instance: instance.preference.name, lambda instance: instance.task.family):
        pairs = [(key(instance), instance.offers.index(offer)) for instance, _, offer in first_calls]
        assert chi_square_excess(pairs, uniform) < 4
    pairs = [(tool, instance.offers.index(offer)) for instance, tool, offer in first_calls]
    assert chi_square_excess(pairs, uniform) < 4


@pytest.mark.parametrize("field", ["output_usd_per_million_tokens", "latency_s", "is_local"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_what_is_chosen_is_no_cheaper_faster_or_more_local_than_what_is_offered(first_calls, field, name):
    excess = np.array(
        [
            float(getattr(offer, field)) - np.mean([getattr(other, field) for other in instance.offers])
            for instance, _, offer in first_calls
            if instance.preference.name == name
        ]
    )
    assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(len(excess))


def test_routes_of_a_group_differ_and_are_the_seeds(components, instances, groups):
    few = instances[:6]
    again, other = (
        demonstrate(few, GROUP_SIZE, components.environment, components.chat, components.rollout, seed)
        for seed in (0, 1)
    )
    first, second, third = (
        [[t.tokens.tolist() for t in group.trajectories] for group in some] for some in (groups[:6], again, other)
    )
    assert first == second != third
    assert all(len({tuple(tokens) for tokens in group}) > 1 for group in first)


def test_prompts_and_demonstrations_stay_in_their_budget(components):
    drawn = []
    for split, seed in itertools.product(("train", "validation", "test"), (0, 1)):
        tasks = build_tasks(split, num_per_cell=15, seed=seed)
        drawn += evaluation_instances(tasks, list(PREFERENCES.values()), CONFIG.world, len(tasks), seed=seed)
    lengths = [
        len(chat_format.encode_prompt(components.chat, *components.environment.prompt(instance))) for instance in drawn
    ]
    assert len(drawn) == 3600 and max(lengths) <= MAX_PROMPT_TOKENS
    groups = demonstrate(drawn[::9], 1, components.environment, components.chat, components.rollout, seed=2)
    assert max(group.trajectories[0].num_completion_tokens for group in groups) <= MAX_COMPLETION_TOKENS
    assert {group.trajectories[0].status for group in groups} == {EpisodeStatus.ANSWERED}
