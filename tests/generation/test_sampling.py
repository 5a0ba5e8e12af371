"""The sampler by itself: distributions by hand and by chi-square, truncation, constraints.

Legend: B draws, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.generation.sampling import BLOCK, SamplingRows, sample

PROBABILITIES = np.array([0.05, 0.1, 0.15, 0.3, 0.4])
NUM_DRAWS = 20_000
jitted_sample = jax.jit(sample)


def rows(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Settings of rows that differ in their keys alone."""
    full = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    full = {name: jnp.full(num_rows, value, jnp.float32) for name, value in full.items()}
    key_data_R2 = jnp.stack([jnp.arange(num_rows, dtype=jnp.uint32), jnp.full(num_rows, 9, jnp.uint32)], axis=1)
    return SamplingRows(full["temperature"], jnp.full(num_rows, top_k), full["top_p"], full["min_p"], key_data_R2)


def draw(probabilities, is_allowed=None, **settings):
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (NUM_DRAWS, len(probabilities)))
    if is_allowed is not None:
        is_allowed = jnp.broadcast_to(jnp.asarray(is_allowed), logits_BV.shape)
    tokens_B, logprobs_B = jitted_sample(logits_BV, rows(NUM_DRAWS, **settings), jnp.arange(NUM_DRAWS), is_allowed)
    return np.asarray(tokens_B), np.asarray(logprobs_B)


def chi_square(tokens_B, probabilities):
    expected = NUM_DRAWS * probabilities
    counts = np.bincount(tokens_B, minlength=len(probabilities))
    assert (counts[expected == 0] == 0).all()
    return (np.square(counts - expected)[expected > 0] / expected[expected > 0]).sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, np.square([1, 2, 3, 6, 8]) / 114),
        ({"top_k": 2}, np.array([0, 0, 0, 3, 4]) / 7),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.6}, np.array([0, 0, 0, 3, 4]) / 7),  # .4 is less than .6, so .3 still comes in
        ({"top_p": 0.39}, np.array([0, 0, 0, 0, 1.0])),
        ({"min_p": 0.3}, np.array([0, 0, 3, 6, 8]) / 17),  # .3 of .4 is .12
        ({"top_k": 3, "top_p": 0.8}, np.array([0, 0, 0, 3, 4]) / 7),  # of what top-k leaves, .7 / .85 > .8
    ],
)
def test_samples_follow_the_distribution_and_carry_the_untruncated_log_probability(settings, expected):
    tokens_B, logprobs_B = draw(PROBABILITIES, **settings)
    assert chi_square(tokens_B, expected) < 18.5  # 4 degrees of freedom: 1 in 1,000
    scaled = PROBABILITIES ** (1 / settings.get("temperature", 1.0))
    np.testing.assert_allclose(logprobs_B, np.log(scaled / scaled.sum())[tokens_B], atol=1e-5)


def test_a_vocabulary_of_several_blocks_is_sampled_as_a_whole():
    weights = np.random.default_rng(0).gamma(0.3, size=2 * BLOCK + 5)
    weights[BLOCK : 2 * BLOCK] = 0  # a block that must never be met
    probabilities = weights / weights.sum()
    tokens_B, _ = draw(probabilities)
    order = np.argsort(probabilities)[::-1]
    groups = np.array_split(order, 8)  # pooled, so that each group is expected often enough
    pooled = np.array([probabilities[group].sum() for group in groups])
    place = np.zeros(len(weights), int)
    for number, group in enumerate(groups):
        place[group] = number
    kept = pooled > 5 / NUM_DRAWS
    counts = np.bincount(place[tokens_B], minlength=8)
    expected = NUM_DRAWS * pooled
    assert (np.square(counts - expected)[kept] / expected[kept]).sum() < 24.3  # 7 degrees of freedom: 1 in 1,000
    assert (probabilities[tokens_B] > 0).all()


def test_greedy_takes_the_most_probable_token():
    tokens_B, logprobs_B = draw(PROBABILITIES, temperature=0.0)
    assert (tokens_B == 4).all()
    np.testing.assert_allclose(logprobs_B, np.log(0.4), atol=1e-5)


def test_what_is_not_allowed_is_never_sampled_however_probable():
    is_allowed = [True, False, True, False, False]
    tokens_B, logprobs_B = draw(PROBABILITIES, is_allowed)
    assert chi_square(tokens_B, np.array([1, 0, 3, 0, 0]) / 4) < 10.9  # 1 degree of freedom
    np.testing.assert_allclose(logprobs_B, np.log(PROBABILITIES)[tokens_B], atol=1e-5)
    tokens_B, _ = draw([1e-30, 1.0], [True, False], temperature=0.1)  # its weight beside the other underflows
    assert (tokens_B == 0).all()
    assert (draw([1e-30, 1.0], [True, False], temperature=0.0)[0] == 0).all()


def test_a_row_is_sampled_as_it_would_be_without_its_neighbours_settings():
    logits_RV = 4 * jax.random.normal(jax.random.key(0), (64, 2 * BLOCK + 5))
    is_cut_R = jnp.arange(64) % 2 == 1
    plain, mixed = rows(64), rows(64)._replace(top_p_R=jnp.where(is_cut_R, 0.5, 1.0))
    for alone, beside in zip(
        jitted_sample(logits_RV, plain, jnp.arange(64)), jitted_sample(logits_RV, mixed, jnp.arange(64))
    ):
        np.testing.assert_array_equal(alone[~is_cut_R], beside[~is_cut_R])


def test_greedy_takes_the_first_of_equals_in_any_block():
    logits_RV = jnp.zeros((3, 3 * BLOCK)).at[0, [BLOCK + 3, BLOCK + 9, 2 * BLOCK]].set(2.0).at[1, 2 * BLOCK].set(1.0)
    tokens_R, _ = jitted_sample(logits_RV, rows(3, temperature=0.0), jnp.arange(3))
    assert tokens_R.tolist() == [BLOCK + 3, 2 * BLOCK, 0]
