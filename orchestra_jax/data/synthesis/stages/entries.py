"""Stage 4, database entries: data model and subject -> entries that hang together, each checked against the model."""

from __future__ import annotations

import json

from orchestra_jax.data.loaders.rows import RowError, check_schema
from orchestra_jax.data.synthesis.records import DataModel, Entries, SubjectEntries
from orchestra_jax.data.synthesis.writer import Rejected, Writer

SYSTEM = "You write realistic test data. Answer with JSON alone."
PROMPT = (
    "Data model:\n{model}\n\nWrite about {count} entries for each table, all concerning: {subject}. Values agree "
    "wherever they speak of the same thing: every id that is referred to is there, sums are right, dates are in order. "
    'Every id begins with "{prefix}". Form: {{"<table>": {{"<id>": {{...}}}}}}'
)


async def make_entries(model: DataModel, subject: str, number: int, count: int, writer: Writer) -> SubjectEntries:
    """Entries for subject `number`, whose ids begin with its prefix, so that subjects do not clash."""
    prefix = f"S{number + 1}-"
    shown = json.dumps(
        {"tables": model.entry_schemas, "references": [vars(each) for each in model.references]}, indent=1
    )
    prompt = PROMPT.format(model=shown, count=count, subject=subject, prefix=prefix)
    written = await writer.ask_json("entries", SYSTEM, prompt)
    check_entries(model, written, prefix)
    return SubjectEntries(subject, written)


def check_entries(model: DataModel, entries: object, prefix: str) -> None:
    """Rejected for the first entry that is not as the model wants it."""
    if not isinstance(entries, dict) or not all(isinstance(table, dict) for table in entries.values()):
        raise Rejected("wrong form", "the entries are not {table: {id: entry}}")
    if unknown := sorted(set(entries) - set(model.entry_schemas)):
        raise Rejected("unknown table", f"there is no table {unknown[0]!r}")
    if not any(entries.values()):
        raise Rejected("empty", "there is no entry")
    for table, rows in entries.items():
        for key, entry in rows.items():
            if not key.startswith(prefix):
                raise Rejected("bad id", f"{table}.{key} does not begin with {prefix!r}")
            try:
                check_schema(model.entry_schemas[table], entry, f"{table}.{key}")
            except RowError as error:
                raise Rejected("against the model", str(error)) from error
            if entry[model.id_fields[table]] != key:
                raise Rejected("bad id", f"{table}.{key} says of itself that it is {entry[model.id_fields[table]]!r}")
    _check_references(model, entries)


def _check_references(model: DataModel, entries: Entries) -> None:
    for each in model.references:
        for key, entry in entries.get(each.table, {}).items():
            value = entry.get(each.field)
            for target in value if isinstance(value, list) else [value]:
                if target is not None and target not in entries.get(each.to, {}):
                    raise Rejected(
                        "dangling id", f"{each.table}.{key}.{each.field} is {target!r}, which {each.to} lacks"
                    )
