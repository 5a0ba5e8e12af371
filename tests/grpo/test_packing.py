"""Packing: the layout by hand, the waste, the speed, and that how a batch is cut changes neither loss nor gradient."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra_jax.grpo import train_step as module
from orchestra_jax.grpo.batching import BatchShape, make_micro_batches
from orchestra_jax.grpo.kl_penalty import reference_kl
from orchestra_jax.grpo.packing import PackedShape, layout, make_packed_batches, pack_lengths, wasted_share
from orchestra_jax.grpo.scoring import ScoringSettings, score_groups
from orchestra_jax.grpo.train_step import LossSettings, add_gradients, batch_denominator, batch_logprobs
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

TINY = MODELS["tiny"]
NUM_GROUPS, GROUP_SIZE, CHUNK = 4, 2, 64


def trajectory(tokens, mask, num_prompt_tokens, objectives=None):
    mask = np.array(mask, bool)
    return Trajectory(
        instance_id="i", rollout_index=0, tokens=np.array(tokens, np.int32), loss_mask=mask,
        logprobs=np.where(mask, -0.5 - np.arange(len(mask)), 0.0).astype(np.float32),
        policy_versions=mask - 1, num_prompt_tokens=num_prompt_tokens, calls=(), receipts=(),
        status=EpisodeStatus.ANSWERED, answer="", objectives=objectives or {},
    )  # fmt: skip


def test_the_layout_by_hand():
    groups = [
        TrajectoryGroup("a", {}, (trajectory([5, 6, 7], [0, 1, 1], 1), trajectory([5, 8], [0, 1], 1))),
        TrajectoryGroup("b", {}, (trajectory([9, 1, 2, 3], [0, 1, 0, 1], 1), trajectory([9, 4], [0, 1], 1))),
    ]
    trained_PG = np.array([[True, True], [True, False]])
    shape = PackedShape(num_rows=2, num_tokens=6, num_segments=2)
    (batch,) = make_packed_batches(groups, np.array([[1.0, -1.0], [2.0, 7.0]]), trained_PG, shape)
    # The longest first; then 3 tokens, which do not fit behind it; then 2, which fit best where 2 are left.
    np.testing.assert_array_equal(batch.tokens_RT, [[9, 1, 2, 3, 5, 8], [5, 6, 7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask_RT, [[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.sampler_logprobs_RT, [[0, -1.5, 0, -3.5, 0, -1.5], [0, -1.5, -2.5, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_lengths_RS, [[4, 2], [3, 0]])
    np.testing.assert_array_equal(batch.advantages_RS, [[2, -1], [1, 0]])
    np.testing.assert_array_equal(batch.numbers_RS, [[2, 1], [0, -1]])
    segments_RT, positions_RT = layout(batch.segment_lengths_RS, 6)
    np.testing.assert_array_equal(segments_RT, [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(positions_RT, [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]])
    assert wasted_share([batch]) == 3 / 12


def test_a_row_that_holds_its_number_of_segments_is_full():
    assert [sorted(row) for row in pack_lengths([1] * 5, 10, 2)] == [[0, 1], [2, 3], [4]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_every_trajectory_has_one_place_and_no_row_is_overfull(lengths, num_segments):
    rows = pack_lengths(lengths, 40, num_segments)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 40 and 1 <= len(row) <= num_segments for row in rows)


def test_what_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="trajectory 1 has 9 tokens and a row 8: raise tokens_per_row"):
        pack_lengths([3, 9], 8, 2)


@functools.cache
def fixed_params(seed=0):
    return jax.device_get(transformer.init_params(TINY, jax.random.key(seed)))


def make_groups(seed=0):
    """Rollouts of differing lengths, with given tokens between two turns."""
    rng = np.random.default_rng(seed)
    groups = []
    for p in range(NUM_GROUPS):
        prompt = rng.integers(0, TINY.vocab_size, 3 + p)
        rollouts = []
        for g in range(GROUP_SIZE):
            mask = [*[False] * len(prompt), *[True] * 3, *[False] * 2, *[True] * (1 + p + 2 * g)]
            tokens = np.concatenate([prompt, rng.integers(0, TINY.vocab_size, len(mask) - len(prompt))])
            rollouts.append(trajectory(tokens, mask, len(prompt)))
        groups.append(TrajectoryGroup(f"{p}", {}, tuple(rollouts)))
    return groups


GROUPS = make_groups()
ADVANTAGES_PG = np.random.default_rng(1).normal(size=(NUM_GROUPS, GROUP_SIZE))
TRAINED_PG = np.ones((NUM_GROUPS, GROUP_SIZE), bool)
TRAINED_PG[1, 1] = False
CUTS = {
    "shared prompts": BatchShape(NUM_GROUPS, GROUP_SIZE, (6,), (14,)),
    "shared prompts, micro-batches": BatchShape(1, GROUP_SIZE, (6,), (14,)),
    "one row each": PackedShape(8, 20, 1),
    "packed": PackedShape(2, 48, 4),
    "packed, micro-batches": PackedShape(1, 32, 3),
}
NUM_BATCHES = {"shared prompts": 1, "shared prompts, micro-batches": 4, "one row each": 1, "packed": 1}
NUM_BATCHES["packed, micro-batches"] = 3


def loss_and_gradient(shape, loss_settings):
    """Over all micro-batches of one cut, with old and reference policies that differ from the current one."""
    make = make_packed_batches if isinstance(shape, PackedShape) else make_micro_batches
    batches = make(GROUPS, ADVANTAGES_PG, TRAINED_PG, shape)
    params = fixed_params()
    denominator = max(sum(float(batch_denominator(batch, settings=loss_settings)) for batch in batches), 1.0)
    gradients, loss = jax.tree.map(jnp.zeros_like, params), 0.0
    for batch in batches:
        old, reference = (batch_logprobs(fixed_params(seed), batch, 0.9, config=TINY, chunk=CHUNK) for seed in (1, 2))
        gradients, metrics = add_gradients(
            gradients, params, batch, old, reference, 0.9, 0.1, denominator, config=TINY, settings=loss_settings
        )
        loss += float(metrics["loss"])
    return len(batches), loss, jax.device_get(gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "correction", "kl", "aggregation"),
    [
        ("sequence", "sequence", "k3", "rollout_mean"),
        ("token", "token", "k2", "token_mean"),
        ("cispo", "token", "k2", "constant"),
        ("token", "sequence", "k3", "sequence_mean"),
    ],
)
def test_how_a_batch_is_cut_changes_neither_loss_nor_gradient(ratio, correction, kl, aggregation):
    loss_settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.01, aggregation, CHUNK, ratio, correction, kl, 20)
    found = {name: loss_and_gradient(shape, loss_settings) for name, shape in CUTS.items()}
    assert {name: num_batches for name, (num_batches, *_) in found.items()} == NUM_BATCHES
    _, loss, gradients = found["shared prompts"]
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for _, other_loss, other_gradients in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-5)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * size), other_gradients, gradients
        )


def gradients_and_calls(monkeypatch, batch, old, reference, loss_settings, is_fused, run=jax.jit):
    """-> ((gradients, metrics), how often token_loss was called). Traced anew, so that the patches are seen."""
    calls, token_loss = [], module.token_loss
    with monkeypatch.context() as patch:
        patch.setattr(module, "token_loss", lambda *args, **kwargs: calls.append(1) or token_loss(*args, **kwargs))
        if not is_fused:
            patch.setattr(module, "is_elementwise", lambda *_: False)
        add = run(functools.partial(module.add_gradients.__wrapped__, config=TINY, settings=loss_settings))
        return add(None, fixed_params(), batch, old, reference, 0.9, 0.1, 3.0), len(calls)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ratio", "correction", "kl", "aggregation", "shape", "is_on_policy"),
    [
        ("token", "token", "k2", "rollout_mean", "packed", False),
        slow("cispo", "token", "k2", "sequence_mean", "shared prompts", True),
        slow("token", "token", "k2", "rollout_mean", "packed", True),
        slow("cispo", "none", "k3", "token_mean", "packed", True),
        slow("cispo", "none", "k3", "token_mean", "packed", False),
        slow("token", "none", "k3", "constant", "shared prompts", True),
        slow("token", "none", "k3", "constant", "shared prompts", False),
        slow("cispo", "token", "k2", "sequence_mean", "shared prompts", False),
    ],
)
def test_the_loss_of_tokens_alone_has_the_gradients_of_the_loss_of_rollouts(
    monkeypatch, ratio, correction, kl, aggregation, shape, is_on_policy
):
    loss_settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, aggregation, CHUNK, ratio, correction, kl, 20)
    make = make_packed_batches if isinstance(CUTS[shape], PackedShape) else make_micro_batches
    (batch,) = make(GROUPS, ADVANTAGES_PG, TRAINED_PG, CUTS[shape])
    old, reference = (batch_logprobs(fixed_params(seed), batch, 0.9, config=TINY, chunk=CHUNK) for seed in (1, 2))
    policies = (None, None) if is_on_policy else (old, reference)
    (fused, num_fused), (plain, num_plain) = (
        gradients_and_calls(monkeypatch, batch, *policies, loss_settings, is_fused) for is_fused in (True, False)
    )
    assert num_fused > 0 == num_plain
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[0]))
    assert size > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * size), fused, plain)


@pytest.mark.parametrize("other", [{"ratio": "sequence"}, {"correction": "sequence"}, {"entropy_coefficient": 0.1}])
def test_what_reads_more_than_a_token_is_not_taken_token_by_token(monkeypatch, other):
    settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "rollout_mean", CHUNK)
    (batch,) = make_packed_batches(GROUPS, ADVANTAGES_PG, TRAINED_PG, CUTS["packed"])
    changed = dataclasses.replace(settings, **other)
    _, num_calls = gradients_and_calls(monkeypatch, batch, None, None, changed, True, run=jax.make_jaxpr)
    assert num_calls == 0


def first_update(advantages_PG):
    """-> gradients and metrics of a packed batch of which the trainer has not seen anything before."""
    loss_settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "rollout_mean", CHUNK)
    (batch,) = make_packed_batches(GROUPS, advantages_PG, TRAINED_PG, PackedShape(2, 48, 4))
    zeros = jax.tree.map(jnp.zeros_like, fixed_params())
    gradients, metrics = add_gradients(
        zeros, fixed_params(), batch, None, None, 1.0, 0.0, 7.0, config=TINY, settings=loss_settings
    )
    return jax.device_get(gradients), metrics


@pytest.mark.slow
def test_the_first_update_has_a_ratio_of_one_and_clips_nothing():
    gradients, metrics = first_update(ADVANTAGES_PG)
    assert (metrics["ratio_mean"], metrics["clip_share"], metrics["dual_clip_share"]) == (1.0, 0.0, 0.0)
    assert metrics["sampler_gap_mean"] > 0.1  # apart from it: these rollouts are another sampler's
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_equal_rollouts_have_a_gradient_of_exactly_zero():
    gradients, _ = first_update(np.zeros_like(ADVANTAGES_PG))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_k1_of_each_rollout_is_the_difference_of_its_sums():
    shape = PackedShape(2, 48, 4)
    found_PG = reference_kl(GROUPS, fixed_params(2), 0.9, config=TINY, chunk=CHUNK, shape=shape)
    (batch,) = make_micro_batches(GROUPS, ADVANTAGES_PG, np.ones_like(TRAINED_PG), CUTS["shared prompts"])
    logprobs_BC = batch_logprobs(fixed_params(2), batch, 0.9, config=TINY, chunk=CHUNK)
    k1_B = np.where(batch.loss_mask_BC, batch.sampler_logprobs_BC - logprobs_BC, 0.0).sum(axis=1)
    np.testing.assert_allclose(found_PG.ravel(), k1_B, rtol=1e-4)


def long_tailed_lengths(num=2048, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(4000), 1.0, num), 256, 24_000).astype(int)


@pytest.mark.parametrize("seed", range(3))
def test_at_most_a_twentieth_of_the_slots_is_padding(seed):
    """Log-normal lengths, median 4,000, sigma 1, cut to 256..24,000; rows of 24,576 tokens, 4 a micro-batch."""
    lengths = long_tailed_lengths(seed=seed)
    num_rows = -(-len(pack_lengths(lengths, 24_576, 64)) // 4) * 4
    assert 1 - lengths.sum() / (num_rows * 24_576) <= 0.05


@pytest.mark.slow
def test_two_thousand_long_rollouts_are_scored_and_packed_within_a_second():
    """Reward, advantage and packing of 256 groups of 8 with 24,000 tokens each, in CPU seconds of this process."""
    rng, num_tokens = np.random.default_rng(0), 24_000
    mask = np.arange(num_tokens) > 500
    base = trajectory(rng.integers(0, 1000, num_tokens), mask, 500)
    objectives = (Objective("outcome", "maximize", 0.0, 1.0), Objective("cost_usd", "minimize", 0.0, 1.0))

    def rollout():
        values = {"outcome": float(rng.integers(2)), "cost_usd": float(rng.random())}
        return Trajectory(**{**base.__dict__, "objectives": values})

    weights = {"outcome": 0.5, "cost_usd": 0.5}
    groups = [TrajectoryGroup(f"{p}", weights, tuple(rollout() for _ in range(8))) for p in range(256)]
    shape = PackedShape(4, 24_576, 8)
    start_s = time.process_time()
    scored = score_groups(groups, objectives, ScoringSettings())
    kept = list(scored.kept)
    batches = make_packed_batches([groups[p] for p in kept], scored.advantages_KG, scored.trained_PG[kept], shape)
    spent_s = time.process_time() - start_s
    print(f"{spent_s:.2f} CPU seconds")
    assert len(kept) > 240 and sum(int((batch.numbers_RS >= 0).sum()) for batch in batches) == 8 * len(kept)
    assert spent_s < 1.0, f"{spent_s:.2f} CPU seconds"


MESHES = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
from orchestra_jax import sharding
from orchestra_jax.models import transformer
from tests.grpo.test_packing import (
    ADVANTAGES_PG, BatchShape, CHUNK, GROUPS, LossSettings, PackedShape, TINY, TRAINED_PG,
    add_gradients, batch_denominator, batch_logprobs, make_micro_batches, make_packed_batches,
)

assert jax.device_count() == 8
config = dataclasses.replace(TINY, vocab_size=38)  # a multiple of the tensor axis
fixed_params = [jax.device_get(transformer.init_params(config, jax.random.key(seed))) for seed in (0, 1)]
settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.01, "rollout_mean", CHUNK, "sequence", "token", "k3")
(packed,) = make_packed_batches(GROUPS, ADVANTAGES_PG, TRAINED_PG, PackedShape(8, 32, 3))
(shared,) = make_micro_batches(GROUPS, ADVANTAGES_PG, TRAINED_PG, BatchShape(4, 2, (6,), (14,)))
axes = transformer.logical_axes(config)
other = {
    id(batch): batch_logprobs(fixed_params[1], batch, 0.9, config=config, chunk=CHUNK) for batch in (packed, shared)
}
found = []
for sizes, batch in (
    ({"data": 1}, packed), ({"fsdp": 4, "tensor": 2}, packed), ({"data": 8}, packed),
    ({"data": 2, "fsdp": 2, "tensor": 2}, packed), ({"data": 2, "tensor": 2}, shared),
    ({"fsdp": 2, "context": 2, "tensor": 2}, packed),
):
    mesh = sharding.make_mesh(sizes)
    params = sharding.place(fixed_params[0], sharding.shardings(axes, mesh))
    rows = jax.sharding.NamedSharding(mesh, sharding.mesh_axes(("batch",), mesh))
    placed = type(batch)(*(jax.device_put(x, rows) for x in batch))
    old = jax.device_put(np.asarray(other[id(batch)]), rows)
    with sharding.mesh_context(mesh):
        denominator = float(batch_denominator(placed, settings=settings))
        zeros = jax.tree.map(jnp.zeros_like, params)
        gradients, metrics = add_gradients(
            zeros, params, placed, old, old, 0.9, 0.1, denominator, config=config, settings=settings
        )
    found.append((float(metrics["loss"]), jax.device_get(gradients)))
loss, gradients = found[0]
size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
for other_loss, other in found[1:]:
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * size), other, gradients)
print("meshes", len(found))
"""


@pytest.mark.slow
def test_no_mesh_shape_changes_the_loss_or_the_gradient():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    result = subprocess.run([sys.executable, "-c", MESHES], env=environment, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "meshes 6\n"
