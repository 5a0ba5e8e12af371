"""The database of one episode: a view on shared, frozen entries that holds what the episode has changed and no more.

    base        {"orders": {"O1": <frozen>, ...}, ...}     loaded once, shared by all episodes
    committed   {("orders", "O1"): <frozen>}               what earlier calls of this episode changed
    open        {("orders", "O1"): <a copy>}               what the running call has in its hands

A call gets a copy of each entry that it takes by key, and may write into it as it likes. `commit` keeps the copies that
differ, `rollback` none. To open a database costs nothing, to compare two what either has changed. Iterating a table
gives the frozen entries as they stand: a scan copies nothing and touches nothing.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, MutableMapping

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from orchestra_jax.environments.functions.frozen import freeze, is_same, thaw

Key = tuple[str, str]  # table, id
_DELETED = object()
_WHOLE = ""  # the id under which a field that is no table is kept


class Base:
    """What all episodes of a domain start from: an instance of its data model, or {table: {id: entry}} of plain JSON.

    A field that maps ids to entries is a table; any other field is one entry. With a data model, each entry that a call
    has changed must still be one of it. ValueError for values that JSON does not have.
    """

    def __init__(self, data: BaseModel | Mapping[str, object]):
        fields = data.__dict__ if isinstance(data, BaseModel) else data
        self.fields: dict[str, object] = {name: freeze(value) for name, value in fields.items()}
        self.tables = frozenset(name for name, value in self.fields.items() if isinstance(value, dict))
        annotations = type(data).model_fields if isinstance(data, BaseModel) else {}
        self._adapters = {name: TypeAdapter(self._entry_type(name, each)) for name, each in annotations.items()}

    def _entry_type(self, name: str, field: FieldInfo) -> object:
        """The type of one entry: of the values of a table, of the field itself if it is none."""
        return typing.get_args(field.annotation)[1] if name in self.tables else field.annotation

    def check(self, key: Key, entry: object) -> object:
        """The entry as the data model reads it. ValueError names table, id and field."""
        table, entry_id = key
        if table not in self._adapters:
            return entry
        plain = (
            entry.__pydantic_serializer__.to_python(entry, warnings=False) if isinstance(entry, BaseModel) else entry
        )
        try:
            return self._adapters[table].validate_python(plain)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, (entry_id, *first["loc"])))
            raise ValueError(f"{table} {field}: {first['msg']}, got {first['input']!r}"[:300]) from error


class Table(MutableMapping):
    """One table as a dict by id. Taking an entry by its id touches it; looking whether it is there does not."""

    def __init__(self, database: Database, name: str):
        self._database, self._name = database, name

    def __getitem__(self, entry_id: str):
        return self._database._take((self._name, entry_id))

    def __setitem__(self, entry_id: str, entry: object) -> None:
        self._database._open[self._name, entry_id] = entry

    def __delitem__(self, entry_id: str) -> None:
        if entry_id not in self:
            raise KeyError(entry_id)
        self._database._open[self._name, entry_id] = _DELETED

    def __contains__(self, entry_id: object) -> bool:
        return self._database._look((self._name, entry_id)) is not _DELETED

    def __iter__(self) -> Iterator[str]:
        base, database = self._database.base.fields[self._name], self._database
        changed = [entry_id for table, entry_id in (*database._committed, *database._open) if table == self._name]
        if not changed:
            yield from base
            return
        yield from (entry_id for entry_id in dict.fromkeys((*base, *changed)) if entry_id in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self):
        """Pairs of id and entry, the entry frozen unless the running call has it in its hands."""
        return [(entry_id, self._database._look((self._name, entry_id))) for entry_id in self]

    def values(self):
        return [entry for _, entry in self.items()]


class Database:
    """A field of the data model is an attribute: `database.orders["O1"].status = "cancelled"`. See the module."""

    def __init__(self, base: Base):
        self.base = base
        self._committed: dict[Key, object] = {}
        self._open: dict[Key, object] = {}
        self.touched: set[Key] = set()  # by calls that were committed

    def table(self, name: str) -> Table:
        """ValueError for a name that is no table."""
        if name not in self.base.tables:
            raise ValueError(f"there is no table {name!r}: the tables are {sorted(self.base.tables)}")
        return Table(self, name)

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self.base.fields:
            raise AttributeError(f"the database has no field {name!r}: it has {sorted(self.base.fields)}")
        return Table(self, name) if name in self.base.tables else self._take((name, _WHOLE))

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_") or name in ("base", "touched"):
            object.__setattr__(self, name, value)
        elif name in self.base.fields and name not in self.base.tables:
            self._open[name, _WHOLE] = value
        else:
            raise AttributeError(f"the database has no field {name!r} that can be set as a whole")

    @property
    def changes(self) -> dict[Key, object | None]:
        """What the episode has changed, by table and id; None for an entry that is gone."""
        return {key: None if entry is _DELETED else entry for key, entry in self._committed.items()}

    @property
    def is_written(self) -> bool:
        """Whether the running call has changed anything."""
        return any(not is_same(self._settled(key), entry) for key, entry in self._open.items())

    def commit(self) -> None:
        """Keeps what the running call has changed. ValueError, and all of it undone, if an entry breaks the model."""
        taken, self._open = self._open, {}
        written = {}
        for key, entry in taken.items():
            if not is_same(self._settled(key), entry):
                written[key] = entry if entry is _DELETED else freeze(self.base.check(key, entry))
        for key, entry in written.items():
            if key in self._committed and is_same(self._first(key), entry):
                del self._committed[key]  # as it was at first: no change
            else:
                self._committed[key] = entry
        self.touched.update(taken)

    def rollback(self) -> None:
        """Drops what the running call has in its hands."""
        self._open = {}

    def is_equal(self, other: Database) -> bool:
        """Whether both hold the same entries. They must have one base; costs what either has changed."""
        assert self.base is other.base, "databases of two bases are not compared"
        keys = self._committed.keys() | other._committed.keys()
        return all(is_same(self._settled(key), other._settled(key)) for key in keys)

    def _settled(self, key: Key) -> object:
        """The entry as earlier calls left it, frozen."""
        return self._committed[key] if key in self._committed else self._first(key)

    def _first(self, key: Key) -> object:
        """The entry as every episode finds it."""
        table, entry_id = key
        field = self.base.fields[table]
        return field.get(entry_id, _DELETED) if table in self.base.tables else field

    def _look(self, key: Key) -> object:
        return self._open[key] if key in self._open else self._settled(key)

    def _take(self, key: Key) -> object:
        entry = self._look(key)
        if entry is _DELETED:
            raise KeyError(key[1])
        if key not in self._open:
            entry = self._open[key] = thaw(entry)
        return entry
