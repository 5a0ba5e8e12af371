"""The transformer against properties: causality, padding, packing, remat, scan. Its logits: test_huggingface.py.

Legend: B rows, T tokens, D hidden, V vocab.
"""

import collections
import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import attention, lora, rotary, transformer
from orchestra_jax.models.config import MODELS, ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = MODELS["tiny"]


def apply(config, params, tokens_BT, positions_BT=None, segment_ids_BT=None):
    tokens_BT = jnp.asarray(tokens_BT)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    return forward(config, params, tokens_BT, jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens_BT, positions_BT, segment_ids_BT):
    return transformer.Transformer(config).apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)[0]


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


def test_a_token_depends_on_itself_and_earlier_tokens_only(params):
    tokens_BT = random_tokens(1, 7)
    embedded_TD = params["embedding"][tokens_BT[0]]

    def hidden_at(embedding_TD, step):
        # Each token its own row of the embedding, so that the gradient tells the tokens apart.
        inputs = {**params, "embedding": embedding_TD}
        config = dataclasses.replace(TINY, vocab_size=7)
        return apply(config, inputs, np.arange(7)[None])[0, step].sum()

    gradient_of = jax.jit(jax.grad(hidden_at))
    for step in (0, 3, 6):
        influence_T = np.abs(np.asarray(gradient_of(embedded_TD, step))).sum(axis=1)
        assert (influence_T[: step + 1] > 0).all()
        assert (influence_T[step + 1 :] == 0).all()


def test_padding_changes_no_real_token_and_is_finite(params):
    tokens_BT = random_tokens(2, 5)
    expected_BTD = apply(TINY, params, tokens_BT)
    padded_BT = np.concatenate([random_tokens(2, 2, seed=1), tokens_BT, random_tokens(2, 3, seed=2)], axis=1)
    positions_BT = np.tile([0, 0, 0, 1, 2, 3, 4, 0, 0, 0], (2, 1))
    segment_ids_BT = np.tile([0, 0, 1, 1, 1, 1, 1, 0, 0, 0], (2, 1))
    hidden_BTD = apply(TINY, params, padded_BT, positions_BT, segment_ids_BT)
    assert np.isfinite(hidden_BTD).all()
    np.testing.assert_allclose(hidden_BTD[:, 2:7], expected_BTD, atol=1e-5)


