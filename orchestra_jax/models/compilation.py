"""What XLA is told about the programs that run a whole model on NVIDIA GPUs. Other platforms take no notice.

The layers' weights are stacked and scanned over. cuBLAS's products read a layer's slice of the stack where it lies;
Triton's are given a copy of it, which took more than half of a decode step (docs/benchmarks.md).
"""

import functools

import jax

COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
