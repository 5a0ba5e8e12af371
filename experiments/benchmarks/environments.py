"""What a function-calling environment costs beside its tools' own work: CPU microseconds of opening, stepping, judging.

    python -m experiments.benchmark --suite=environments
    python -m experiments.benchmark --suite=environments --option=server_python=TAU2_VENV/bin/python

Always: the two shipped domains, golden calls of their tasks. With an interpreter that has inspect-evals also tau2's
airline and retail, beside the package's own evaluator on the same tasks: it loads the database twice, plays, and hashes
both. A step's overhead is the time of a call through the episode's database less that of the same function on plain,
unshared entries; of tau2's calls those that give the same result both ways.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time
import types

from orchestra_jax.environments.functions.database import Database
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.domains.courier import make_courier
from orchestra_jax.environments.functions.domains.courier_tasks import generate_courier_tasks
from orchestra_jax.environments.functions.domains.library import make_library
from orchestra_jax.environments.functions.domains.library_tasks import generate_library_tasks
from orchestra_jax.environments.functions.frozen import thaw
from orchestra_jax.environments.functions.function import run_function
from orchestra_jax.environments.functions.success import judge, run_gold
from orchestra_jax.environments.functions.task import FunctionTask

NUM_PASSES = 5
SHIPPED = {"library": (make_library, generate_library_tasks), "courier": (make_courier, generate_courier_tasks)}
ROOT = pathlib.Path(__file__).parents[2]


def run(num_tasks: int = 300, server_python: str = "") -> dict[str, float]:
    """Figures by name: those of the shipped domains, and those of tau2's where `server_python` is given."""
    figures = {}
    for name, (make, generate) in SHIPPED.items():
        domain = make(0)
        for key, value in measure_domain(domain, generate(domain, num_tasks, 0)).items():
            figures[f"{name}_{key}"] = value
    if server_python:
        figures |= measure_tau2(server_python)
    return figures


def measure_domain(domain: Domain, tasks: list[FunctionTask]) -> dict[str, float]:
    """The fastest of NUM_PASSES over all tasks: what a first pass pays for cold caches is no part of a step."""
    golds = [run_gold(domain, task) for task in tasks]
    step_s, plain_s, num_steps, databases = min(
        (play_gold(domain, tasks) for _ in range(NUM_PASSES)), key=lambda played: played[0] - played[1]
    )
    start_s = time.process_time()
    outcomes = [judge(*each, task.communicate_info) for *each, task in zip(golds, tasks, databases, tasks)]
    judge_s = time.process_time() - start_s
    assert all(each.outcome == 1.0 for each in outcomes), "a golden run is not judged right"
    start_s = time.process_time()
    for _ in range(10_000):
        domain.open_database()
    open_s = time.process_time() - start_s
    return {
        "open_us": open_s / 10_000 * 1e6,
        "step_us": step_s / num_steps * 1e6,
        "step_overhead_us": (step_s - plain_s) / num_steps * 1e6,
        "judge_us": judge_s / len(tasks) * 1e6,
        "num_steps": num_steps,
    }


def play_gold(domain: Domain, tasks: list[FunctionTask]) -> tuple[float, float, int, list[Database]]:
    """CPU seconds of all golden calls through databases of episodes and on plain entries, how many, the databases.

    The entries are made before the clock starts: what they leave to the garbage collector is no part of a step.
    """
    functions, databases = domain.functions_by_name, [domain.open_database() for _ in tasks]
    plain = [types.SimpleNamespace(**thaw(dict(domain.base.fields))) for _ in tasks]
    start_s = time.process_time()
    for task, database in zip(tasks, databases):
        for call in task.gold_calls:
            run_function(functions, database, call.name, call.arguments)
    middle_s = time.process_time()
    for task, entries in zip(tasks, plain):
        for call in task.gold_calls:
            functions[call.name].call(entries, call.arguments)
    end_s = time.process_time()
    return middle_s - start_s, end_s - middle_s, sum(len(task.gold_calls) for task in tasks), databases


def measure_tau2(server_python: str) -> dict[str, float]:
    """In the other interpreter; RuntimeError with its last line where it fails."""
    figures = {}
    for name in ("airline", "retail"):
        command = [server_python, "-m", "experiments.benchmarks._tau2_evaluator", name]
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{server_python}: {result.stderr.strip().splitlines()[-1]}")
        figures |= {f"{name}_{key}": value for key, value in json.loads(result.stdout.splitlines()[-1]).items()}
    return figures
