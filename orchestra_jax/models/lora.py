"""Low-rank adaptation: a weight W [I, O] becomes W + (alpha / rank) A [I, R] B [R, O] (LoRA, arXiv 2106.09685).

The factors are a tree of their own beside the parameters, which stay as they are: train the factors through `merge`,
export what `merge` returns. With the warm start trained in full, or merged, into the base, the base is the reference
policy. B starts at 0, so that the first policy is the base.

Legend: L layers, I flattened dims in, O flattened dims out, R rank.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

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


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 32.0
    projections: tuple[str, ...] = tuple(PROJECTIONS)

    def __post_init__(self):
        unknown = set(self.projections) - set(PROJECTIONS)
        if unknown or not self.projections or self.rank < 1:
            raise ValueError(
                f"rank {self.rank}, projections {self.projections}: the rank must be 1 or more, and the projections "
                f"some of {sorted(PROJECTIONS)}"
            )


def init_lora(config: LoraConfig, params, key) -> dict[str, dict[str, jax.Array]]:
    """{projection: {"a": [L, I, R], "b": [L, R, O]}} in float32; A normal with variance 1 / I, B 0."""
    factors = {}
    for name, one in zip(config.projections, jax.random.split(key, len(config.projections)), strict=True):
        num_layers, num_in, num_out = _matrix_shape(params, name)
        factors[name] = {
            "a": jax.random.normal(one, (num_layers, num_in, config.rank)) * num_in**-0.5,
            "b": jnp.zeros((num_layers, config.rank, num_out)),
        }
    return factors


def merge(config: LoraConfig, params, factors):
    """Parameters with the products added in float32, in their own dtype; `params` and the other leaves are shared."""
    layers = {name: dict(part) for name, part in params["layers"].items()}
    for name, factor in factors.items():
        part, _ = PROJECTIONS[name]
        weight = params["layers"][part][name]
        product_LIO = jnp.matmul(factor["a"], factor["b"]) * (config.alpha / config.rank)
        layers[part][name] = (weight + product_LIO.reshape(weight.shape)).astype(weight.dtype)
    return {**params, "layers": layers}


def _matrix_shape(params, name):
    part, num_contracted = PROJECTIONS[name]
    num_layers, *dims = params["layers"][part][name].shape
    return num_layers, math.prod(dims[:num_contracted]), math.prod(dims[num_contracted:])
