"""The update on a tiny model: log-probabilities, gradients and their bookkeeping.

Plain gradient descent stands in for the optimizer where gradients are compared: its step is the gradient.
Legend: B rows, C completion tokens, T tokens of a whole stream, P groups, G rollouts, K key-value heads.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orchestra_jax.grpo import train_step as module
from orchestra_jax.grpo.batching import BatchShape, make_micro_batches
from orchestra_jax.grpo.train_state import init_state
from orchestra_jax.grpo.train_step import LossSettings, batch_logprobs, train_step
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
from orchestra_jax.precision import RECIPES, cast_parameters
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

TINY = MODELS["tiny"]
NUM_GROUPS, GROUP_SIZE, CHUNK = 4, 2, 64
SETTINGS = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "rollout_mean", CHUNK)
DESCENT = optax.sgd(0.1)
VALID_PG = np.ones((NUM_GROUPS, GROUP_SIZE), bool)


def make_groups(seed=0):
    """Four groups of two rollouts of differing lengths, with given tokens between two turns."""
    rng = np.random.default_rng(seed)
    groups = []
    for p in range(NUM_GROUPS):
        prompt = rng.integers(0, TINY.vocab_size, 3 + p)
        trajectories = []
        for g in range(GROUP_SIZE):
            mask = np.array([*[False] * len(prompt), *[True] * 3, *[False] * 2, *[True] * (1 + p + g)])
            tokens = np.concatenate([prompt, rng.integers(0, TINY.vocab_size, len(mask) - len(prompt))])
            logprobs = np.where(mask, -rng.uniform(3.0, 4.5, len(mask)), 0.0).astype(np.float32)
            trajectories.append(
                Trajectory(
                    instance_id=f"{p}",
                    rollout_index=g,
                    tokens=tokens.astype(np.int32),
                    loss_mask=mask,
                    logprobs=logprobs,
                    policy_versions=np.where(mask, 0, -1),
                    num_prompt_tokens=len(prompt),
                    calls=(),
                    receipts=(),
                    status=EpisodeStatus.ANSWERED,
                    answer="",
                    objectives={},
                )  # fmt: skip
            )
        groups.append(TrajectoryGroup(f"{p}", {}, tuple(trajectories)))
    return groups


GROUPS = make_groups()
ADVANTAGES_PG = np.random.default_rng(1).normal(size=(NUM_GROUPS, GROUP_SIZE)).astype(np.float32)


def micro_batches(groups_per_batch=2, advantages_PG=ADVANTAGES_PG, valid_PG=VALID_PG, groups=GROUPS):
    shape = BatchShape(groups_per_batch, GROUP_SIZE, prefix_buckets=(6,), completion_buckets=(10,))
    return make_micro_batches(groups, advantages_PG, valid_PG, shape)


@functools.cache
def fixed_params(seed=0):
    return jax.device_get(transformer.init_params(TINY, jax.random.key(seed)))


def update(
    batches, optimizer=DESCENT, reference=None, kl_coefficient=0.0, num_updates=1, settings=SETTINGS, num_threads=1
):
    """-> (params after, metrics). The state is donated, so each call starts from a fresh copy."""
    state = init_state(jax.tree.map(jnp.array, fixed_params()), optimizer)
    state, metrics = train_step(
        state, batches, 1.0, reference, kl_coefficient,
        config=TINY, settings=settings, optimizer=optimizer, num_updates=num_updates, num_threads=num_threads,
    )  # fmt: skip
    assert int(state.step) == num_updates
    return jax.device_get(state.params), metrics


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), left, right)


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@jax.jit
def plain_logprobs(params, tokens_BT, temperature):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_BTD, _ = transformer.Transformer(TINY).apply(
        {"params": params}, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)
    )
    logprobs_BTV = jax.nn.log_softmax(hidden_BTD @ transformer.head_weights(params, TINY) / temperature)
    return jnp.take_along_axis(logprobs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=2)[:, :, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_behind_a_shared_prompt_are_those_of_the_whole_stream(temperature):
    (batch,) = micro_batches(NUM_GROUPS)
    logprobs_BC = batch_logprobs(fixed_params(), batch, temperature, config=TINY, chunk=CHUNK)
    trajectories = [trajectory for group in GROUPS for trajectory in group.trajectories]  # already in order of length
    tokens_BT = np.zeros((len(trajectories), 16), np.int32)
    for row, trajectory in enumerate(trajectories):
        tokens_BT[row, : len(trajectory.tokens)] = trajectory.tokens
    expected_BT = plain_logprobs(fixed_params(), tokens_BT, temperature)
    for row, trajectory in enumerate(trajectories):
        start, count = trajectory.num_prompt_tokens - 1, trajectory.num_completion_tokens
        expected_C = np.where(trajectory.loss_mask[start + 1 :], expected_BT[row, start : start + count], 0.0)
        np.testing.assert_allclose(logprobs_BC[row, :count], expected_C, atol=1e-5)


def make_related_groups():
    """Completions that begin alike: one group's for 4 tokens, another's for as far as the shorter one goes."""
    alike = {0: 4, 1: 100, 2: 0, 3: 1}
    groups = []
    for p, group in enumerate(GROUPS):
        first, second = group.trajectories
        width = min(alike[p], second.num_completion_tokens, first.num_completion_tokens)
        tokens = second.tokens.copy()
        tokens[3 + p : 3 + p + width] = first.tokens[3 + p : 3 + p + width]
        groups.append(dataclasses.replace(group, trajectories=(first, dataclasses.replace(second, tokens=tokens))))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "num_updates", "kl_coefficient"), [("token", 1, 0.0), ("sequence", 2, 0.3)])
def test_what_rollouts_share_runs_once_and_changes_nothing(ratio, num_updates, kl_coefficient):
    """Loss, gradient and metrics are those of completions that each run on their own."""
    groups, results = make_related_groups(), []
    valid_PG = VALID_PG.copy()
    valid_PG[0, 1] = False
    settings = dataclasses.replace(SETTINGS, ratio=ratio, entropy_coefficient=0.1)
    for num_shared in (0, 6):
        shape = BatchShape(2, GROUP_SIZE, prefix_buckets=(12,), completion_buckets=(10,), num_shared=num_shared)
        batches = make_micro_batches(groups, ADVANTAGES_PG, valid_PG, shape)
        reference = fixed_params(1) if kl_coefficient else None
        results.append(update(batches, DESCENT, reference, kl_coefficient, num_updates, settings))
    assert max(batch.prefix_lengths_P.max() for batch in batches) == 9  # prompt and shared tokens, as asked for
    (plain, plain_metrics), (shared, metrics) = results
    assert_trees_close(shared, plain, atol=2e-6)
    assert metrics == pytest.approx(plain_metrics, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "groups_per_batch"),
    [
        (SETTINGS, 2),
        (dataclasses.replace(SETTINGS, aggregation="token_mean", entropy_coefficient=0.01), 3),  # padded with rows
    ],
)
def test_micro_batches_add_up_to_one_big_batch(settings, groups_per_batch):
    big, big_metrics = update(micro_batches(NUM_GROUPS), settings=settings)
    small, metrics = update(micro_batches(groups_per_batch), settings=settings)
    assert_trees_close(small, big, atol=1e-6)
    assert metrics.keys() == big_metrics.keys()
    for name, value in big_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
    assert big_metrics["num_tokens"] == sum(trajectory.loss_mask.sum() for g in GROUPS for trajectory in g.trajectories)
    assert big_metrics["num_rollouts"] == NUM_GROUPS * GROUP_SIZE


def test_rollouts_that_are_not_valid_contribute_nothing():
    valid_PG = VALID_PG.copy()
    valid_PG[1, 0] = valid_PG[3] = False
    expected, _ = update(micro_batches(valid_PG=valid_PG))
    advantages_PG = np.where(valid_PG, ADVANTAGES_PG, np.nan)
    batches = micro_batches(advantages_PG=advantages_PG, valid_PG=valid_PG)
    for batch in batches:
        batch.sampler_logprobs_BC[~batch.loss_mask_BC] = np.nan
        is_out_B = ~batch.loss_mask_BC.any(axis=1)
        batch.input_tokens_BI[is_out_B] = 17
    params, metrics = update(batches)
    assert_trees_equal(params, expected)
    assert metrics["num_rollouts"] == 5


def test_a_batch_without_a_valid_rollout_changes_nothing():
    params, metrics = update(micro_batches(valid_PG=~VALID_PG))
    assert_trees_equal(params, fixed_params())
    assert metrics["gradient_norm"] == metrics["loss"] == metrics["num_tokens"] == 0


def test_advantages_move_the_logprobs_of_their_rollouts():
    """A step raises what was better than its group and lowers what was worse."""
    advantages_PG = np.zeros((NUM_GROUPS, GROUP_SIZE), np.float32)
    advantages_PG[2] = [1.0, -1.0]
    (batch,) = micro_batches(NUM_GROUPS, advantages_PG)
    params, _ = update([batch])
    before_BC, after_BC = (
        np.where(batch.loss_mask_BC, batch_logprobs(some, batch, 1.0, config=TINY, chunk=CHUNK), 0.0)
        for some in (fixed_params(), params)
    )
    change_B = (after_BC - before_BC).sum(axis=1)
    assert change_B[2 * GROUP_SIZE] > 0.01 and change_B[2 * GROUP_SIZE + 1] < -0.01


@pytest.mark.slow
def test_old_logprobs_are_computed_once_and_only_for_further_updates(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return batch_logprobs(*args, **kwargs)

    monkeypatch.setattr(module, "batch_logprobs", counted)
    slow = optax.sgd(1e-4)
    once, metrics = update(micro_batches(), slow)
    assert not calls and metrics["ratio_mean"] == 1 and "kl_reference" not in metrics  # and no reference was needed
    twice, _ = update(micro_batches(), slow, num_updates=2)
    assert len(calls) == 2  # one for each micro-batch
    # So near the old policy the second pass has the gradient of the first.
    first, second = (
        np.concatenate([np.ravel(x - y) for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old))])
        for new, old in ((once, fixed_params()), (twice, once))
    )
    assert np.linalg.norm(second - first) < 0.02 * np.linalg.norm(first)
    _, metrics = update(micro_batches(), num_updates=2)
    assert metrics["ratio_mean"] != pytest.approx(1, abs=1e-5)  # a longer step leaves it, and is measured against it


@pytest.mark.slow
def test_the_first_of_two_passes_has_a_ratio_of_exactly_one(monkeypatch):
    """What is old is current there by construction, not by two programs that happen to agree."""
    seen, add_gradients = [], module.add_gradients

    def recorded(gradients, params, batch, old_BC, *args, **kwargs):
        gradients, metrics = add_gradients(gradients, params, batch, old_BC, *args, **kwargs)
        seen.append((old_BC is None, float(metrics["ratio_mean"]), float(metrics["clip_share"])))
        return gradients, metrics

    monkeypatch.setattr(module, "add_gradients", recorded)
    update(micro_batches(), num_updates=2)
    assert seen[:2] == [(True, 1.0, 0.0)] * 2
    assert all(not is_on_policy and ratio != 1.0 for is_on_policy, ratio, _ in seen[2:]) and len(seen) == 4


def test_the_kl_term_pulls_towards_the_reference():
    batches = micro_batches(advantages_PG=np.zeros_like(ADVANTAGES_PG))
    reference = fixed_params(1)
    params, metrics = update(batches, reference=reference, kl_coefficient=0.5)
    before, after = (mean_kl(some, reference, batches) for some in (fixed_params(), params))
    assert metrics["loss"] == pytest.approx(0.5 * before, rel=1e-4)
    assert after < 0.9 * before


def mean_kl(params, reference, batches):
    """The mean over rollouts of their mean over sampled tokens."""
    values = []
    for batch in batches:
        current_BC, reference_BC = (
            np.asarray(batch_logprobs(some, batch, 1.0, config=TINY, chunk=CHUNK)) for some in (params, reference)
        )
        for row, mask_C in enumerate(batch.loss_mask_BC):
            values.append(np.mean(0.5 * (current_BC - reference_BC)[row, mask_C] ** 2))
    return np.mean(values)


def test_two_runs_are_bitwise_equal_and_no_donation_is_wasted():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), num_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, metrics = update(micro_batches(), optimizer, num_updates=2)
    second, same_metrics = update(micro_batches(), optimizer, num_updates=2)
    assert_trees_equal(first, second)
    assert metrics == same_metrics
    assert not np.array_equal(first["embedding"], fixed_params()["embedding"])


def test_a_step_needs_a_batch_and_an_update():
    with pytest.raises(ValueError, match="0 micro-batches"):
        update([])
    with pytest.raises(ValueError, match="num_updates 0"):
        update(micro_batches(), num_updates=0)


def test_threads_add_up_the_same_gradients():
    batches = micro_batches()
    one, metrics_of_one = update(batches)
    two, metrics_of_two = update(batches, num_threads=2)
    again, _ = update(batches, num_threads=2)
    assert_trees_close(two, one, rtol=1e-5, atol=1e-7)
    assert_trees_equal(again, two)
    assert metrics_of_two == pytest.approx(metrics_of_one, rel=1e-5, abs=1e-6)


def test_reference_logprobs_that_are_known_are_not_computed():
    """The same step, and the reference's weights are not read."""
    batches, reference = micro_batches(), fixed_params(seed=1)
    known = [batch_logprobs(reference, batch, 1.0, config=TINY, chunk=CHUNK) for batch in batches]
    computed_params, computed = update(batches, reference=reference, kl_coefficient=0.3)
    state, metrics = train_step(
        init_state(jax.tree.map(jnp.array, fixed_params()), DESCENT), batches, 1.0, None, 0.3,
        config=TINY, settings=SETTINGS, optimizer=DESCENT, num_updates=1, reference_logprobs=known,
    )  # fmt: skip
    assert metrics == computed and metrics["kl_reference"] > 0
    assert_trees_equal(jax.device_get(state.params), computed_params)


