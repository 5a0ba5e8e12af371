"""A synthesised domain as a file: data model, entries and functions as text, and the domain that they make.

Its functions run in the sandbox that it is opened with, whenever it is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from orchestra_jax.data.synthesis.records import Brief, DataModel, Entries, FunctionSource, Reference
from orchestra_jax.data.synthesis.sandboxed import make_domain
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.run_directory import write_json
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox


@dataclasses.dataclass(frozen=True)
class DomainFile:
    brief: Brief
    policy: str
    model: DataModel
    entries: Entries
    functions: tuple[FunctionSource, ...]

    def open(self, sandbox: PythonSandbox) -> Domain:
        return make_domain(self.brief.name, self.policy, self.model, self.entries, list(self.functions), sandbox)


def write_domain(path: pathlib.Path, domain_file: DomainFile) -> None:
    write_json(path, domain_file)


def read_domain(path: str | os.PathLike) -> DomainFile:
    """What `write_domain` wrote. ValueError names the file."""
    try:
        fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        model = fields["model"]
        references = tuple(Reference(**each) for each in model["references"])
        return DomainFile(
            brief=Brief(**fields["brief"]),
            policy=fields["policy"],
            model=DataModel(model["entry_schemas"], model["id_fields"], references),
            entries=fields["entries"],
            functions=tuple(FunctionSource(**each) for each in fields["functions"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no synthesised domain ({type(error).__name__}: {error})") from error


def read_tasks(path: str | os.PathLike) -> tuple[FunctionTask, ...]:
    """The tasks of a tasks.jsonl. ValueError names file and line."""
    tasks = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            tasks.append(FunctionTask.model_validate_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return tuple(tasks)
