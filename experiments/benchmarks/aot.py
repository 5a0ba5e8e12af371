"""A GRPO train step compiled ahead of time for a mesh of simulated devices, without allocating it: bytes a device.

    python -m experiments.benchmark --suite=aot --option=model=qwen3-8b
    python -m experiments.benchmark --suite=aot --option=model=qwen3-8b --option=platform=h200

Two programs: the gradients of a micro-batch added to the sum, and the optimizer's step. Shapes stand in for arrays, and
host devices for accelerators, so the bytes of arguments and results are exact, and those of temporaries are what XLA's
CPU compiler needs, which computes bfloat16 products in float32 and fuses less. With `platform=h200` XLA compiles for
GPUs, which need not be there, jax[cuda13] has to be: cuDNN's attention, cuBLAS's products, and temporaries as they are
on the card, short of what is chosen by timing kernels.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

from experiments.benchmarks.published import published_config

# What XLA is told about a card that is not there. Figures of NVIDIA's data sheet and CUDA's tables for capability 9.0.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 62914560 memory_bandwidth: 4800000000000 device_memory_size: 150754820096
}
"""


def run(
    model: str = "qwen3-8b",
    num_layers: int = 0,  # 0: the model's own
    fsdp: int = 8,
    tensor: int = 2,
    precision: str = "bfloat16_master",
    num_tokens: int = 4096,  # of a completion, behind a prompt as long
    group_size: int = 1,
    batching: str = "shared_prompt",  # "packed": rows of twice as many tokens, four segments each
    remat: str = "full",
    platform: str = "cpu",
) -> dict[str, object]:
    """Bytes of arguments, results and temporaries per device; a prompt, or a row, for each device of the `fsdp` axis.

    ValueError for a platform or a batching that is none.
    """
    if batching not in ("shared_prompt", "packed"):
        raise ValueError(f"batching {batching!r} is not one of ['packed', 'shared_prompt']")
    if platform not in ("cpu", "h200"):
        raise ValueError(f"platform {platform!r} is not one of ['cpu', 'h200']")
    num_devices = fsdp * tensor
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"  # before jax starts
    config = published_config(model, num_layers, remat=remat)
    batch = packed_shapes(fsdp, 2 * num_tokens) if batching == "packed" else batch_shapes(fsdp, num_tokens, group_size)
    with absent_h200s(num_devices) if platform == "h200" else contextlib.nullcontext() as devices:
        programs = compile_step(config, {"data": 1, "fsdp": fsdp, "tensor": tensor}, precision, batch, devices)
    figures = {"model": model, "num_layers": config.num_layers, "num_devices": num_devices, "precision": precision}
    figures |= {"batching": batching, "remat": remat, "platform": platform}
    for name, compiled in programs.items():
        memory = compiled.memory_analysis()
        figures[f"{name}_argument_bytes_per_device"] = memory.argument_size_in_bytes
        figures[f"{name}_output_bytes_per_device"] = memory.output_size_in_bytes
        figures[f"{name}_aliased_bytes_per_device"] = memory.alias_size_in_bytes
        figures[f"{name}_temporary_bytes_per_device"] = memory.temp_size_in_bytes
        figures[f"{name}_cudnn_attentions"] = compiled.as_text().count('custom_call_target="__cudnn$fmha')
    return figures


@contextlib.contextmanager
def absent_h200s(num_devices: int):
    """The devices to compile for, while the code is told that its platform is a GPU, and jax of what capability.

    The names that are answered for are jax's own, of 0.10 and 0.11.
    """
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    answers = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda capability: float(capability) <= 9.0,
        "is_cuda_compute_capability_equal": lambda capability: float(capability) == 9.0,
    }
    described = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x{num_devices}x1")
    with mock.patch.multiple(cudnn, **answers), mock.patch.object(jax, "default_backend", lambda: "gpu"):
        yield described.devices


def compile_step(config, axis_sizes, precision, batch, devices=None):
    """{"gradients": compiled, "optimizer": compiled}; `batch`: its shapes."""
    import jax

    from orchestra_jax import sharding
    from orchestra_jax.grpo.train_state import apply_gradients, init_state, state_axes
    from orchestra_jax.grpo.train_step import LossSettings, add_gradients
    from orchestra_jax.models.transformer import init_params, logical_axes
    from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
    from orchestra_jax.precision import cast_parameters, recipe_of

    mesh = sharding.make_mesh(axis_sizes, devices)
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
    batch = placed(
        batch, jax.tree.map(lambda leaf: jax.sharding.PartitionSpec("batch", *[None] * (leaf.ndim - 1)), batch)
    )
    settings = LossSettings(0.2, 0.28, 10.0, 2.0, 0.0, "token_mean", 1024)
    (reference_BC,) = (leaf for name, leaf in batch._asdict().items() if name.startswith("sampler_logprobs"))
    scalar = jax.ShapeDtypeStruct((), "float32")
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


def packed_shapes(num_rows, num_tokens, num_segments=4):
    """A PackedBatch of shapes."""
    import jax

    from orchestra_jax.grpo.packing import PackedBatch

    tokens, segments = (num_rows, num_tokens), (num_rows, num_segments)
    dtypes = (("int32", "bool", "float32"), ("int32", "float32", "int32"))
    shapes = [(shape, dtype) for shape, some in zip((tokens, segments), dtypes, strict=True) for dtype in some]
    return PackedBatch(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