def test_a_row_of_padding_has_finite_values_and_gradients(params):
    zeros_BT = np.zeros((1, 4), int)
    gradient_of = jax.jit(jax.grad(lambda params: apply(TINY, params, zeros_BT, zeros_BT, zeros_BT).sum()))
    gradients = gradient_of(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_packed_segments_equal_separate_rows(params):
    first_BT, second_BT = random_tokens(1, 4), random_tokens(1, 6, seed=1)
    packed_BTD = apply(
        TINY,
        params,
        np.concatenate([first_BT, second_BT], axis=1),
        np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
        np.array([[1] * 4 + [2] * 6]),
    )
    np.testing.assert_allclose(packed_BTD[:, :4], apply(TINY, params, first_BT), atol=1e-5)
    np.testing.assert_allclose(packed_BTD[:, 4:], apply(TINY, params, second_BT), atol=1e-5)


def test_scan_equals_layer_by_layer(params):
    tokens_BT = jnp.asarray(random_tokens(2, 6))
    positions_BT = jnp.tile(jnp.arange(6)[None], (2, 1))
    hidden_BTD = params["embedding"][tokens_BT]
    block = jax.jit(transformer.Block(TINY).apply)
    context = {
        "rotary": rotary.rotary(positions_BT, TINY),
        "own": attention.own_visibility(positions_BT, jnp.ones_like(tokens_BT)),
    }
    for layer in range(TINY.num_layers):
        layer_params = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        hidden_BTD, _ = block({"params": layer_params}, hidden_BTD, None, context)
    final_norm = transformer.RMSNorm(TINY, "norm")
    hidden_BTD = final_norm.apply({"params": params["final_norm"]}, hidden_BTD)
    np.testing.assert_allclose(apply(TINY, params, tokens_BT), hidden_BTD, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_joined_projections_compute_the_same(has_bias):
    config = dataclasses.replace(TINY, has_qkv_bias=has_bias)
    params = jax.tree.map(lambda x: x + 0.1, transformer.init_params(config, jax.random.key(0)))  # fresh biases are 0
    tokens_BT = random_tokens(2, 7)
    joined = transformer.join_projections(params)
    assert set(params["layers"]["attention"]) - set(joined["layers"]["attention"]) == {"query", "key", "value"}
    np.testing.assert_allclose(apply(config, joined, tokens_BT), apply(config, params, tokens_BT), atol=1e-4)


def test_projections_with_factors_are_not_joined(params):
    attached = lora.attach(lora.init_lora(lora.LoraConfig(rank=2), params, jax.random.key(1)), params)
    assert transformer.join_projections(attached) is attached


def test_rope_theta_changes_the_output_and_only_relative_positions_count(params):
    tokens_BT = random_tokens(1, 6)
    hidden_BTD = apply(TINY, params, tokens_BT)
    other_theta_BTD = apply(dataclasses.replace(TINY, rope_theta=100.0), params, tokens_BT)
    assert np.abs(hidden_BTD - other_theta_BTD).max() > 1e-3
    shifted_BTD = apply(TINY, params, tokens_BT, np.arange(6)[None] + 17)
    np.testing.assert_allclose(hidden_BTD, shifted_BTD, atol=1e-5)


@pytest.mark.slow
def test_rematerialisation_changes_no_value_and_no_gradient(params):
    tokens_BT = random_tokens(2, 5)

    def loss(params, config):
        return jnp.square(apply(config, params, tokens_BT)).mean()

    gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradients = gradient_of(params, TINY)
    for remat in transformer.REMAT_POLICIES:
        remat_value, remat_gradients = gradient_of(params, dataclasses.replace(TINY, remat=remat))
        np.testing.assert_allclose(value, remat_value, rtol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradients, remat_gradients)


def test_the_program_of_a_deep_model_is_as_long_as_that_of_a_shallow_one():
    def num_operations(num_layers):
        config = dataclasses.replace(TINY, num_layers=num_layers, remat="full")
        shapes = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
        gradient_of = jax.jit(jax.grad(lambda params: apply(config, params, np.zeros((1, 4), int)).sum()))
        return gradient_of.lower(shapes).as_text().count(" = ")

    assert num_operations(2) == num_operations(20)


def test_unknown_remat_is_refused(params):
    with pytest.raises(ValueError, match="remat='half'"):
        apply(dataclasses.replace(TINY, remat="half"), params, random_tokens(1, 2))


def test_bfloat16_compute_stays_near_float32(params):
    tokens_BT = random_tokens(2, 5)
    hidden_BTD = apply(dataclasses.replace(TINY, compute_dtype="bfloat16"), params, tokens_BT)
    assert hidden_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden_BTD.astype(jnp.float32), apply(TINY, params, tokens_BT), atol=0.15)


def operand_dtypes(function, *inputs):
    """{primitive: dtypes of its operands} of everything that the function computes, sub-programs included."""
    found = collections.defaultdict(set)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for sub in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
            ):
                if isinstance(sub, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                    walk(getattr(sub, "jaxpr", sub))
            found[equation.primitive.name] |= {each.aval.dtype.name for each in equation.invars}

    walk(jax.make_jaxpr(function)(*inputs).jaxpr)
    return found


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_norms_and_softmax_are_float32_over_bfloat16_weights(params, implementation):
    """Every exponential, sum and reciprocal root, forward and backward; the products of weights are bfloat16."""
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", attention=implementation)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens_BT = random_tokens(1, 4)
    dtypes = operand_dtypes(jax.grad(lambda params: apply(config, params, tokens_BT).astype(jnp.float32).sum()), halves)
    assert "bfloat16" in dtypes["dot_general"]
    for name in ("exp", "rsqrt", "reduce_max"):
        assert dtypes[name] == {"float32"}, name


def test_logical_axes_name_every_dim_of_every_parameter():
    for config in (TINY, dataclasses.replace(TINY, is_tied=False)):
        shapes = jax.eval_shape(lambda key, config=config: transformer.init_params(config, key), jax.random.key(0))
        axes = transformer.logical_axes(config)
        jax.tree.map(lambda shape, names: np.testing.assert_equal(len(names), shape.ndim), shapes, axes)
        assert tuple(axes["layers"]["attention"]["query"]) == ("layers", "embed", "heads", "head_dim")
        assert tuple(axes["layers"]["attention_norm"]["scale"]) == ("layers", "norm")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6b", 0.596), ("1.7b", 1.721), ("4b", 4.022), ("8b", 8.191), ("14b", 14.768), ("32b", 32.762)],
)
def test_named_sizes_have_the_published_number_of_parameters(name, billions):
    config = MODELS[f"qwen3-{name}"]
    shapes = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_config_refuses_heads_that_do_not_divide_and_odd_head_dims():
    with pytest.raises(ValueError, match="num_heads=3"):
        ModelConfig(8, 4, 4, 1, num_heads=3, num_kv_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="head_dim=5"):
        ModelConfig(8, 4, 4, 1, num_heads=2, num_kv_heads=2, head_dim=5)
