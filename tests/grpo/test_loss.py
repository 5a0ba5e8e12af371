"""The GRPO loss: hand-computed values, the directions of its clips, masks, and sums over micro-batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.grpo.loss import grpo_loss, loss_denominator

PLAIN = {"denominator": 1.0, "kl_coefficient": 0.0, "correction_clip": 2.0}


@functools.partial(jax.jit, static_argnames="settings")
def token_value_and_gradient(logprob, old, sampler, advantage, settings):
    def loss(logprob):
        constants = (old.reshape(1, 1), sampler.reshape(1, 1), None, advantage.reshape(1), jnp.ones((1, 1), bool))
        return grpo_loss(logprob.reshape(1, 1), *constants, **(PLAIN | dict(settings)))

    return jax.value_and_grad(loss, has_aux=True)(logprob)


def one_token(ratio, advantage, sampler_over_old=1.0, **settings):
    """Loss, gradient with respect to log pi, and metrics of a single token with pi_old = 1/2."""
    logprobs = [math.log(0.5 * factor) for factor in (ratio, 1.0, sampler_over_old)]
    scalars = [np.float32(scalar) for scalar in (*logprobs, advantage)]
    (value, metrics), gradient = token_value_and_gradient(*scalars, tuple(settings.items()))
    return float(value), float(gradient), metrics


def random_batch(seed=0, shape=(4, 6)):
    keys = jax.random.split(jax.random.key(seed), 6)
    old = -jax.random.exponential(keys[0], shape)
    current, sampler, reference = (old + 0.2 * jax.random.normal(key, shape) for key in keys[1:4])
    mask = jax.random.bernoulli(keys[4], 0.6, shape).at[0].set(False)
    return current, old, sampler, reference, jax.random.normal(keys[5], shape[:1]), mask


@pytest.mark.parametrize("is_jitted", [False, True])
@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Token losses are -1, -1.1 (row 0), -(-2) (row 1); row 2 is empty.
    [("rollout_mean", (-(1 + 1.1) / 2 + 2.0) / 2), ("token_mean", (-1 - 1.1 + 2.0) / 3)],
)
def test_value_by_hand(is_jitted, aggregation, expected):
    old = jnp.full((3, 2), -1.0)
    current = old.at[0, 1].add(math.log(1.1))
    mask = jnp.array([[True, True], [False, True], [False, False]])
    advantages = jnp.array([1.0, -2.0, 5.0])
    loss = functools.partial(grpo_loss, kl_coefficient=0.0, correction_clip=2.0, aggregation=aggregation)
    loss = jax.jit(loss) if is_jitted else loss
    value, metrics = loss(current, old, old, None, advantages, mask, denominator=loss_denominator(mask, aggregation))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_mean"], 3.1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl_old"], (0.1 - math.log(1.1)) / 3, rtol=1e-4)
    assert (metrics["num_tokens"], metrics["num_rollouts"]) == (3, 2)


def test_denominators():
    mask = jnp.array([[True, True], [False, True], [False, False]])
    assert loss_denominator(mask, "rollout_mean") == 2
    assert loss_denominator(mask, "token_mean") == 3
    assert loss_denominator(jnp.zeros((2, 2), bool), "rollout_mean") == 1


def test_gradient_at_ratio_one_is_reinforce():
    current, _, _, _, advantages, mask = random_batch()
    denominator = loss_denominator(mask, "token_mean")

    def loss(logprobs_BT):
        constants = (current, current, None, advantages, mask)
        return grpo_loss(logprobs_BT, *constants, **(PLAIN | {"denominator": denominator}), aggregation="token_mean")[0]

    def reinforce(logprobs_BT):
        return -jnp.sum(jnp.where(mask, logprobs_BT * advantages[:, None], 0.0)) / mask.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(current), jax.jit(jax.grad(reinforce))(current), rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "clipped", "dual_clipped"),
    [
        (1.2, 1.0, -1.2, -1.2, 0, 0),  # inside the upper bound of 1.28
        (1.5, 1.0, -1.28, 0.0, 1, 0),  # a gain is cut at 1 + clip_high
        (0.5, 1.0, -0.5, -0.5, 0, 0),  # a token that fell is pulled back up
        (0.9, -1.0, 0.9, 0.9, 0, 0),  # inside the lower bound of 0.8
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # a gain is cut at 1 - clip_low
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # a token that rose is pushed back down
        (9.0, -1.0, 9.0, 9.0, 0, 0),  # still below the dual clip of 10
        (12.0, -1.0, 10.0, 0.0, 0, 1),  # and cut there
        (12.0, 1.0, -1.28, 0.0, 1, 0),  # the dual clip is for negative advantages alone
    ],
)
def test_clip_directions(ratio, advantage, value, gradient, clipped, dual_clipped):
    got_value, got_gradient, metrics = one_token(ratio, advantage)
    np.testing.assert_allclose([got_value, got_gradient], [value, gradient], rtol=1e-5, atol=1e-7)
    assert (metrics["clip_share"], metrics["dual_clip_share"]) == (clipped, dual_clipped)


def test_dual_clip_can_be_switched_off():
    value, gradient, _ = one_token(12.0, -1.0, dual_clip=math.inf)
    np.testing.assert_allclose([value, gradient], [12.0, 12.0], rtol=1e-5)
    assert np.isfinite(one_token(1.0, 0.0, dual_clip=math.inf)[:2]).all()


@pytest.mark.parametrize(
    ("sampler_over_old", "correction", "truncated"), [(2.0, 0.5, 0), (0.8, 1.25, 0), (0.25, 2.0, 1)]
)
def test_correction_weighs_the_token_and_is_truncated_above(sampler_over_old, correction, truncated):
    value, gradient, metrics = one_token(1.1, 3.0, sampler_over_old)
    np.testing.assert_allclose([value, gradient], [-3.3 * correction] * 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["correction_mean"], correction, rtol=1e-5)
    assert metrics["correction_truncated_share"] == truncated
    np.testing.assert_allclose(metrics["sampler_gap_mean"], abs(math.log(sampler_over_old)), rtol=1e-5)


def test_sampler_gap_mean_and_max():
    zeros = jnp.zeros((1, 4))
    sampler = jnp.array([[0.1, -0.3, 9.0, 0.2]])
    mask = jnp.array([[True, True, False, True]])
    _, metrics = grpo_loss(zeros, zeros, sampler, None, jnp.ones(1), mask, **PLAIN)
    np.testing.assert_allclose(metrics["sampler_gap_mean"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(metrics["sampler_gap_max"], 0.3, rtol=1e-6)


def test_kl_and_entropy_terms_by_hand():
    current, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
    entropy = jnp.array([[0.25, 0.75]])
    mask = jnp.ones((1, 2), bool)

    def loss(logprobs_BT, entropy_BT):
        settings = PLAIN | {"kl_coefficient": 0.1, "entropy_coefficient": 0.2}
        return grpo_loss(
            logprobs_BT, current, current, reference, jnp.zeros(1), mask, entropy_BT=entropy_BT, **settings
        )

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(current, entropy)
    # Mean of 0.5 * 0.5^2 and 0.5 * 1^2 is 0.3125; the mean entropy is 0.5.
    np.testing.assert_allclose(value, 0.1 * 0.3125 - 0.2 * 0.5, rtol=1e-6)
    np.testing.assert_allclose([metrics["kl_reference"], metrics["entropy"]], [0.3125, 0.5], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [[0.1 * 0.5 / 2, 0.1 * -1.0 / 2]], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [[-0.1, -0.1]], rtol=1e-6)


def test_only_the_current_policy_gets_a_gradient():
    current, old, sampler, reference, advantages, mask = random_batch()

    def loss(current, old, sampler, reference, advantages):
        settings = PLAIN | {"kl_coefficient": 0.1}
        return grpo_loss(current, old, sampler, reference, advantages, mask, **settings)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(current, old, sampler, reference, advantages)
    assert jnp.any(gradients[0] != 0)
    assert all(not jnp.any(gradient) for gradient in gradients[1:])


@pytest.mark.parametrize("aggregation", ["rollout_mean", "token_mean"])
def test_nothing_outside_the_mask_matters(aggregation):
    current, old, sampler, reference, advantages, mask = random_batch()

    def loss(current, garbage):
        filled = [jnp.where(mask, array, garbage) for array in (current, old, sampler, reference)]
        advantages_B = advantages.at[0].set(garbage)  # row 0 has an empty mask
        settings = PLAIN | {"kl_coefficient": 0.1, "entropy_coefficient": 0.1}
        return grpo_loss(*filled, advantages_B, mask, entropy_BT=filled[3], aggregation=aggregation, **settings)[0]

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    clean, clean_gradient = value_and_gradient(current, 0.0)
    dirty, dirty_gradient = value_and_gradient(current, jnp.nan)
    assert clean == dirty
    np.testing.assert_array_equal(clean_gradient, dirty_gradient)
    assert not jnp.any(jnp.where(mask, 0.0, dirty_gradient))
    assert jnp.any(dirty_gradient != 0)


@pytest.mark.parametrize("aggregation", ["rollout_mean", "token_mean"])
def test_micro_batches_sum_to_the_batch(aggregation):
    batch = random_batch(seed=1, shape=(6, 5))
    denominator = loss_denominator(batch[-1], aggregation)
    assert denominator == (5 if aggregation == "rollout_mean" else batch[-1].sum())

    def loss(current, rest):
        settings = PLAIN | {"denominator": denominator, "kl_coefficient": 0.1}
        return grpo_loss(current, *rest, aggregation=aggregation, **settings)[0]

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    whole, whole_gradient = value_and_gradient(batch[0], batch[1:])
    # Unequal parts, the first with the empty row.
    parts = [[array[rows] for array in batch] for rows in (slice(0, 2), slice(2, 6))]
    values, gradients = zip(*(value_and_gradient(part[0], part[1:]) for part in parts), strict=True)
    np.testing.assert_allclose(sum(values), whole, rtol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(gradients), whole_gradient, rtol=1e-5, atol=1e-8)


def test_rollout_mean_does_not_reward_length():
    current = jnp.zeros((2, 4))
    mask = jnp.array([[True, False, False, False], [True, True, True, True]])

    def loss(logprobs_BT):
        return grpo_loss(logprobs_BT, current, current, None, jnp.ones(2), mask, **PLAIN)[0]

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(current).sum(axis=1), [-1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [500.0, -500.0])
def test_extreme_ratios_stay_finite(advantage, log_ratio):
    zeros = jnp.zeros((1, 1))

    def loss(logprobs_BT):
        settings = PLAIN | {"correction_clip": math.inf}
        return grpo_loss(
            logprobs_BT, zeros, zeros + log_ratio, None, jnp.array([advantage]), jnp.ones((1, 1), bool), **settings
        )

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(zeros + log_ratio)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert all(jnp.isfinite(metric) for metric in metrics.values())


def test_half_precision_inputs_are_computed_in_float32():
    current, old, sampler, _, advantages, mask = random_batch()
    halves = [array.astype(jnp.bfloat16) for array in (current, old, sampler)]
    value, _ = grpo_loss(*halves, None, advantages, mask, **PLAIN)
    widened, _ = grpo_loss(*[half.astype(jnp.float32) for half in halves], None, advantages, mask, **PLAIN)
    assert value.dtype == jnp.float32 and value == widened


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coefficient": 0.1}, "reference_logprobs_BT"),
        ({"entropy_coefficient": 0.1}, "entropy_BT"),
        ({"aggregation": "sequence"}, "'sequence'"),
        ({"clip_low": 1.5}, "clip_low 1.5"),
        ({"dual_clip": 1.1}, "dual_clip 1.1"),
        ({"correction_clip": 0.0}, "correction_clip 0.0"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        one_token(1.0, 1.0, **settings)
