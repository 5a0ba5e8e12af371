"""Precision recipes: in what dtype parameters, their master copy, optimizer moments and summed gradients are kept.

A bfloat16 has 8 significant bits: an update below 1/512 of a parameter rounds to nothing, and at the rates of
reinforcement learning (1e-6) nearly all of them do. So a bfloat16 parameter needs either a float32 master copy, which
takes the updates and is rounded into the parameter, or stochastic rounding, which takes them in expectation. The
arithmetic of a step is float32 in every recipe. Bytes a parameter, gradients included: float32 16, float32_lean 12,
bfloat16_master 18, bfloat16_lean 12, bfloat16_stochastic 10, bfloat16_stochastic_lean 8. The lean ones lose where many
micro-batches are summed, in bfloat16; moments in bfloat16 are rounded to the nearest (optimizers.check_optimizer bounds
how slow they may be).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Recipe:
    parameters: str
    master: str  # "none": the parameters are their own
    moments: str
    gradients: str  # what micro-batches add up in
    has_stochastic_rounding: bool = False


RECIPES = {
    "float32": Recipe("float32", "none", "float32", "float32"),
    "float32_lean": Recipe("float32", "none", "bfloat16", "float32"),
    "bfloat16_master": Recipe("bfloat16", "float32", "float32", "float32"),
    "bfloat16_lean": Recipe("bfloat16", "float32", "bfloat16", "bfloat16"),
    "bfloat16_stochastic": Recipe("bfloat16", "none", "bfloat16", "float32", has_stochastic_rounding=True),
    "bfloat16_stochastic_lean": Recipe("bfloat16", "none", "bfloat16", "bfloat16", has_stochastic_rounding=True),
}


class PrecisionState(NamedTuple):
    inner: object  # the optimizer's own state, its moments in the recipe's dtype
    master: object  # float32 parameters, or None
    step: jax.Array  # int32: what the bits of stochastic rounding are drawn from


def recipe_of(name: str) -> Recipe:
    """ValueError for a name that is no recipe's."""
    if name not in RECIPES:
        raise ValueError(f"precision {name!r} is not one of {sorted(RECIPES)}")
    return RECIPES[name]


def cast_parameters(params, name: str):
    """Parameters as the recipe `name` keeps them."""
    return cast_floats(params, recipe_of(name).parameters)


def with_precision(optimizer: optax.GradientTransformation, name: str) -> optax.GradientTransformation:
    """The optimizer under a recipe; "float32" is the optimizer itself.

    Its updates are what takes the old parameters to the new ones in float32: `optax.apply_updates` rounds to nothing.
    """
    recipe = recipe_of(name)
    if recipe == RECIPES["float32"]:
        return optimizer

    def init(params):
        exact = cast_floats(params, "float32")
        master = exact if recipe.master == "float32" else None
        return PrecisionState(cast_floats(optimizer.init(exact), recipe.moments), master, jnp.int32(0))

    def update(gradients, state, params):
        exact = cast_floats(params, "float32")
        start = exact if state.master is None else state.master
        inner = cast_floats(state.inner, "float32")
        updates, inner = optimizer.update(cast_floats(gradients, "float32"), inner, start)
        step = state.step + 1
        if recipe.parameters == "float32":
            return updates, PrecisionState(cast_floats(inner, recipe.moments), None, step)
        target = optax.apply_updates(start, updates)
        if recipe.has_stochastic_rounding:
            rounded = _round_stochastically(target, jax.random.fold_in(jax.random.key(0), state.step))
        else:
            rounded = cast_floats(target, recipe.parameters)
        moves = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, rounded, exact)
        master = None if state.master is None else target
        return moves, PrecisionState(cast_floats(inner, recipe.moments), master, step)

    return optax.GradientTransformation(init, update)


def cast_floats(tree, dtype):
    """Arrays of floats to `dtype`; numbers, counters and keys stay as they are."""

    def cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim else leaf

    return jax.tree.map(cast, tree)


def _round_stochastically(tree, key):
    """Float32 to one of the two neighbouring bfloat16, the nearer the likelier: the expectation is the value itself."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(_round_leaf(leaf, one) for leaf, one in zip(leaves, keys, strict=True))


def _round_leaf(x, key):
    # A bfloat16 is the upper half of a float32: add a random lower half, then cut it off.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_random_words(x.shape, key) >> 16)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.bfloat16)  # of a NaN the sum may be any number, 0 too


def _random_words(shape, key):
    """A 32-bit word for each place, a hash of the place (modulo 2^32) and of the key.

    jax.random's own bits cost a hundred operations a parameter, and an update on a GPU would wait for them more than
    for memory; nothing secret hangs on these.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mixed(_mixed(place) ^ jax.random.bits(key, (), jnp.uint32))


def _mixed(x):
    """Every bit of the result hangs on every bit of `x` (C. Wellons' lowbias32, prospecting for hash functions)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
