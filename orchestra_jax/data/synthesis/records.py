"""What goes from stage to stage: a brief, tables in words, a data model, entries, functions as source.

A model's code is text here and everywhere but in the sandbox (sandboxed.py).
"""

from __future__ import annotations

import dataclasses

Entries = dict[str, dict[str, dict[str, object]]]  # {table: {id: entry}}


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a researcher brings: `name` is an identifier, `description` says in words who does what in the domain."""

    name: str
    description: str

    def __post_init__(self):
        if not self.name.isidentifier() or not self.description.strip():
            raise ValueError(f"the domain {self.name!r} needs a name that is an identifier, and a description in words")


@dataclasses.dataclass(frozen=True)
class TableSchema:
    """One table in words: field -> type and meaning. `id_field` is the one that entries are kept under."""

    name: str
    description: str
    id_field: str
    fields: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The field of a table (a string, or a list of strings) that holds ids of another."""

    table: str
    field: str
    to: str


@dataclasses.dataclass(frozen=True)
class DataModel:
    """`entry_schemas` are JSON schemas by table; `id_fields` the key of each."""

    entry_schemas: dict[str, dict[str, object]]
    id_fields: dict[str, str]
    references: tuple[Reference, ...]


@dataclasses.dataclass(frozen=True)
class SubjectEntries:
    """The entries that were written for one subject; they hang together."""

    subject: str
    entries: Entries


@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """A function as a model wrote it: `def name(database, **arguments)` over {table: {id: entry}}."""

    name: str
    description: str
    parameters_schema: dict[str, object]
    is_write: bool
    source: str


def merge_entries(parts: list[SubjectEntries]) -> Entries:
    """One database of all subjects; their ids differ (stages/entries.py sees to it)."""
    merged: Entries = {}
    for part in parts:
        for table, entries in part.entries.items():
            merged.setdefault(table, {}).update(entries)
    return merged
