"""Tasks from the description of a domain, stage by stage (ToolOrchestra section 3.3, "ToolScale").

    brief -> subjects -> schema -> data model -> entries -> entry checks -> functions -> intents -> tasks -> evolution
          -> near-duplicates -> filter -> domain and tasks

Every stage is a file of stages/; this one feeds them, counts and writes what comes out:

    <directory>/replies/       what the models wrote, by request: a run that is started again goes on where it stopped
    <directory>/receipts.jsonl what it cost in this run; replies that were kept are marked as cache hits
    <directory>/domain.json    brief, policy, data model, entries, functions (domain_file.py reads it)
    <directory>/tasks.jsonl    the tasks that passed, one a line
    <directory>/report.json, report.md   yield and rejections by stage
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Awaitable, Callable, Sequence

import tqdm

from orchestra_jax.data.synthesis.domain_file import DomainFile, write_domain
from orchestra_jax.data.synthesis.duplicates import find_duplicates
from orchestra_jax.data.synthesis.records import Brief, DataModel, FunctionSource, SubjectEntries, merge_entries
from orchestra_jax.data.synthesis.report import StageReport, render_report
from orchestra_jax.data.synthesis.solver import EndpointSolver
from orchestra_jax.data.synthesis.stages.data_model import make_data_model
from orchestra_jax.data.synthesis.stages.entries import make_entries
from orchestra_jax.data.synthesis.stages.entry_checks import check_entry
from orchestra_jax.data.synthesis.stages.evolution import evolve_task
from orchestra_jax.data.synthesis.stages.filter import filter_task
from orchestra_jax.data.synthesis.stages.functions import make_functions
from orchestra_jax.data.synthesis.stages.intents import make_intents
from orchestra_jax.data.synthesis.stages.schema import make_schema
from orchestra_jax.data.synthesis.stages.subjects import make_subjects
from orchestra_jax.data.synthesis.stages.tasks import make_task
from orchestra_jax.data.synthesis.writer import Endpoint, Rejected, Writer
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.run_directory import json_value, write_json, write_text
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox

CALL_TIMEOUT_S = 4.0  # of one call of a model's function in the sandbox


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    num_subjects: int = 10
    entries_per_subject: int = 3  # of each table
    num_functions: int = 8  # of each round
    num_function_rounds: int = 2  # merged by name, the first of a name stays
    num_intents: int = 20
    num_evolutions: int = 1
    num_attempts: int = 8  # the k of pass@k
    max_turns: int = 20  # steps of one attempt
    max_similarity: float = 0.8  # of two tasks that both stay
    num_tries: int = 3  # at the schema and at the data model, of which there is one each

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("num_evolutions", "max_similarity") else 1
            if not getattr(self, field.name) >= least:
                raise ValueError(f"{field.name} {getattr(self, field.name)} must be {least} or more")


@dataclasses.dataclass(frozen=True)
class Samples:
    """`paid_usd` is what this run paid; `reports` are one a stage, in order."""

    domain_file: DomainFile
    tasks: tuple[FunctionTask, ...]
    reports: tuple[StageReport, ...]
    paid_usd: float


class StageFailed(ValueError):
    """A stage of which nothing is left, and without which there is no next one. The message says why."""


def generate_samples(
    domain: Brief,
    writer: Endpoint,
    checker: Endpoint,
    solver: Endpoint,
    directory: str | os.PathLike,
    config: SynthesisConfig = SynthesisConfig(),
    should_show_progress: bool = True,
) -> Samples:
    """The whole pipeline for one domain; what it writes stands at the top of the file.

    Args:
      domain: name and description.
      writer, checker, solver: endpoints (experts/endpoint.py) that write, review entries, and try tasks.
      directory: of this domain and these models; the same one goes on.
      config: sizes and limits.
      should_show_progress: bars on stderr, one a stage.

    Raises:
      StageFailed: a stage left nothing over; report.md says why, and what was written stays kept.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    store = Store(directory / "replies", "record")
    with PythonSandbox(timeout_s=CALL_TIMEOUT_S) as sandbox:
        run = _Run(domain, config, directory, sandbox, should_show_progress)
        run.writer, run.checker, run.solver = (Writer(each, store) for each in (writer, checker, solver))
        try:
            return asyncio.run(_close_behind(run.synthesise(), (writer, checker, solver)))
        finally:
            run.write_report()


async def _close_behind(work: Awaitable[Samples], endpoints: Sequence[Endpoint]) -> Samples:
    try:
        return await work
    finally:
        for endpoint in endpoints:
            if hasattr(endpoint, "close"):
                await endpoint.close()


