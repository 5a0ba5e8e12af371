"""What XLA is told about the programs that run a whole model, by platform.

On NVIDIA GPUs: the layers' weights are stacked and scanned over. cuBLAS's products read a layer's slice of the stack
where it lies; Triton's are given a copy of it, which took more than half of a decode step (docs/benchmarks.md).
On CPUs: XLA's fusion emitters take two fifths of a program's compilation, and what they emit runs no faster
(docs/log.md). Options come and go with XLA's versions (jax 0.11 has no such emitters): what it does not know is left
out.
"""

from __future__ import annotations

import functools
import threading

import jax

COMPILER_OPTIONS = {
    "cpu": {"xla_cpu_use_fusion_emitters": False},
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


@functools.cache
def compiler_options(platform: str) -> dict[str, object]:
    """Those of `COMPILER_OPTIONS` for `platform` that the XLA of this process knows."""
    return {name: value for name, value in COMPILER_OPTIONS.get(platform, {}).items() if is_known(name, value)}


def is_known(name: str, value: object) -> bool:
    """Whether XLA takes the option, by a program of nothing; other errors than its refusal are raised."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(jax.ShapeDtypeStruct((), "float32")).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def jit(function, **settings):
    """`jax.jit` with the options of the platform, which is asked for at the first use and not at import.

    On a platform that has some, jax takes such a function at the top level alone, not inside of another jit.
    """
    return _Jitted(function, settings)


class _Jitted:
    def __init__(self, function, settings):
        self._function, self._settings = function, settings
        self._jitted, self._lock = None, threading.Lock()  # threads that come first together compile once
        functools.update_wrapper(self, function)

    def _on_platform(self):
        with self._lock:
            if self._jitted is None:
                options = compiler_options(jax.default_backend())
                self._jitted = jax.jit(self._function, compiler_options=options or None, **self._settings)
            return self._jitted

    def __call__(self, *args, **kwargs):
        return self._on_platform()(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._on_platform(), name)
