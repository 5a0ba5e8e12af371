"""What the suites over published sizes share: the model's shape, and the figures of the device they ran on."""

from __future__ import annotations

import dataclasses


def published_config(model: str, num_layers: int, **fields):
    """The ModelConfig of that name with bfloat16 parameters; num_layers 0: the model's own."""
    from orchestra_jax.models.config import MODELS

    config = dataclasses.replace(MODELS[model], parameter_dtype="bfloat16", **fields)
    return dataclasses.replace(config, num_layers=num_layers) if num_layers else config


def device_figures() -> dict[str, object]:
    """Its name, jax's version, and the most bytes that were in use on it, 0 where it does not say."""
    import jax

    device = jax.devices()[0]
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"device": device.device_kind, "jax": jax.__version__, "peak_bytes": peak_bytes}
