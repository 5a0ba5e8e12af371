"""Rows by number from a file of lines: bad rows are counted or refused once, and memory does not grow with the rows."""

import json
import operator
import pickle
import subprocess
import sys

import pytest

from orchestra_jax.data.loaders.rows import RowError, RowFormat, object_schema
from orchestra_jax.data.sources.jsonl import JsonlSource

NAMES = RowFormat("names", object_schema({"name": {"type": "string"}}), operator.itemgetter("name"))


def write(path, lines):
    path.write_bytes(b"".join(lines))
    return path


def row(name):
    return json.dumps({"name": name}, ensure_ascii=False).encode() + b"\n"


def test_every_row_by_number_and_after_pickling(tmp_path):
    names = ["first", "zweite \u00e4\u20ac", "third"]
    source = JsonlSource(write(tmp_path / "rows.jsonl", [*map(row, names[:2]), row(names[2]).rstrip()]), NAMES)
    assert len(source) == 3 and [source[number] for number in (2, 0, 1, -1)] == ["third", "first", names[1], "third"]
    assert list(pickle.loads(pickle.dumps(source))) == names
    with pytest.raises(IndexError):
        source[3]


def test_bad_rows_are_refused_or_counted_and_named(tmp_path):
    lines = [row("a"), b"not json\n", row("b"), b'{"name": 3}\n', b"\xff\n"]
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(RowError, match="rows.jsonl, row 2: not JSON"):
        JsonlSource(path, NAMES)
    source = JsonlSource(path, NAMES, on_error="skip")
    assert list(source) == ["a", "b"] and source.num_skipped == 3
    assert [part in error for part, error in zip(("row 2", "row 4, field name", "row 5"), source.errors)] == [True] * 3
    again = JsonlSource(path, NAMES, on_error="skip")  # from the index
    assert (again.num_skipped, again.errors) == (3, source.errors)
    with pytest.raises(RowError):  # the index of a file that was skipped through is none for one that is to be sound
        JsonlSource(path, NAMES)


def test_many_long_errors_fit_the_header(tmp_path):
    lines = [json.dumps({"name": ["\u20ac" * 400] * 3}).encode() + b"\n"] * 20
    source = JsonlSource(write(tmp_path / "rows.jsonl", [row("a"), *lines]), NAMES, on_error="skip")
    assert source.num_skipped == 20 and source.errors and list(source) == ["a"]


def test_a_changed_file_is_indexed_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("a")])
    assert list(JsonlSource(path, NAMES)) == ["a"]
    write(path, [row("bb"), row("c")])
    assert list(JsonlSource(path, NAMES)) == ["bb", "c"]


@pytest.mark.parametrize(("lines", "flag", "told"), [([], "skip", "no sound row"), ([row("a")], "mend", "on_error is")])
def test_what_cannot_be_opened(tmp_path, lines, flag, told):
    with pytest.raises(ValueError, match=told):
        JsonlSource(write(tmp_path / "rows.jsonl", lines), NAMES, on_error=flag)
    with pytest.raises(ValueError, match="does not exist"):
        JsonlSource(tmp_path / "none.jsonl", NAMES)


_PEAK = """
import resource, sys
from orchestra_jax.data.loaders.rows import RowFormat, object_schema
from orchestra_jax.data.sources.{module} import {name}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = {name}(sys.argv[1], RowFormat("any", object_schema({{}}), lambda row: row))
rows = [source[number] for number in (0, len(source) // 2, len(source) - 1)]
print(len(source), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def opened_mib(module, name, path):
    """The number of rows, and by how much opening and three rows raise the peak of a process's memory."""
    script = _PEAK.format(module=module, name=name)
    printed = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    return tuple(map(int, printed.stdout.split()))


@pytest.mark.slow
def test_a_million_rows_are_opened_in_constant_memory(tmp_path):
    path = write(tmp_path / "rows.jsonl", (row(f"{number:07d}" * 8) for number in range(1_000_000)))
    num_rows, first_mib = opened_mib("jsonl", "JsonlSource", path)  # makes the index
    assert (num_rows, opened_mib("jsonl", "JsonlSource", path)[0]) == (1_000_000, 1_000_000)
    assert first_mib < 16 and opened_mib("jsonl", "JsonlSource", path)[1] < 8