class _Run:
    """One run of the pipeline: its parts, and the reports so far."""

    writer: Writer
    checker: Writer
    solver: Writer

    def __init__(
        self, brief: Brief, config: SynthesisConfig, directory: pathlib.Path, sandbox: PythonSandbox, has_bars: bool
    ):
        self.brief, self.config, self.directory = brief, config, directory
        self.sandbox, self.has_bars = sandbox, has_bars
        self.reports: list[StageReport] = []

    async def synthesise(self) -> Samples:
        model, parts = await self._database()
        functions = await self._functions(model, parts)
        tasks = await self._tasks(functions, parts)
        made = DomainFile(self.brief, _policy(self.brief), model, merge_entries(parts), tuple(functions))
        kept = await self._filtered(made, self._without_duplicates(tasks))
        write_domain(self.directory / "domain.json", made)
        write_text(self.directory / "tasks.jsonl", "".join(task.model_dump_json() + "\n" for task in kept))
        paid_usd = math.fsum(each.paid_usd for each in (self.writer, self.checker, self.solver))
        return Samples(made, tuple(kept), tuple(self.reports), paid_usd)

    async def _database(self) -> tuple[DataModel, list[SubjectEntries]]:
        config, brief = self.config, self.brief
        subjects = await self._stage("subjects", [lambda: make_subjects(brief, config.num_subjects, self.writer)])
        tables = await self._first("schema", lambda sample: make_schema(brief, self.writer, sample))
        model = await self._first("data model", lambda sample: make_data_model(tables, self.writer, sample))
        parts = await self._stage(
            "entries",
            [
                lambda number=number, subject=subject: make_entries(
                    model, subject, number, config.entries_per_subject, self.writer
                )
                for number, subject in enumerate(subjects)
            ],
        )
        checks = [lambda part=part: check_entry(model, part, self.checker) for part in parts]
        return model, await self._stage("entry checks", checks)

    async def _functions(self, model: DataModel, parts: list[SubjectEntries]) -> list[FunctionSource]:
        config = self.config
        rounds = [
            lambda number=number: make_functions(
                self.brief,
                model,
                parts[number % len(parts)].entries,
                config.num_functions,
                number,
                self.writer,
                self.sandbox,
            )
            for number in range(config.num_function_rounds)
        ]
        by_name: dict[str, FunctionSource] = {}
        for each in await self._stage("functions", rounds):
            by_name.setdefault(each.name, each)
        return list(by_name.values())

    async def _tasks(self, functions: list[FunctionSource], parts: list[SubjectEntries]) -> list[FunctionTask]:
        config, brief = self.config, self.brief
        intents = await self._stage(
            "intents", [lambda: make_intents(brief, functions, config.num_intents, self.writer)]
        )

        def part_of(number: int) -> SubjectEntries:
            return parts[number % len(parts)]

        tasks = await self._stage(
            "tasks",
            [
                lambda number=number, intent=intent: make_task(
                    brief, functions, part_of(number), intent, number, self.writer
                )
                for number, intent in enumerate(intents)
            ],
        )
        last, everything = tasks, list(tasks)
        for _ in range(config.num_evolutions):
            harder = [
                lambda task=task: evolve_task(
                    brief, functions, part_of(int(task.task_id.split("/")[1])), task, self.writer
                )
                for task in last
            ]
            last = await self._stage("evolution", harder, is_needed=False)
            everything += last
        return everything

    def _without_duplicates(self, tasks: list[FunctionTask]) -> list[FunctionTask]:
        duplicates = find_duplicates(tasks, self.config.max_similarity)
        report = StageReport("near-duplicates")
        for task_id, like in duplicates.items():
            report.reject(Rejected("near-duplicate", f"{task_id} is like {like}"))
        report.accept(len(tasks) - len(duplicates))
        self.reports.append(report)
        return [task for task in tasks if task.task_id not in duplicates]

    async def _filtered(self, made: DomainFile, tasks: list[FunctionTask]) -> list[FunctionTask]:
        domain, solver = made.open(self.sandbox), EndpointSolver(self.solver, self.config.max_turns)
        attempts = [lambda task=task: filter_task(domain, task, solver, self.config.num_attempts) for task in tasks]
        return await self._stage("filter", attempts, is_needed=False)

    async def _stage(self, name: str, works: Sequence[Callable[[], Awaitable]], is_needed: bool = True) -> list:
        """Runs the works of a stage side by side; what they made, in their order. Each gives a record or a list."""
        report = StageReport(name)
        self.reports.append(report)
        accepted = []
        with tqdm.tqdm(total=len(works), desc=name, disable=not self.has_bars) as bar:
            for result in await asyncio.gather(*(_with_bar(work(), bar) for work in works)):
                for each in result if isinstance(result, list) else [result]:
                    if isinstance(each, Rejected):
                        report.reject(each)
                    else:
                        report.accept()
                        accepted.append(each)
        if is_needed and not accepted:
            raise StageFailed(f"the stage {name!r} left nothing over: {_reasons(report)}")
        return accepted

    async def _first(self, name: str, make: Callable[[int], Awaitable]):
        """The first record of a stage that makes one, in up to `num_tries` samples."""
        report = StageReport(name)
        self.reports.append(report)
        for sample in range(self.config.num_tries):
            try:
                made = await make(sample)
            except Rejected as rejected:
                report.reject(rejected)
                continue
            report.accept()
            return made
        raise StageFailed(f"the stage {name!r} gave nothing in {self.config.num_tries} tries: {_reasons(report)}")

    def write_report(self) -> None:
        receipts = [receipt for each in (self.writer, self.checker, self.solver) for receipt in each.receipts]
        costs_usd = collections.defaultdict(float)
        for receipt in receipts:
            costs_usd[receipt.tool.removeprefix("synthesis/")] += receipt.cost_usd
        lines = "".join(json.dumps(json_value(receipt, "receipt")) + "\n" for receipt in receipts)
        write_text(self.directory / "receipts.jsonl", lines)
        stages = [{**json_value(each, "report"), "share_accepted": each.share_accepted} for each in self.reports]
        write_json(self.directory / "report.json", {"stages": stages, "costs_usd": dict(costs_usd)})
        write_text(self.directory / "report.md", render_report(self.reports, costs_usd) + "\n")


async def _with_bar(work: Awaitable, bar: tqdm.tqdm):
    try:
        return await work
    except Rejected as rejected:
        return rejected
    finally:
        bar.update()


def _reasons(report: StageReport) -> str:
    return "; ".join(sentence for examples in report.examples.values() for sentence in examples[:1]) or "nothing came"


def _policy(brief: Brief) -> str:
    return (
        f"You serve the customers of {brief.name}: {brief.description.strip()}\nDo what the customer "
        f"asks for by calling "
        "functions, and tell what was asked. Change nothing that nobody asked you to change."
    )
