"""Parameters on their way to a server, step after step: one safetensors file, written as fast as the disk takes it.

Tensors are cast on the device, laid out as Hugging Face names them in tiles that stay in a core's cache, and written
from there by a few threads at a time; no copy of the whole is made. What has not changed since the last whole file (the
very same array, as a LoRA's base is) is left out. To save a model for good: huggingface.save_pretrained.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import weakref
from collections.abc import Sequence

import jax
import numpy as np

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.huggingface import flat_leaves, names_by_leaf
from orchestra_jax.models.huggingface_config import DTYPES, config_fields

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NUM_WRITERS = min(8, os.cpu_count() or 1)
NUM_AHEAD = 2  # tensors that the device prepares beyond those that are being written
TILE_ROWS, BLOCK_COLUMNS = 8, 1024  # of a matrix that is transposed: four times as fast as in one piece
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
        self._write_tensors(leaves, changed, directory / "model.safetensors")
        if is_whole:
            self._whole = {path: weakref.ref(leaf) for path, leaf in leaves.items()}
        return is_whole

    def _write_tensors(self, leaves, changed, path: pathlib.Path) -> None:
        tensors = [(path, *each) for path in changed for each in self._tensors(path, leaves[path])]
        header = _header([(name, _their_shape(shape, num_in)) for _, name, _, shape, num_in in tensors], self._dtype)
        with open(path, "wb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(NUM_WRITERS) as pool:
            _write_at(file.fileno(), header, 0)
            start, pending = len(header), collections.deque()
            for leaf_path, _, layer, shape, num_in in tensors:
                array = _one_layer(leaves[leaf_path], layer, self._dtype)
                pending.append(pool.submit(_write_tensor, file.fileno(), start, array, num_in))
                start += math.prod(shape) * np.dtype(self._dtype).itemsize
                if len(pending) > NUM_WRITERS + NUM_AHEAD:
                    pending.popleft().result()
            for each in pending:
                each.result()

    def _tensors(self, path, leaf) -> list[tuple[str, int | None, tuple[int, ...], int]]:
        """(their name, the layer or None, our shape, number of input dims) of each tensor of a leaf."""
        names, num_in = self._names_by_leaf[path]
        if not path.startswith("layers/"):
            return [(names[0], None, leaf.shape, num_in)]
        return [(name, layer, leaf.shape[1:], num_in) for layer, name in enumerate(names)]


def _their_shape(shape: tuple[int, ...], num_in: int) -> tuple[int, ...]:
    if num_in > 0:
        return math.prod(shape[num_in:]), math.prod(shape[:num_in])
    return (math.prod(shape),) if num_in == 0 else shape


def _one_layer(leaf: jax.Array, layer: int | None, dtype: str) -> jax.Array | np.ndarray:
    """`layer` None: the leaf is not stacked. On a CPU nothing is copied where the dtype is right."""
    if leaf.dtype == dtype and all(device.platform == "cpu" for device in leaf.devices()):
        return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
    return _cast_layer(leaf, layer, dtype=dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast_layer(leaf, layer, *, dtype: str):
    return (leaf if layer is None else leaf[layer]).astype(dtype)


def _header(shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """The length in 8 bytes, little-endian, and the JSON of names, shapes and places, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes:
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(descriptor: int, start: int, array: jax.Array, num_in: int) -> None:
    """A matrix lies [out, in] there and [in, out] here (huggingface.py). `start`: where it begins, in bytes."""
    host = np.asarray(array)
    host = host.view(f"u{host.dtype.itemsize}")  # numpy copies its own types faster
    if num_in <= 0:
        _write_at(descriptor, host.reshape(-1).view(np.uint8).data, start)
        return
    matrix_IO = host.reshape(math.prod(host.shape[:num_in]), -1)
    num_in_dims, num_out = matrix_IO.shape
    block_OI = np.empty((min(BLOCK_COLUMNS, num_out), num_in_dims), host.dtype)
    for column in range(0, num_out, BLOCK_COLUMNS):
        num_columns = min(BLOCK_COLUMNS, num_out - column)
        for row in range(0, num_in_dims, TILE_ROWS):
            tile_IO = matrix_IO[row : row + TILE_ROWS, column : column + num_columns]
            block_OI[:num_columns, row : row + TILE_ROWS] = tile_IO.T
        _write_at(descriptor, block_OI[:num_columns].reshape(-1).view(np.uint8).data, start)
        start += num_columns * num_in_dims * host.itemsize


def _write_at(descriptor: int, data, start: int) -> None:
    """A write of gigabytes may take a part alone."""
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, start)
        view, start = view[num_written:], start + num_written
