"""Parquet turned into ArrayRecord once: the same rows by number, dates as dates, bad rows counted."""

import datetime
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from orchestra_jax.data.loaders.rows import RowError, RowFormat, object_schema
from orchestra_jax.data.sources.array_record import ArrayRecordSource, write_array_record

ANY = RowFormat("any", object_schema({"name": {"type": "string"}}), dict)


def test_parquet_rows_come_back_by_number(tmp_path):
    rows = [{"name": f"n{number}", "day": datetime.datetime(2024, 5, 1 + number % 9)} for number in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert write_array_record(tmp_path / "rows.parquet", tmp_path / "rows.array_record", ANY) == (300, ())
    source = ArrayRecordSource(tmp_path / "rows.array_record", ANY)
    assert len(source) == 300 and source[299] == {"name": "n299", "day": "2024-05-03"}
    assert pickle.loads(pickle.dumps(source))[7] == {"name": "n7", "day": "2024-05-08"}
    two = ArrayRecordSource([tmp_path / "rows.array_record"] * 2, ANY)
    assert len(two) == 600 and two[300] == two[0]


def test_bad_rows_are_refused_or_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"name": "a"}\n{"name": 1}\n{"name": "b"}\n')
    target = tmp_path / "rows.array_record"
    with pytest.raises(RowError, match="rows.jsonl, row 2, field name"):
        write_array_record(tmp_path / "rows.jsonl", target, ANY)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # nothing half-written stays
    num_rows, (error,) = write_array_record(tmp_path / "rows.jsonl", target, ANY, on_error="skip")
    assert num_rows == 2 and "row 2" in error
    assert [row["name"] for row in ArrayRecordSource(target, ANY)] == ["a", "b"]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.array_record does not exist"):
        ArrayRecordSource(tmp_path / "none.array_record", ANY)
    (tmp_path / "rows.jsonl").write_text('{"name": "a"}\n')
    write_array_record(tmp_path / "rows.jsonl", tmp_path / "rows.array_record", ANY)
    with pytest.raises(RowError, match="rows.array_record, record 0, field colour: is missing"):
        ArrayRecordSource(tmp_path / "rows.array_record", RowFormat("c", object_schema({"colour": {}}), dict))[0]
