"""Function-calling tasks of a run from files: a synthesised domain in its folder, and tasks as JSON lines.

A folder is what experiments/synthesize.py wrote: `domain.json`, whose functions run in the sandbox, and `tasks.jsonl`.
Files of tasks are read a row at a time and mixed by weight (data.pipeline.InstanceStream), whatever their size.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from pydantic import ValidationError

from orchestra_jax.config import FunctionsConfig
from orchestra_jax.data.loaders.rows import FieldError, Row, RowFormat
from orchestra_jax.data.pipeline import DrawInstance, Part
from orchestra_jax.data.sources.jsonl import JsonlSource
from orchestra_jax.data.synthesis.domain_file import read_domain, read_tasks
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox

HELD_OUT_EVERY = 10  # tasks of a folder: the first of so many is held out


def check_task_paths(settings: FunctionsConfig) -> None:
    """ValueError for files without held-out tasks, and for weights that are not one for each file."""
    if bool(settings.task_paths) != bool(settings.test_task_path):
        raise ValueError(
            f"functions.task_paths {settings.task_paths} and functions.test_task_path {settings.test_task_path!r} are "
            "set together: training tasks and held-out ones"
        )
    if settings.task_weights and len(settings.task_weights) != len(settings.task_paths):
        raise ValueError(
            f"functions.task_weights {settings.task_weights} must be one for each of functions.task_paths "
            f"{settings.task_paths}, or none"
        )


def open_domain_folder(folder: str, sandbox: PythonSandbox) -> dict[str, Domain]:
    """The synthesised domain, by its name. ValueError for a folder without one."""
    domain = read_domain(pathlib.Path(folder) / "domain.json").open(sandbox)
    return {domain.name: domain}


def split_domain_folder(folder: str) -> tuple[tuple[FunctionTask, ...], tuple[FunctionTask, ...]]:
    """Training and held-out tasks of a folder. ValueError for fewer than two tasks."""
    path = pathlib.Path(folder) / "tasks.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no tasks.jsonl: synthesise some, or set functions.task_paths")
    tasks = read_tasks(path)
    if len(tasks) < 2:
        raise ValueError(f"{path} has {len(tasks)} tasks: one to train on and one to hold out are the least")
    train = tuple(task for number, task in enumerate(tasks) if number % HELD_OUT_EVERY)
    return train, tasks[::HELD_OUT_EVERY]


def build_task_parts(
    settings: FunctionsConfig, domains: Collection[str], make: DrawInstance
) -> tuple[tuple[Part, ...], tuple[FunctionTask, ...]]:
    """The mixture of the training files, and the held-out tasks. RowError names file, row and field of a bad row."""
    row_format = task_format(domains)
    sources = [JsonlSource(path, row_format) for path in settings.task_paths]
    weights = settings.task_weights or [float(len(source)) for source in sources]
    parts = tuple(
        Part(f"{number}/{pathlib.Path(path).name}", source, make, weight)
        for number, (path, source, weight) in enumerate(zip(settings.task_paths, sources, weights))
    )
    return parts, tuple(JsonlSource(settings.test_task_path, row_format))


def task_format(domains: Collection[str]) -> RowFormat[FunctionTask]:
    """Rows that are tasks of these domains."""
    schema = FunctionTask.model_json_schema()
    schema["properties"]["domain"] = {"enum": sorted(domains)}
    return RowFormat("function_task", schema, _parse)


def _parse(row: Row) -> FunctionTask:
    try:
        return FunctionTask.model_validate(row)
    except ValidationError as error:  # what pydantic is stricter about than the schema
        first = error.errors()[0]
        raise FieldError(".".join(map(str, first["loc"])), first["msg"]) from error
