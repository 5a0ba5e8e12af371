"""A GRPO train step compiled ahead of time for a mesh of simulated devices, without allocating it: bytes a device.

    python -m experiments.benchmark --suite=aot --option=model=qwen3-8b

Two programs: the gradients of a micro-batch added to the sum, and the optimizer's step. Shapes stand in for arrays, and
host devices for accelerators, so the bytes of arguments and results are exact, and those of temporaries are what XLA's
CPU compiler needs, which computes bfloat16 products in float32 and fuses less.
"""

from __future__ import annotations

import dataclasses
import os


def run(
    model: str = "qwen3-8b",
    num_layers: int = 0,  # 0: the model's own
    fsdp: int = 8,
    tensor: int = 2,
    precision: str = "bfloat16_master",
    num_tokens: int = 4096,  # of a completion, behind a prompt as long
    group_size: int = 1,
) -> dict[str, object]:
    """Bytes of arguments, results and temporaries per device; a prompt for each device of the `fsdp` axis."""
    num_devices = fsdp * tensor
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"  # before jax starts
    from orchestra_jax.models.config import MODELS

    config = dataclasses.replace(MODELS[model], parameter_dtype="bfloat16")
    if num_layers:
        config = dataclasses.replace(config, num_layers=num_layers)
    programs = compile_step(config, {"data": 1, "fsdp": fsdp, "tensor": tensor}, precision, num_tokens, group_size)
    figures = {"model": model, "num_layers": config.num_layers, "num_devices": num_devices, "precision": precision}
    for name, compiled in programs.items():
        memory = compiled.memory_analysis()
        figures[f"{name}_argument_bytes_per_device"] = memory.argument_size_in_bytes
        figures[f"{name}_output_bytes_per_device"] = memory.output_size_in_bytes
        figures[f"{name}_aliased_bytes_per_device"] = memory.alias_size_in_bytes
        figures[f"{name}_temporary_bytes_per_device"] = memory.temp_size_in_bytes
    return figures


def compile_step(config, axis_sizes, precision, num_tokens, group_size):
    """{"gradients": compiled, "optimizer": compiled}"""
    import jax
    import jax.numpy as jnp

    from orchestra_jax import sharding
    from orchestra_jax.grpo.train_step import LossSettings, add_gradients, apply_gradients, init_state, state_axes
    from orchestra_jax.models.transformer import init_params, logical_axes
    from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
    from orchestra_jax.precision import cast_parameters, recipe_of

    mesh = sharding.make_mesh(axis_sizes)
    optimizer = make_optimizer(OptimizerConfig(name="adamw", precision=precision), num_steps=100)

    def initial():
        return init_state(cast_parameters(init_params(config, jax.random.key(0)), precision), optimizer)

    def placed(shapes, axes):
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            sharding.shardings(axes, mesh),
        )

    shapes = jax.eval_shape(initial)
    state = placed(shapes, state_axes(shapes, config))
    gradient_dtype = recipe_of(precision).gradients
    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, gradient_dtype), shapes.params)
    gradients = placed(gradients, logical_axes(config))
    batch = batch_shapes(axis_sizes["data"] * axis_sizes["fsdp"], num_tokens, group_size)
    batch = placed(
        batch, jax.tree.map(lambda leaf: jax.sharding.PartitionSpec("batch", *[None] * (leaf.ndim - 1)), batch)
    )
    settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "token_mean", 1024)
    reference_BC = batch.sampler_logprobs_BC
    scalar = jnp.float32(1.0)
    with sharding.mesh_context(mesh):
        return {
            "gradients": add_gradients.lower(
                gradients, state.params, batch, None, reference_BC, scalar, scalar, scalar,
                config=config, settings=settings,
            ).compile(),
            "optimizer": apply_gradients.lower(state, gradients, config=config, optimizer=optimizer).compile(),
        }  # fmt: skip


def batch_shapes(num_prompts, num_tokens, group_size):
    import jax

    from orchestra_jax.grpo.batching import MicroBatch

    num_rows = num_prompts * group_size
    fields = {
        "prefix_tokens_PT": ((num_prompts, num_tokens), "int32"),
        "prefix_lengths_P": ((num_prompts,), "int32"),
        "input_tokens_BI": ((num_rows, num_tokens), "int32"),
        "input_lengths_B": ((num_rows,), "int32"),
        "targets_BC": ((num_rows, num_tokens), "int32"),
        "loss_mask_BC": ((num_rows, num_tokens), "bool"),
        "sampler_logprobs_BC": ((num_rows, num_tokens), "float32"),
        "advantages_B": ((num_rows,), "float32"),
    }
    return MicroBatch(**{name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in fields.items()})
