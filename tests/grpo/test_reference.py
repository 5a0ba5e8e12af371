"""The package against tests/grpo/reference.py, form by form; its gradients against finite differences in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from orchestra_jax.grpo.advantages import ADVANTAGES, raw_advantages
from orchestra_jax.grpo.loss import AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, RATIOS, grpo_loss, loss_denominator
from orchestra_jax.rewards.constraints import Budget
from orchestra_jax.rewards.normalization import RANGE_RULES
from orchestra_jax.rewards.objectives import Objective, tool_objective
from orchestra_jax.rewards.preference import FORMS, reward_components

OBJECTIVES = (
    Objective("outcome", "maximize", 0.0, 1.0),
    Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=0.15),
    Objective("latency_s", "minimize", 0.0, 100.0),
    tool_objective("search"),
    tool_objective("code", is_raw=True),
    Objective("disallowed_calls", "minimize", 0.0, 1.0, is_gated=False),
)
AS_DICTS = [
    {
        "name": each.name, "direction": each.direction, "low": each.reference_low, "high": each.reference_high,
        "floor": each.range_floor, "gated": each.is_gated, "cap": each.cap,
    }
    for each in OBJECTIVES
]  # fmt: skip
BUDGETS = (Budget("cost_usd", 0.05), Budget("latency_s", 30.0))
MULTIPLIERS = {"cost_usd": 0.7, "latency_s": 0.2}


def random_group(rng, size=5):
    vectors_GM = np.column_stack(
        [
            rng.integers(0, 2, size),
            rng.uniform(0, 0.4, size),
            rng.choice([10.0, 40.0], size) if rng.random() < 0.5 else np.full(size, 20.0),
            rng.integers(0, 4, size),
            rng.integers(0, 3, size),
            rng.integers(0, 3, size),
        ]
    ).astype(float)
    return vectors_GM, rng.uniform(0.01, 1, len(OBJECTIVES)), rng.random(size) < 0.8


@pytest.mark.parametrize("rule", RANGE_RULES)
@pytest.mark.parametrize("form", FORMS)
def test_rewards(form, rule):
    rng = np.random.default_rng(0)
    groups = [random_group(rng) for _ in range(40)]
    vectors_PGM, weights_PM, valid_PG = (np.stack(each) for each in zip(*groups))
    found = reward_components(vectors_PGM, weights_PM, OBJECTIVES, valid_PG, rule, form, BUDGETS, MULTIPLIERS)
    for p, (vectors, weights, valid) in enumerate(groups):
        budgets = [(budget.objective, budget.limit) for budget in BUDGETS]
        expected_G = reference.reward(form, rule, AS_DICTS, vectors, weights, valid, budgets, MULTIPLIERS)
        np.testing.assert_allclose(found.rewards_G[p], expected_G, atol=1e-12)
    # The components add up to the reward, whatever the form.
    np.testing.assert_allclose((found.components_GC * found.weights_C[:, None, :]).sum(-1), found.rewards_G, atol=1e-12)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize(("ddof", "epsilon", "floor"), [(1, 1e-6, 0.0), (0, 1e-3, 0.3)])
def test_advantages(kind, ddof, epsilon, floor):
    rng = np.random.default_rng(1)
    rewards_PG, valid_PG = rng.normal(size=(30, 5)), rng.random((30, 5)) < 0.6
    found = raw_advantages(rewards_PG, valid_PG, kind, std_ddof=ddof, epsilon=epsilon, std_floor=floor)
    expected = reference.advantages(kind, rewards_PG, valid_PG, ddof, epsilon, floor)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def random_batch(seed=0, shape=(5, 7)):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=shape)
    current, sampler, anchor = (old + 0.3 * rng.normal(size=shape) for _ in range(3))
    mask = rng.random(shape) < 0.6
    mask[0] = False
    return current, old, sampler, anchor, rng.uniform(0, 2, shape), 2 * rng.normal(size=shape[0]), mask


def settings_of(ratio, correction, kl, aggregation):
    return {
        "ratio": ratio, "correction": correction, "kl": kl, "aggregation": aggregation, "clip_low": 0.2,
        "clip_high": 0.28, "dual_clip": 3.0, "correction_clip": 1.2, "kl_coefficient": 0.3,
        "entropy_coefficient": 0.05, "length": 11,
    }  # fmt: skip


CASES = [
    *((ratio, correction, "k2", "token_mean") for ratio, correction in itertools.product(RATIOS, CORRECTIONS)),
    *(("token", "token", kl, aggregation) for kl, aggregation in itertools.product(KL_ESTIMATORS, AGGREGATIONS)),
    ("sequence", "sequence", "k3", "rollout_mean"),
    ("cispo", "none", "k3", "constant"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_their_gradients(case):
    settings = settings_of(*case)
    current, old, sampler, anchor, entropy, advantage, mask = random_batch()
    if settings["ratio"] == "cispo":
        settings["frozen"] = current.copy()
    denominator = loss_denominator(mask, settings["aggregation"], length=settings["length"])
    named = {name: value for name, value in settings.items() if name not in ("length", "frozen")}

    def loss(current_BT, entropy_BT):
        return grpo_loss(
            current_BT, old, sampler, anchor, jnp.asarray(advantage), jnp.asarray(mask),
            denominator=denominator, entropy_BT=entropy_BT, **named,
        )[0]  # fmt: skip

    value, (gradient_BT, entropy_gradient_BT) = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.asarray(current, jnp.float32), jnp.asarray(entropy, jnp.float32)
    )
    others = (old, sampler, anchor, entropy, advantage, mask, settings)
    np.testing.assert_allclose(value, reference.loss(current, *others), rtol=2e-5)
    step = 1e-6
    expected_BT = np.zeros_like(current)
    for place in np.ndindex(current.shape):
        moved = [current.copy(), current.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        expected_BT[place] = (reference.loss(moved[0], *others) - reference.loss(moved[1], *others)) / (2 * step)
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-4, atol=1e-6)
    assert np.abs(expected_BT).max() > 1e-3 and not expected_BT[~mask].any()
    assert np.all(np.asarray(entropy_gradient_BT)[mask] < 0) and not np.any(np.asarray(entropy_gradient_BT)[~mask])


def test_sequence_ratio_by_hand():
    """Log-ratios 0.2 and 0.4 over two of three tokens: exp(0.3), above 1.28, so A = 1 is cut and A = -1 is not."""
    old = jnp.zeros((1, 3))
    current, mask = jnp.array([[0.2, 9.0, 0.4]]), jnp.array([[True, False, True]])

    def value(advantage):
        plain = {"denominator": 1.0, "kl_coefficient": 0.0, "correction_clip": 2.0, "ratio": "sequence"}
        return float(grpo_loss(current, old, old, None, jnp.array([advantage]), mask, **plain)[0])

    assert value(1.0) == pytest.approx(-1.28)
    assert value(-1.0) == pytest.approx(math.exp(0.3))


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    old, mask = jnp.log(jnp.array([[0.1]])), jnp.ones((1, 1), bool)
    plain = {"denominator": 1.0, "kl_coefficient": 0.0, "correction_clip": 2.0}

    def gradient(ratio):
        def loss(current):
            return grpo_loss(current, old, old, None, jnp.ones(1), mask, ratio=ratio, **plain)[0]

        return float(jax.grad(loss)(old + math.log(2.0))[0, 0])

    assert gradient("token") == 0.0
    assert gradient("cispo") == pytest.approx(-1.28)


@pytest.mark.parametrize(("name", "value"), [("ratio", "episode"), ("correction", "tokens"), ("kl", "k1")])
def test_unknown_choices_are_named(name, value):
    zeros, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    plain = {"denominator": 1.0, "kl_coefficient": 0.1, "correction_clip": 2.0}
    with pytest.raises(ValueError, match=f"{name} '{value}' must be one of"):
        grpo_loss(zeros, zeros, zeros, zeros, jnp.ones(1), mask, **plain, **{name: value})
