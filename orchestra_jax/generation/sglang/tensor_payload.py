"""A safetensors file as /update_weights_from_tensor takes it: a pickle of [(name, torch tensor), ...]. No torch here.

Each tensor's storage lies inline, in the form of torch.save before its zip files, so a server needs no file system and
no memory of the trainer's. The opcodes are written out because pickle names only what it can import. Sources:
torch/serialization.py (_legacy_save), torch/_utils.py (_rebuild_tensor_v2), and the names that SGLang's SafeUnpickler
lets pass (sglang/srt/utils/common.py).
"""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Iterator

from safetensors import safe_open

BUCKET_BYTES = 64 * 2**20  # of tensors in one payload, of which base64 and JSON are made
STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}  # by safetensors' dtype
_KEY = "0"  # of the one storage of a legacy file
_PLATFORM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
_LEGACY_START = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, _PLATFORM))


def tensor_payloads(path: pathlib.Path, bucket_bytes: int = BUCKET_BYTES) -> Iterator[bytes]:
    """Pickles of the file's tensors in its order, each of `bucket_bytes` or of a single larger tensor.

    ValueError for a dtype that no weights are sent in.
    """
    bucket, size = [], 0
    with safe_open(path, framework="numpy") as file:
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if (dtype := entry.get_dtype()) not in STORAGES:
                raise ValueError(f"{path}: {name} is {dtype}; weights are sent in one of {sorted(STORAGES)}")
            data = file.get_tensor(name).tobytes()
            if bucket and size + len(data) > bucket_bytes:
                yield _pickled(bucket)
                bucket, size = [], 0
            bucket.append((name, dtype, entry.get_shape(), data))
            size += len(data)
    yield _pickled(bucket)


def _pickled(tensors: list[tuple[str, str, list[int], bytes]]) -> bytes:
    pairs = [_tuple(_text(name), _tensor(dtype, shape, data)) for name, dtype, shape, data in tensors]
    return b"".join([pickle.PROTO, b"\x04", pickle.EMPTY_LIST, pickle.MARK, *pairs, pickle.APPENDS, pickle.STOP])


def _tensor(dtype: str, shape: list[int], data: bytes) -> bytes:
    """Contiguous, without gradient and hooks."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    storage = _call("torch.storage", "_load_from_bytes", _bytes(_legacy_storage(dtype, data)))
    return _call(
        "torch._utils", "_rebuild_tensor_v2", storage, _int(0), _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides[: len(shape)])), pickle.NEWFALSE, _call("collections", "OrderedDict"),
    )  # fmt: skip


def _legacy_storage(dtype: str, data: bytes) -> bytes:
    """What torch.save writes for one storage: a reference to it, the keys of all, then its length and its bytes."""
    num_values = len(data) // (4 if dtype == "F32" else 2)
    reference = _tuple(
        _text("storage"), _global("torch", STORAGES[dtype]), _text(_KEY), _text("cpu"), _int(num_values), pickle.NONE
    )
    return b"".join(
        [
            _LEGACY_START, pickle.PROTO, b"\x02", reference, pickle.BINPERSID, pickle.STOP, pickle.dumps([_KEY], 2),
            num_values.to_bytes(8, "little"), data,
        ]
    )  # fmt: skip


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return _global(module, name) + _tuple(*arguments) + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _int(number: int) -> bytes:
    return pickle.LONG1 + b"\x08" + number.to_bytes(8, "little", signed=True)


def _bytes(data: bytes) -> bytes:
    return pickle.BINBYTES8 + len(data).to_bytes(8, "little") + data
