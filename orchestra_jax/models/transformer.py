"""The transformer: tokens -> hidden states and the new keys and values. Log-probabilities: logprobs.py.

Pre-norm blocks, x += attention(norm(x)); x += feed_forward(norm(x)), with grouped-query attention and SwiGLU. Qwen3
norms each query and key head before the rotary embedding, Qwen2.5 has biases there, Llama neither. Source: Qwen3
technical report (arXiv:2505.09388) and the `qwen3`, `qwen2` and `llama` models of Hugging Face transformers, whose
logits it reproduces. No dropout, no loss, no mesh, no weight files.

Legend: B rows, T new tokens, D hidden, N query heads, K key-value heads, H head dim, F feed-forward, L layers, V vocab,
C cache rows, S cache slots.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from orchestra_jax.models import attention, decode_attention, rotary
from orchestra_jax.models.config import ModelConfig

# What the backward pass finds stored from the forward pass of a layer; "none" stores all, without rematerialisation.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "feed_forward": jax.checkpoint_policies.save_only_these_names("gate", "up"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

ACTIVATIONS = ("batch", "length", "activation")
HEADS = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}  # the logical axis of each projection
JOINED = "query_key_value"  # of `join_projections`


class Transformer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segment_ids_BT, cache=None, segment_lengths_BM=None):
        """-> (hidden_BTD in the compute dtype after the final norm, (keys_LBTKH, values_LBTKH) of the new tokens).

        Segment id 0 is padding. A token sees its own segment at its own or an earlier position; with a cache, new real
        tokens are segment 1 and see the filled slots of their cache row too. `segment_lengths_BM` says no more than
        the ids of rows that are packed from the left, positions rising, but spares fused attention a mask of T x T.
        ValueError if the cache is for another number of token rows.
        """
        config = self.config
        embedding_shape = (config.vocab_size, config.hidden_size)
        embedding_VD = _parameter(self, "embedding", embedding_shape, ("vocab", "embed"), config.hidden_size)
        # On a mesh the rows are whole before they are looked up: rows and batch may lie on the same axis.
        embedding_VD = nn.with_logical_constraint(embedding_VD, ("vocab", "activation"))
        hidden_BTD = jnp.take(embedding_VD, tokens_BT, axis=0).astype(config.compute_dtype)
        hidden_BTD = nn.with_logical_constraint(hidden_BTD, ACTIVATIONS)
        context = {
            "rotary": rotary.rotary(positions_BT, config),
            "own": attention.own_visibility(positions_BT, segment_ids_BT, segment_lengths_BM),
        }
        cached = None
        if cache is not None:
            if len(cache.lengths_B) != len(tokens_BT):
                raise ValueError(
                    f"{len(tokens_BT)} token rows with a cache for {len(cache.lengths_B)}: make them equal"
                )
            if decode_attention.can_attend(config, cache, tokens_BT.shape[1]):
                cached = jnp.arange(config.num_layers)
                lengths_B = jnp.where(segment_ids_BT[:, 0] > 0, jnp.minimum(cache.lengths_B, cache.num_slots), 0)
                context["stack"] = decode_attention.CacheStack(cache.keys_LCKHS, cache.values_LCKSH, lengths_B)
            else:
                cached = (cache.keys_LCKHS, cache.values_LCKSH)
                context["cache"] = attention.cache_visibility(
                    positions_BT, segment_ids_BT, cache.lengths_B, cache.num_slots
                )
        layers = nn.scan(
            _rematerialised_block(config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        hidden_BTD, new_keys_values = layers(hidden_BTD, cached, context)
        if not config.is_tied:  # declared with the rest, read by head_weights
            _parameter(self, "head", embedding_shape[::-1], ("embed", "vocab"), config.hidden_size)
        return RMSNorm(config, "norm", name="final_norm")(hidden_BTD), new_keys_values


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cached, context):
        attended_BTD, new_keys_values = Attention(self.config, name="attention")(
            RMSNorm(self.config, "norm", name="attention_norm")(x_BTD), cached, context
        )
        x_BTD = x_BTD + attended_BTD
        x_BTD += FeedForward(self.config, name="feed_forward")(
            RMSNorm(self.config, "norm", name="feed_forward_norm")(x_BTD)
        )
        return nn.with_logical_constraint(x_BTD, ACTIVATIONS), new_keys_values


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cached, context):
        """`cached`: this layer's ([C, K, H, S], [C, K, S, H]), or its number in the stack of the context, or None.

        Returns the output and the new tokens' keys and values, each [B, T, K, H].
        """
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = _queries_keys_values(self, x_BTD)
        output_shape = (config.num_heads, config.head_dim, config.hidden_size)
        fan_in = config.num_heads * config.head_dim
        output_NHD = _parameter(self, "output", output_shape, ("heads", "head_dim", "embed"), fan_in)
        if config.has_qk_norm:
            q_BTNH = RMSNorm(config, "head_dim", name="query_norm")(q_BTNH)
            k_BTKH = RMSNorm(config, "head_dim", name="key_norm")(k_BTKH)
        q_BTNH, k_BTKH = (rotary.rotate(x, context["rotary"]) for x in (q_BTNH, k_BTKH))
        if "stack" in context:
            attended_BTNH = decode_attention.attend(q_BTNH, k_BTKH, v_BTKH, context["stack"], cached)
        else:
            blocks = [attention.KeyBlock(*attention.for_products(k_BTKH, v_BTKH), context["own"])]
            if cached is not None:
                blocks.append(attention.KeyBlock(*cached, context["cache"]))
            attended_BTNH = attention.attend(q_BTNH, blocks, config.attention)
        return _adapted(self, "output", attended_BTNH, output_NHD, num_contracted=2), (k_BTKH, v_BTKH)


def _queries_keys_values(module, x_BTD):
    """The three projections of the tokens, biases added; by one product where the parameters are joined for it."""
    config = module.config
    num_queries, num_keys = config.num_heads, config.num_kv_heads
    if module.has_variable("params", JOINED):
        joined_BTNH = project(x_BTD, module.get_variable("params", JOINED))
        projected = jnp.split(joined_BTNH, (num_queries, num_queries + num_keys), axis=2)
    else:
        projected = []
        for name, num_heads in (("query", num_queries), ("key", num_keys), ("value", num_keys)):
            shape, names = (config.hidden_size, num_heads, config.head_dim), ("embed", HEADS[name], "head_dim")
            projected.append(_adapted(module, name, x_BTD, _parameter(module, name, shape, names, config.hidden_size)))
    if not config.has_qkv_bias:
        return projected
    return [_add_bias(module, f"{name}_bias", x, HEADS[name]) for name, x in zip(HEADS, projected, strict=True)]


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        hidden, width = self.config.hidden_size, self.config.intermediate_size
        gate_DF = _parameter(self, "gate", (hidden, width), ("embed", "mlp"), hidden)
        up_DF = _parameter(self, "up", (hidden, width), ("embed", "mlp"), hidden)
        down_FD = _parameter(self, "down", (width, hidden), ("mlp", "embed"), width)
        gate_BTF = _named(self, "gate", _adapted(self, "gate", x_BTD, gate_DF))
        up_BTF = _named(self, "up", _adapted(self, "up", x_BTD, up_DF))
        gated_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return _adapted(self, "down", gated_BTF, down_FD)


def _named(module, name, x_BTF):
    """`x` under the name by which the policy "feed_forward" stores it.

    On a GPU the copy into the stack of all layers would become one with the product, which is then computed twice: once
    for the stack, once for the layer. The barrier keeps the two apart.
    """
    if module.config.remat == "feed_forward":
        x_BTF = jax.lax.optimization_barrier(x_BTF)
    return checkpoint_name(x_BTF, name)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last dim, in float32; the result has x's dtype."""

    config: ModelConfig
    logical_name: str

    @nn.compact
    def __call__(self, x):
        initializer = nn.with_logical_partitioning(nn.initializers.ones, (self.logical_name,))
        scale_D = self.param("scale", initializer, (x.shape[-1],), jnp.dtype(self.config.parameter_dtype))
        x_float32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_float32), axis=-1, keepdims=True) + self.config.norm_epsilon)
        scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x_float32 * inverse * scale).astype(x.dtype)


