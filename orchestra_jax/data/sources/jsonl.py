"""A file of JSON lines as a sequence: any row by its number, whatever the size of the file, in constant memory.

Opening reads nothing of the rows: an index beside the file (`rows.jsonl.index`) holds where each sound row begins and
ends, and both are mapped into memory. The index is made once, in one pass that holds every row against its format:

    header   JSON in one padded line: the size and time of the data file, the format, the bad rows that were left out
    body     int64 [N, 2]: begin and end of each row in bytes

An index of another state of the file, or made under another format or flag, is made again.
"""

from __future__ import annotations

import array
import hashlib
import json
import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from orchestra_jax.data.loaders.rows import ON_ERROR, RowError, RowFormat

SUFFIX = ".index"
HEADER_BYTES = 4_096
MAX_SHOWN_ERRORS = 8
MAX_ERROR_CHARS = 300
_ROWS_PER_WRITE = 65_536


class JsonlSource:
    """Records of a JSON-lines file by number.

    Args:
      path: the file.
      row_format: what a row must be and becomes (loaders/rows.py).
      on_error: "refuse" raises a RowError for the first bad row, when the index is made; "skip" leaves bad rows out:
        `num_skipped` counts them and `errors` names the first ones.

    Raises:
      ValueError: a missing file, an unknown flag, a folder where the index cannot be written, a file without a row.
    """

    def __init__(self, path: str | os.PathLike, row_format: RowFormat, on_error: str = "refuse"):
        self._path, self._format = pathlib.Path(path).absolute(), row_format
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is {on_error!r}: choose one of {ON_ERROR}")
        if not self._path.is_file():
            raise ValueError(f"the data file {path} does not exist")
        self._on_error = on_error
        index_path = self._path.with_name(self._path.name + SUFFIX)
        state = self._state()
        header = _read_header(index_path)
        if header is None or header["state"] != state:
            header = self._write_index(index_path, state)
        self.num_skipped, self.errors = header["num_skipped"], tuple(header["errors"])
        if index_path.stat().st_size == HEADER_BYTES:
            raise ValueError(f"{path} holds no sound row ({self.num_skipped} bad ones)")
        self._bounds = np.memmap(index_path, np.int64, "r", HEADER_BYTES).reshape(-1, 2)
        with open(self._path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, number: int):
        begin, end = self._bounds[number]
        return self._format.parse(json.loads(self._bytes[begin:end]))

    def __reduce__(self):
        """Workers open the file themselves: a map of memory does not travel."""
        return JsonlSource, (self._path, self._format, self._on_error)

    def __repr__(self) -> str:
        return f"JsonlSource({self._path.name}, {self._format.name})"  # Grain shows it; the path may differ by host

    def _state(self) -> dict[str, object]:
        stat = self._path.stat()
        return {
            "num_bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "format": self._format.name,
            "schema": hashlib.sha256(json.dumps(self._format.schema, sort_keys=True).encode()).hexdigest(),
            "on_error": self._on_error,
        }

    def _write_index(self, index_path: pathlib.Path, state: dict[str, object]) -> dict[str, object]:
        header = {"state": state, "num_skipped": 0, "errors": []}
        draft = index_path.with_name(f"{index_path.name}.{os.getpid()}")
        try:
            with open(draft, "wb") as file:
                file.write(b" " * HEADER_BYTES)
                for bounds in self._sound_rows(header):
                    file.write(bounds)
                file.seek(0)
                file.write(_header_bytes(header))
            os.replace(draft, index_path)
        except OSError as error:
            raise ValueError(f"the index {index_path} cannot be written: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
        return header

    def _sound_rows(self, header: dict[str, object]) -> Iterator[array.array]:
        """Bounds of sound rows, in pieces; counts the others into `header`."""
        bounds, begin = array.array("q"), 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                end = begin + len(line)
                try:
                    self._check(line, f"{self._path}, row {number}")
                    bounds.extend((begin, end))
                except RowError as error:
                    if self._on_error == "refuse":
                        raise
                    header["num_skipped"] += 1
                    if len(header["errors"]) < MAX_SHOWN_ERRORS:
                        header["errors"].append(str(error)[:MAX_ERROR_CHARS])
                begin = end
                if len(bounds) >= 2 * _ROWS_PER_WRITE:
                    yield bounds
                    bounds = array.array("q")
        yield bounds

    def _check(self, line: bytes, where: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}: not JSON ({error})") from error
        self._format.read(row, where)


def _header_bytes(header: dict[str, object]) -> bytes:
    while len(text := json.dumps(header).encode()) > HEADER_BYTES:  # sentences about rows can be long: drop the last
        header["errors"].pop()
    return text.ljust(HEADER_BYTES)


def _read_header(index_path: pathlib.Path) -> dict[str, object] | None:
    try:
        with open(index_path, "rb") as file:
            return json.loads(file.read(HEADER_BYTES))
    except (OSError, ValueError):
        return None
