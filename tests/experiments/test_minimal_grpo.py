"""The teaching file: its arithmetic by hand, three steps for real, and that it fits its page."""

import inspect
import math

import numpy as np
import pytest

from experiments import minimal_grpo as module
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.rewards.preference import preference_reward


def test_the_reward_by_hand():
    vectors_PGM = np.array([[[1.0, 0.01], [1.0, 0.05], [0.0, 0.11]]])
    np.testing.assert_allclose(module.preference_reward(vectors_PGM, np.array([[0.2, 0.8]])), [[1.0, 0.68, 0.0]])
    alike_PGM = np.array([[[1.0, 0.04], [1.0, 0.05]]])  # a range of $0 to $0.10; the outcome has none
    np.testing.assert_allclose(module.preference_reward(alike_PGM, np.array([[0.2, 0.8]])), [[0.48, 0.40]])


@pytest.mark.parametrize("is_dear", [False, True])
def test_the_reward_is_the_packages(is_dear):
    """The page and rewards/preference.py, on the same groups, with costs below and beyond the floor."""
    objectives = (
        Objective("outcome", "maximize", 0.0, 1.0),
        Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=module.FLOORS[1]),
    )
    rng = np.random.default_rng(0)
    costs_PG = rng.uniform(0, 0.25 if is_dear else 0.1, (20, 5))
    vectors_PGM = np.stack([rng.integers(0, 2, (20, 5)), costs_PG], axis=-1)
    weights_PM = rng.uniform(0.1, 1, (20, 2))
    weights_PM /= weights_PM.sum(axis=1, keepdims=True)
    expected_PG = preference_reward(vectors_PGM, weights_PM, objectives, np.ones((20, 5), bool), "group")
    np.testing.assert_allclose(module.preference_reward(vectors_PGM, weights_PM), expected_PG, atol=1e-12)


def test_the_advantage_by_hand():
    advantages_PG, is_kept_P = module.group_advantages(np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    np.testing.assert_allclose(advantages_PG, [np.array([1, -1, -1, 1]) * math.sqrt(3) / 2, np.zeros(4)], rtol=1e-5)
    assert is_kept_P.tolist() == [True, False]


@pytest.mark.slow
def test_three_steps_run_and_repeat_themselves():
    first, second = (module.train(num_steps=3, seed=1) for _ in range(2))
    assert first == second and len(first) == 3
    assert all(math.isfinite(value) for metrics in first for value in metrics.values())
    assert any(metrics["kept"] > 0 and metrics["loss"] != 0 for metrics in first)


def test_it_fits_its_page():
    assert len(inspect.getsource(module).splitlines()) <= 250


@pytest.mark.slow
def test_it_learns_to_obey():
    history = module.train(num_steps=300, seed=0)
    last = {name: np.mean([metrics[name] for metrics in history[-20:]]) for name in history[0]}
    assert last["reward"] > history[0]["reward"] + 0.3
    assert last["cheap/cost_usd"] < last["accurate/cost_usd"]
    assert last["accurate/accuracy"] > last["cheap/accuracy"]
