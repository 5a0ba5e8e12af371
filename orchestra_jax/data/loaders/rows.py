"""Rows of a data file, one at a time, each held against a JSON schema before anything is made of it.

A file is JSON lines (.jsonl, or .json with one object a line, as BFCL writes), a JSON list (.json) or Parquet. A row
that breaks its schema is told by file, row and field:

    rows.jsonl, row 7, field evaluation_criteria.actions[0].name: 5 is not of type 'string'

"refuse" raises it, "skip" counts it and goes on. Nothing is mended on the way. Rows count from 1; in a file of lines
the row is the line. Jax and the network have no part in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import jsonschema

Record = TypeVar("Record")
Row = dict[str, object]

ON_ERROR = ("refuse", "skip")
FORMATS = (".jsonl", ".json", ".parquet")
PARQUET_BATCH_ROWS = 256
MAX_SHOWN_CHARS = 160

STRING = {"type": "string"}
TEXT = {"type": "string", "minLength": 1}  # a string with something in it


class RowError(ValueError):
    """One row that is not as its format says; the message names file, row and field."""


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[Record]):
    """What a file held. `errors` are the rows that were left out, each in one sentence; `num_repeated` are rows that
    say again what a kept one says."""

    records: tuple[Record, ...]
    errors: tuple[str, ...]
    num_repeated: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.records) + len(self.errors) + self.num_repeated


@dataclasses.dataclass(frozen=True)
class RowFormat(Generic[Record]):
    """A documented format: the schema of a row, and what becomes of a row that obeys it.

    `parse` raises FieldError for what a schema cannot say.
    """

    name: str
    schema: Row
    parse: Callable[[Row], Record]

    def read(self, row: object, where: str) -> Record:
        """The record of one row. RowError, its message opening with `where`."""
        check_schema(self.schema, row, where)
        try:
            return self.parse(row)
        except FieldError as error:
            raise RowError(f"{where}, field {error.field}: {error.told}") from error


class FieldError(ValueError):
    """What a schema cannot say of a field: raised by a format's `parse`."""

    def __init__(self, field: str, told: str):
        super().__init__(f"field {field}: {told}")
        self.field, self.told = field, told


def load(path: str | os.PathLike, row_format: RowFormat[Record], on_error: str = "refuse") -> Loaded[Record]:
    """All records of a file. RowError for the first bad row under "refuse"; ValueError for a file that is none."""
    errors: list[str] = []
    records = tuple(iterate(path, row_format, on_error, errors))
    return Loaded(records, tuple(errors))


def iterate(
    path: str | os.PathLike, row_format: RowFormat[Record], on_error: str, errors: list[str]
) -> Iterator[Record]:
    """Records one by one, in constant memory; sentences about rows that are skipped are appended to `errors`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}: choose one of {ON_ERROR}")
    for where, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            yield row_format.read(row, where)
        except RowError as error:
            if on_error == "refuse":
                raise
            errors.append(str(error))


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, object]]:
    """Pairs of a row's place ("file, row 3") and the row; a line that is no JSON comes as a RowError in its place.

    Raises:
      ValueError: the file is missing, has another suffix, or is damaged as a whole.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"the data file {path} does not exist: name one that ends in {', '.join(FORMATS)}")
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} ends in {path.suffix!r}: it must be one of {', '.join(FORMATS)}")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, RowError(f"{where}: {row}") if isinstance(row, _Unreadable) else row


def check_schema(schema: Row, row: object, where: str) -> None:
    """RowError for the first field of `row` that breaks the schema, the outermost one first."""
    validator = jsonschema.Draft202012Validator(schema)
    errors = sorted(validator.iter_errors(row), key=lambda error: (len(error.absolute_path), str(error.absolute_path)))
    if errors:
        raise RowError(f"{where}, {_describe(errors[0])}")


def object_schema(required: dict[str, object], optional: dict[str, object] | None = None) -> Row:
    """The schema of an object with these fields; others may stand beside them."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def list_schema(items: Row, least: int = 0) -> Row:
    return {"type": "array", "items": items, "minItems": least}


def nullable(schema: Row) -> Row:
    return {**schema, "type": [schema["type"], "null"]}  # not anyOf, whose errors name no field inside


def date_text(value: object) -> str:
    """A date or a timestamp of Parquet as ISO text, at midnight the date alone; TypeError for anything else."""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON does not have")


@dataclasses.dataclass(frozen=True)
class _Unreadable:
    told: str

    def __str__(self) -> str:
        return self.told


def _describe(error: jsonschema.ValidationError) -> str:
    path = list(error.absolute_path)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"field {_field(path, missing)}: is missing"
    told = error.message if len(error.message) <= MAX_SHOWN_CHARS else error.message[:MAX_SHOWN_CHARS] + "..."
    return f"field {_field(path)}: {told}"


def _field(path: list[object], *more: str) -> str:
    text = ""
    for part in [*path, *more]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(the whole row)"


def _read_json(path: pathlib.Path) -> Iterable[object]:
    """A list is read whole; lines are not. The first character says which it is."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if path.suffix == ".json" and first == "[":
            try:
                yield from json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is no JSON list ({error}): write it again") from error
            return
        for line in file:
            yield _parse_line(line)


def _parse_line(line: str) -> object:
    try:
        line.encode("utf-8")
        return json.loads(line)
    except UnicodeEncodeError as error:
        return _Unreadable(f"not UTF-8 text at character {error.start + 1}")
    except (json.JSONDecodeError, RecursionError) as error:
        return _Unreadable(f"not JSON ({error})" if line.strip() else "an empty line")


def _read_parquet(path: pathlib.Path) -> Iterable[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} is Parquet, which needs pyarrow: pip install 'orchestra_jax[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or no Parquet file: {error}") from error
