"""A domain of tau2-bench on our database: data, tasks, policy and the tools' own code, wherever they come from.

The tools run as they are, on a database of ours: their methods find a `db` that is a view on shared entries
(functions/database.py). So a reset copies nothing and an episode costs what it changes. packaged.py and checkout.py
make domains; they run in any interpreter that has the tools' code: this one, or that of worker.py. Source of the data
and of the tools: sierra-research/tau2-bench, MIT.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import pathlib
from collections.abc import Callable, Iterable

from pydantic import BaseModel

from orchestra_jax.environments.functions.database import Base, Database

BASE_SPLIT = "base"


class Toolkit:
    """The methods of one side of a domain, and the database that they find as `self.db`.

    `loaded` is the original's own database. Its fields are taken and not its model: tau2 validates nothing when a tool
    has written.
    """

    def __init__(self, original: type, loaded: BaseModel):
        members = vars(original)
        if issubclass(original, BaseModel):  # which would validate the database: its methods alone are taken
            self._class = type(
                original.__name__, (), {name: each for name, each in members.items() if _is_method(each)}
            )
            kept = {
                name: field.get_default(call_default_factory=True)
                for name, field in original.model_fields.items()
                if name in original.__annotations__ and name not in ("db", "initialized")
            }
        else:
            self._class = original
            kept = {name: each for name, each in members.items() if name[0] != "_" and not _is_method(each)}
        self._values = kept  # besides the database: plain values, copied for each episode
        self.base = Base(dict(loaded.__dict__))

    def open(self):
        """The toolkit of a new episode."""
        made = object.__new__(self._class)
        made.__dict__.update(copy.deepcopy(self._values), db=Database(self.base))
        return made


def _is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, staticmethod, classmethod))


@dataclasses.dataclass(frozen=True)
class Tau2Domain:
    """`version` and `digest` say which data of `source` it is. `user` and `sync` are None where users have no tools."""

    name: str
    source: str
    version: str
    digest: str
    agent: Toolkit
    user: Toolkit | None
    policy: str
    tasks: dict[str, dict]  # by id, in the order of their file
    splits: dict[str, list[str]]  # ids by name of the split, "train" and "test" among them; none in early checkouts
    sync: Callable | None  # keeps both databases in step
    schemas: Callable[[str], list[dict]]  # of the side "assistant" or "user", in the OpenAI function format


def check_pinned(source: str, name: str, found: tuple[str, str], pinned: tuple[str, str], is_any_version: bool) -> None:
    """ValueError for a version or digest other than the pinned, unless any will do."""
    if not is_any_version and found != pinned:
        raise ValueError(
            f"{source} {found[0]} has {name} data {found[1]}, pinned are {pinned[0]} and {pinned[1]}: install or check "
            f"out {source} {pinned[0]}, or ask for any version"
        )


def digest_files(paths: Iterable[pathlib.Path]) -> str:
    """The first 12 digits of the SHA-256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def base_tasks(raw: str | bytes, splits: dict[str, list[str]]) -> dict[str, dict]:
    """The tasks of a file's base split, by id; all of them where there is none."""
    tasks = {task["id"]: task for task in json.loads(raw)}
    chosen = set(splits.get(BASE_SPLIT, tasks))
    return {task_id: task for task_id, task in tasks.items() if task_id in chosen}