def test_a_single_micro_batch_is_its_own_sum():
    """No zeros are made for it."""
    (batch,) = micro_batches(groups_per_batch=NUM_GROUPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "zero_gradients", lambda *_, **__: pytest.fail("zeros were made"))
        alone, _ = update([batch])
    zeros = module.zero_gradients(fixed_params(), config=TINY, dtype="float32")
    denominator = float(module.batch_denominator(batch, settings=SETTINGS))
    total, _ = module.add_gradients(
        zeros, fixed_params(), batch, None, None, 1.0, 0.0, denominator, config=TINY, settings=SETTINGS
    )
    expected = jax.tree.map(lambda old, gradient: old - 0.1 * gradient, fixed_params(), total)
    assert_trees_close(alone, expected, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_add_up_in_the_dtype_of_the_recipe(name):
    recipe = RECIPES[name]
    params = cast_parameters(fixed_params(), name)
    gradients = module.zero_gradients(params, config=TINY, dtype=recipe.gradients)
    added = jax.eval_shape(
        functools.partial(module.add_gradients, config=TINY, settings=SETTINGS),
        gradients, params, micro_batches()[0], None, None, 1.0, 0.0, 1.0,
    )[0]  # fmt: skip
    only = jax.eval_shape(
        functools.partial(module.add_gradients, config=TINY, settings=SETTINGS, dtype=recipe.gradients),
        None, params, micro_batches()[0], None, None, 1.0, 0.0, 1.0,
    )[0]  # fmt: skip
    for tree in (gradients, added, only):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {recipe.gradients}


@pytest.mark.slow
def test_a_small_gradient_behind_a_large_one_is_kept_in_float32_and_lost_in_bfloat16():
    """What the lean recipes give up: 1 + 2^-9 is 1 in bfloat16."""
    kept = {}
    for dtype in ("float32", "bfloat16"):
        start = jax.tree.map(jnp.ones_like, module.zero_gradients(fixed_params(), config=TINY, dtype=dtype))
        batch, *_ = micro_batches(advantages_PG=ADVANTAGES_PG * 1e-3)
        total, _ = module.add_gradients(
            start, fixed_params(), batch, None, None, 1.0, 0.0, 8.0, config=TINY, settings=SETTINGS
        )
        kept[dtype] = max(float(jnp.abs(leaf - 1).max()) for leaf in jax.tree.leaves(total))
    assert 0 < kept["float32"] < 2**-9 and kept["bfloat16"] == 0.0
