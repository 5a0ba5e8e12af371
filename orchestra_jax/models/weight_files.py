"""Parameters on their way to a server, step after step: one safetensors file, written as fast as the disk takes it.

Each tensor is laid out as Hugging Face names it, and cast, on the device, while the one before is being written; no
copy of the whole is made. What has not changed since the last whole file (the very same array, as a LoRA's base is) is
left out. To save a model for good: huggingface.save_pretrained.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import weakref
from collections.abc import Iterator

import jax
import numpy as np

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.huggingface import flat_leaves, names_by_leaf
from orchestra_jax.models.huggingface_config import DTYPES, config_fields

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NUM_AHEAD = 2  # tensors that the device prepares while one is written
ALIGNMENT = 8  # bytes; of the header


class WeightWriter:
    """Writes parameters of `config` in `dtype`. Remembers, without holding them, the arrays of its last whole file."""

    def __init__(self, config: ModelConfig, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {DTYPES}")
        self._config, self._dtype = config, dtype
        self._names_by_leaf = names_by_leaf(config)
        self._whole: dict[str, weakref.ref] = {}

    def write(self, params, directory: pathlib.Path) -> bool:
        """Writes model.safetensors and config.json; whether it is all weights. Not flushed to disk.

        params: arrays on any devices of this process.
        """
        leaves = flat_leaves(params)
        changed = [path for path, leaf in leaves.items() if path not in self._whole or self._whole[path]() is not leaf]
        changed = changed or list(leaves)  # a file of nothing would be refused
        is_whole = len(changed) == len(leaves)
        fields = {**config_fields(self._config), "torch_dtype": self._dtype}
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        with open(directory / "model.safetensors", "wb", buffering=0) as file:
            _write_all(file, _header(self._shapes(leaves, changed), self._dtype))
            for array in _ahead(self._arrays(leaves, changed)):
                _write_all(file, np.asarray(array).reshape(-1).view(np.uint8).data)
        if is_whole:
            self._whole = {path: weakref.ref(leaf) for path, leaf in leaves.items()}
        return is_whole

    def _shapes(self, leaves, changed) -> Iterator[tuple[str, tuple[int, ...]]]:
        for path in changed:
            names, num_in = self._names_by_leaf[path]
            shape = leaves[path].shape[1:] if path.startswith("layers/") else leaves[path].shape
            for name in names:
                yield name, _their_shape(shape, num_in)

    def _arrays(self, leaves, changed) -> Iterator[jax.Array]:
        for path in changed:
            names, num_in = self._names_by_leaf[path]
            for layer in range(len(names)):
                is_stacked = path.startswith("layers/")
                yield _their_layout(leaves[path], layer if is_stacked else None, num_in=num_in, dtype=self._dtype)


def _their_shape(shape: tuple[int, ...], num_in: int) -> tuple[int, ...]:
    if num_in > 0:
        return math.prod(shape[num_in:]), math.prod(shape[:num_in])
    return (math.prod(shape),) if num_in == 0 else shape


@functools.partial(jax.jit, static_argnames=("num_in", "dtype"))
def _their_layout(leaf, layer, *, num_in: int, dtype: str):
    """A matrix lies [out, in] there and [in, out] here (huggingface.py); `layer` None: the leaf is not stacked."""
    array = (leaf if layer is None else leaf[layer]).astype(dtype)
    shape = _their_shape(array.shape, num_in)
    return array.reshape(shape[::-1]).T if num_in > 0 else array.reshape(shape)


def _header(shapes: Iterator[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """The length in 8 bytes, little-endian, and the JSON of names, shapes and places, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes:
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _ahead(arrays: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """The same arrays, NUM_AHEAD of them dispatched before they are asked for."""
    pending: list[jax.Array] = []
    for array in arrays:
        pending.append(array)
        if len(pending) > NUM_AHEAD:
            yield pending.pop(0)
    yield from pending


def _write_all(file, data) -> None:
    """A write of gigabytes may take a part alone."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
