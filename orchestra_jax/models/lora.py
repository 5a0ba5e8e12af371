"""Low-rank adaptation: a weight W [I, O] becomes W + (alpha / rank) A [I, R] B [R, O] (LoRA, arXiv 2106.09685).

The factors are a tree of their own beside the base, which never moves: A of "layers/attention/query" is
"layers/attention/query_a". They are what is differentiated, optimised and saved. `attach` puts them beside the weights,
where the layers find them and add x A B to x W: no product of a weight's size exists, nor does its gradient. `merge`
adds the products to the weights: what is sampled from, and exported.

B starts at 0, so that the first policy is the base. The warm start's factors are merged before reinforcement learning
starts with new ones: the base is the reference policy then.

Legend: L layers, I dims in, O dims out, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.transformer import logical_axes

# The matrices of a layer: where they are, and how many of their dims (behind the layer's) are contracted.
PROJECTIONS = {
    "query": ("attention", 1),
    "key": ("attention", 1),
    "value": ("attention", 1),
    "output": ("attention", 2),
    "gate": ("feed_forward", 1),
    "up": ("feed_forward", 1),
    "down": ("feed_forward", 1),
}


@dataclasses.dataclass
class LoraConfig:
    rank: int = 0  # 0: there are no factors, all parameters are trained
    alpha: float = 32.0
    projections: tuple[str, ...] = tuple(PROJECTIONS)


def check_lora(config: LoraConfig) -> None:
    """ValueError for a rank or a scale that is none, and for projections that no layer has."""
    if set(config.projections) - set(PROJECTIONS) or not config.projections or config.rank < 0 or not config.alpha > 0:
        raise ValueError(
            f"lora.rank {config.rank}, lora.alpha {config.alpha}, lora.projections {config.projections}: the rank must "
            f"be 0 or more, alpha positive, and the projections some of {sorted(PROJECTIONS)}"
        )


def init_lora(config: LoraConfig, base, key):
    """{part: {projection_a: [L, I..., R], projection_b: [L, R, O...]}} under "layers", in float32.

    A normal with variance 1 / (product of I), B 0. `base`: parameters, or their shapes.
    """
    layers: dict[str, dict[str, jax.Array]] = {}
    for name, one in zip(config.projections, jax.random.split(key, len(config.projections)), strict=True):
        part, num_in = PROJECTIONS[name]
        num_layers, *dims = base["layers"][part][name].shape
        factors = layers.setdefault(part, {})
        factors[f"{name}_a"] = (
            jax.random.normal(one, (num_layers, *dims[:num_in], config.rank)) * math.prod(dims[:num_in]) ** -0.5
        )
        factors[f"{name}_b"] = jnp.zeros((num_layers, config.rank, *dims[num_in:]))
    return {"layers": layers}


def factor_axes(config: ModelConfig):
    """The logical axes of the factors of every projection: those of the weight's dims; the rank is never split."""
    layers: dict[str, dict[str, PartitionSpec]] = {}
    axes = logical_axes(config)["layers"]
    for name, (part, num_in) in PROJECTIONS.items():
        first, *dims = axes[part][name]
        factors = layers.setdefault(part, {})
        factors[f"{name}_a"] = PartitionSpec(first, *dims[:num_in], None)
        factors[f"{name}_b"] = PartitionSpec(first, None, *dims[num_in:])
    return {"layers": layers}


def attach(params, base=None):
    """What a forward pass reads: the factors `params` beside the weights of `base`; without a base, `params`."""
    if base is None:
        return params
    layers = {name: {**part, **params["layers"].get(name, {})} for name, part in base["layers"].items()}
    return {**base, "layers": layers}


def merge(base, factors, scale: float):
    """`base` with `scale` A B added in float32, each weight in its own dtype; all other leaves are shared."""
    layers = {name: dict(part) for name, part in base["layers"].items()}
    for part, those in factors["layers"].items():
        for name in sorted(each.removesuffix("_a") for each in those if each.endswith("_a")):
            layers[part][name] = _with_product(layers[part][name], those[f"{name}_a"], those[f"{name}_b"], scale)
    return {**base, "layers": layers}


@functools.partial(jax.jit, static_argnames="scale")
def _with_product(weights, a, b, scale):
    """Layer by layer: the product of all layers in float32 would be twice the weights in bfloat16."""

    def add(layer):
        weight, a, b = layer
        a_IR, b_RO = (x.astype(jnp.float32) for x in (a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)))
        return (weight + scale * jnp.matmul(a_IR, b_RO).reshape(weight.shape)).astype(weight.dtype)

    return jax.lax.map(add, (weights, a, b))