def _parameter(module, name, shape, logical_names, fan_in):
    """Declares a parameter with its logical axis names: normal with variance 1 / fan_in."""
    initializer = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), logical_names)
    return module.param(name, initializer, shape, jnp.dtype(module.config.parameter_dtype))


def _add_bias(module, name, x_BTNH, heads_name):
    initializer = nn.with_logical_partitioning(nn.initializers.zeros, (heads_name, "head_dim"))
    bias_NH = module.param(name, initializer, x_BTNH.shape[2:], jnp.dtype(module.config.parameter_dtype))
    return x_BTNH + bias_NH.astype(x_BTNH.dtype)[None, None]


def _adapted(module, name, x_BTI, weight_IO, num_contracted=1):
    """`project`, and the low-rank product beside it where the parameters hold factors (lora.py)."""
    projected_BTO = project(x_BTI, weight_IO, num_contracted)
    if not module.has_variable("params", f"{name}_a"):
        return projected_BTO
    a_IR, b_RO = (module.get_variable("params", f"{name}_{factor}") for factor in "ab")
    return projected_BTO + module.config.lora_scale * project(project(x_BTI, a_IR, num_contracted), b_RO)


def project(x_BTI, weight_IO, num_contracted=1):
    """x . weight over x's last and the weight's first `num_contracted` dims, in x's dtype.

    Both sides are flattened to matrices: with two contracted dims, as in the weight's gradient, XLA CPU would first
    write a transposed copy of the widest activations.
    """
    batch_shape, output_shape = x_BTI.shape[:-num_contracted], weight_IO.shape[num_contracted:]
    weight = weight_IO.astype(x_BTI.dtype).reshape(-1, math.prod(output_shape))
    return (x_BTI.reshape(-1, len(weight)) @ weight).reshape(*batch_shape, *output_shape)


