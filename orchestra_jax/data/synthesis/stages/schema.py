"""Stage 2, schema: brief -> the tables of the database in words."""

from __future__ import annotations

from orchestra_jax.data.loaders.rows import TEXT, RowError, check_schema, list_schema, object_schema
from orchestra_jax.data.synthesis.records import Brief, TableSchema
from orchestra_jax.data.synthesis.writer import Rejected, Writer

SYSTEM = "You design databases for customer-service systems. Answer with JSON alone."
PROMPT = (
    "Domain {name}: {description}\n\nDesign two to five tables, small enough that one record fits a few lines. For "
    "example, a repair shop keeps\n"
    '{{"tables": [{{"name": "jobs", "description": "repairs that were ordered", "id_field": "job_id", "fields": '
    '{{"job_id": "string, such as J7", "owner_id": "string, an id of owners", "state": "one of waiting, done, '
    'collected", "price_usd": "number"}}}}]}}\nWrite the tables of {name} in this form. Tables refer '
    "to each other by id."
)
_TABLE = object_schema(
    {
        "name": TEXT,
        "description": TEXT,
        "id_field": TEXT,
        "fields": {"type": "object", "additionalProperties": TEXT, "minProperties": 2},
    }
)
FORM = object_schema({"tables": list_schema(_TABLE, least=1)})


async def make_schema(brief: Brief, writer: Writer, sample: int) -> tuple[TableSchema, ...]:
    prompt = PROMPT.format(name=brief.name, description=brief.description)
    written = await writer.ask_json("schema", SYSTEM, prompt, sample)
    try:
        check_schema(FORM, written, "the schema")
    except RowError as error:
        raise Rejected("wrong form", str(error)) from error
    tables = []
    for each in written["tables"]:
        names = [each["name"], *each["fields"]]
        if bad := [name for name in names if not name.isidentifier() or name.startswith("_")]:
            raise Rejected("bad name", f"{bad[0]!r} in the table {each['name']!r} is no identifier")
        if each["id_field"] not in each["fields"]:
            raise Rejected("no id", f"the table {each['name']!r} has no field {each['id_field']!r}, its own id_field")
        tables.append(TableSchema(each["name"], each["description"], each["id_field"], dict(each["fields"])))
    if len({table.name for table in tables}) < len(tables):
        raise Rejected("repeated", f"two tables have one name: {[table.name for table in tables]}")
    return tuple(tables)
