"""ArrayRecord files: rows of JSON, by number, compressed and with checksums. What Parquet is turned into once.

Parquet is read in groups of rows, and a shuffle asks for one row at a time: `write_array_record` streams any file of
rows (loaders/rows.py) into a form that gives single rows, in constant memory.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable

from array_record.python import array_record_data_source, array_record_module

from orchestra_jax.data.loaders.rows import ON_ERROR, RowError, RowFormat, date_text, read_rows

GROUP_SIZE = 1  # rows that are compressed together: 1 reads no other row along
# The index stays on disk, so that memory does not grow with the rows; then the footer cannot be prefetched.
READER_OPTIONS = {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}


class ArrayRecordSource:
    """Records of one or several ArrayRecord files by number. ValueError for a missing file, RowError for a bad row."""

    def __init__(self, paths: str | os.PathLike | Iterable[str | os.PathLike], row_format: RowFormat):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self._paths, self._format = [os.fspath(path) for path in paths], row_format
        if missing := [path for path in self._paths if not os.path.isfile(path)]:
            raise ValueError(f"the data file {missing[0]} does not exist")
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(self._paths, READER_OPTIONS)
        except RuntimeError as error:
            raise ValueError(f"{self._paths} are no ArrayRecord files: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int):
        if not 0 <= number < len(self):
            raise IndexError(f"there is no record {number} among {len(self)}")
        where = f"{', '.join(map(os.path.basename, self._paths))}, record {number}"
        try:
            row = json.loads(self._records[number])
        except (RuntimeError, ValueError) as error:
            raise RowError(f"{where}: damaged ({error})") from error
        return self._format.read(row, where)

    def __reduce__(self):
        return ArrayRecordSource, (self._paths, self._format)

    def __repr__(self) -> str:
        return f"ArrayRecordSource({[os.path.basename(path) for path in self._paths]}, {self._format.name})"


def write_array_record(
    source: str | os.PathLike, path: str | os.PathLike, row_format: RowFormat, on_error: str = "refuse"
) -> tuple[int, tuple[str, ...]]:
    """Writes the sound rows of a .parquet, .jsonl or .json file; returns how many, and a sentence for each bad one.

    The file appears whole or not at all. RowError for the first bad row under "refuse"; ValueError for no file.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}: choose one of {ON_ERROR}")
    path = pathlib.Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    writer = array_record_module.ArrayRecordWriter(os.fspath(draft), f"group_size:{GROUP_SIZE}")
    num_rows, errors = 0, []
    try:
        for where, row in read_rows(source):
            try:
                if isinstance(row, RowError):
                    raise row
                row_format.read(row, where)
            except RowError as error:
                if on_error == "refuse":
                    raise
                errors.append(str(error))
                continue
            writer.write(json.dumps(row, default=date_text).encode())
            num_rows += 1
        writer.close()
        os.replace(draft, path)
    finally:
        if writer.is_open():
            writer.close()
        draft.unlink(missing_ok=True)
    return num_rows, tuple(errors)
