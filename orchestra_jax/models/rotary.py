"""Rotary position embedding: a pair (x[i], x[i + H/2]) of a head is turned by position * frequency[i].

    default   frequency[i] = theta ** (-2 i / H)                                     RoFormer, arXiv 2104.09864
    yarn      slow pairs are divided by the factor, fast ones kept, a ramp between    YaRN, arXiv 2309.00071, 3.2 to 3.4
    llama3    the same by wavelength, with another ramp                               Llama 3.1 (arXiv 2407.21783)

Legend: B rows, T tokens, N heads, H head dim, F pairs (H / 2).
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from orchestra_jax.models.config import ModelConfig


def _default(config: ModelConfig):
    return config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)


def _yarn(config: ModelConfig):
    scaling, head_dim = config.rope_scaling, config.head_dim

    def pair_with(num_rotations):
        """The pair (a fraction) that makes so many rotations within the original context."""
        ratio = scaling.original_max_position / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp_F = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)
    frequency_F = _default(config)
    return frequency_F / scaling.factor * ramp_F + frequency_F * (1 - ramp_F)


def _llama3(config: ModelConfig):
    scaling = config.rope_scaling
    frequency_F = _default(config)
    rotations_F = scaling.original_max_position * frequency_F / (2 * math.pi)  # within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share_F = jnp.clip((rotations_F - low) / (high - low), 0, 1)  # of the unscaled frequency
    return (1 - share_F) * frequency_F / scaling.factor + share_F * frequency_F


FREQUENCIES = {"default": _default, "yarn": _yarn, "llama3": _llama3}


def rotary(positions_BT, config: ModelConfig):
    """(cos, sin) of all angles, each float32 [B, T, 1, F]."""
    frequency_F = FREQUENCIES[config.rope_scaling.kind](config)
    angle_BTF = positions_BT[:, :, None].astype(jnp.float32) * frequency_F[None, None, :]
    cos_and_sin = jnp.cos(angle_BTF)[:, :, None, :], jnp.sin(angle_BTF)[:, :, None, :]
    if config.rope_scaling.kind != "yarn":
        return cos_and_sin
    return tuple(config.rope_scaling.attention_factor * each for each in cos_and_sin)


def rotate(x_BTNH, cos_and_sin):
    """Turns the pairs (x[i], x[i + H/2]), the order of Hugging Face's weights, by their angle."""
    cos, sin = cos_and_sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
