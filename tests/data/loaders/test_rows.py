"""Reading rows: every damaged row is told by file, row and field, and refused or skipped as asked."""

import json

import pytest

from orchestra_jax.data.loaders.rows import RowError, RowFormat, list_schema, load, object_schema, read_rows

SCHEMA = object_schema(
    {"name": {"type": "string"}, "sizes": list_schema({"type": "integer"})}, {"note": {"type": "string"}}
)
NAMES = RowFormat("names", SCHEMA, lambda row: row["name"])


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"name": 5, "sizes": []}, "rows.jsonl, row 2, field name: 5 is not of type 'string'"),
        ({"name": "b", "sizes": [1, "2"]}, "rows.jsonl, row 2, field sizes[1]: '2' is not of type 'integer'"),
        ({"name": "b"}, "rows.jsonl, row 2, field sizes: is missing"),
        ({"name": "b", "sizes": [], "note": None}, "rows.jsonl, row 2, field note: None is not of type 'string'"),
        ([1], "rows.jsonl, row 2, field (the whole row): [1] is not of type 'object'"),
        (b'{"name": "b"\n', "rows.jsonl, row 2: not JSON"),
        (b"\n", "rows.jsonl, row 2: an empty line"),
        (b'{"name": "\xff"}\n', "rows.jsonl, row 2: not UTF-8 text at character 11"),
        (b"[" * 100_000 + b"\n", "rows.jsonl, row 2: not JSON"),
    ],
)
def test_a_bad_row_is_named_and_refused_or_counted(tmp_path, line, told):
    path = write(tmp_path / "rows.jsonl", {"name": "a", "sizes": [1]}, line, {"name": "c", "sizes": []})
    with pytest.raises(RowError) as caught:
        load(path, NAMES)
    assert told in str(caught.value)
    loaded = load(path, NAMES, on_error="skip")
    assert loaded.records == ("a", "c") and loaded.num_rows == 3
    assert [told in error for error in loaded.errors] == [True]


def test_all_three_file_formats_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"name": f"n{number}", "sizes": [number]} for number in range(700)]  # more than a batch
    write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "rows.json").write_text("\n " + json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        assert [row for _, row in read_rows(tmp_path / f"rows.{suffix}")] == rows
    assert [where for where, _ in read_rows(tmp_path / "rows.parquet")][-1].endswith("rows.parquet, row 700")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", b"a", "ends in '.csv'"),
        ("rows.parquet", b"PAR1 and nothing else", "is damaged, or no Parquet file"),
        ("rows.json", b'[{"name": 1},', "is no JSON list"),
    ],
)
def test_a_file_that_is_none_is_refused_whatever_the_flag(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        load(tmp_path / name, NAMES, on_error="skip")


def test_a_missing_file_and_an_unknown_flag_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none.jsonl", NAMES)
    with pytest.raises(ValueError, match="on_error is 'mend'"):
        load(write(tmp_path / "rows.jsonl"), NAMES, on_error="mend")