def _rematerialised_block(remat):
    if remat == "none":
        return Block
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat={remat!r} is not one of {sorted([*REMAT_POLICIES, 'none'])}")
    # Inside scan nothing can be merged with the forward pass, so the guard against it would only cost time.
    return nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)


def init_params(config: ModelConfig, key):
    """Fresh parameters: a nested dict of plain arrays; those of the layers have a leading layer dim."""
    return nn.unbox(jax.jit(functools.partial(_init_boxed, config))(key))


def logical_axes(config: ModelConfig):
    """The tree of `init_params` with a PartitionSpec of logical axis names at each leaf. Allocates nothing."""
    with nn.logical_axis_rules(()):  # the one token that it is told of need not fill a mesh
        return nn.get_partition_spec(jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0)))


def _init_boxed(config, key):
    one_token_BT = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, one_token_BT, one_token_BT, one_token_BT)["params"]


def join_projections(params):
    """The parameters with the query, key and value matrices of a layer side by side, [L, D, N + 2 K, H].

    One product for three, of the same columns: for decoding on a GPU, which a few rows by one of them do not fill.
    Parameters with low-rank factors beside these matrices stay as they are.
    """
    attention = dict(params["layers"]["attention"])
    if any(f"{name}_a" in attention for name in HEADS):
        return params
    joined_LDNH = jnp.concatenate([attention.pop(name) for name in HEADS], axis=2)
    layers = {**params["layers"], "attention": {**attention, JOINED: joined_LDNH}}
    return {**params, "layers": layers}


def head_weights(params, config: ModelConfig):
    """The output projection [D, V]: the embedding's transpose if tied. On a mesh it is gathered over D, once."""
    head_DV = params["embedding"].T if config.is_tied else params["head"]
    return nn.with_logical_constraint(head_DV, ("activation", "vocab"))
