"""In the place of SGLang's compiled kernels, of which there are none for a plain CPU: names resolve, calls raise.

A dense Qwen3 without speculative decoding is served by native torch and calls none of them.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments, **named):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU version here")

    missing.__name__ = name
    return missing
