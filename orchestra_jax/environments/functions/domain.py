"""A domain: a data model, a database that is one of it, functions that read and write it, and a policy in words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from orchestra_jax.environments.functions.database import Base, Database
from orchestra_jax.environments.functions.function import Function


@dataclasses.dataclass(frozen=True)
class Domain:
    """`data` is what every episode starts from: an instance of the data model, or {table: {id: entry}} of plain JSON.

    ValueError for two functions of one name.
    """

    name: str
    policy: str
    data: BaseModel | Mapping[str, object] = dataclasses.field(repr=False)
    functions: Sequence[Function] = dataclasses.field(repr=False)

    def __post_init__(self):
        names = [function.name for function in self.functions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"domain {self.name!r} has two functions of the name {twice[0]!r}: rename one")

    @functools.cached_property
    def base(self) -> Base:
        return Base(self.data)

    @functools.cached_property
    def functions_by_name(self) -> dict[str, Function]:
        return {function.name: function for function in self.functions}

    def open_database(self) -> Database:
        """The database of a new episode; nothing is copied."""
        return Database(self.base)
