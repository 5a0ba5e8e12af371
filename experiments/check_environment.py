"""Checks a function-calling domain: the golden calls replayed score 1, doing nothing does not.

    python -m experiments.check_environment --domain=library
    python -m experiments.check_environment --domain=retail --server_python=TAU2_VENV/bin/python
    python -m experiments.check_environment --domain=retail --checkout=TAU2_BENCH --server_python=TAU2_VENV/bin/python

Shipped domains: library, courier. From tau2-bench: airline, retail, telecom, as the package inspect-evals carries them
(`pip install 'orchestra_jax[tau2]'`) or in a checkout; --server_python names the environment that has either.
"""

import json
import os
import pathlib
import subprocess
import sys

from absl import app, flags

from orchestra_jax.environments.functions.domains.courier import make_courier
from orchestra_jax.environments.functions.domains.courier_tasks import generate_courier_tasks
from orchestra_jax.environments.functions.domains.library import make_library
from orchestra_jax.environments.functions.domains.library_tasks import generate_library_tasks
from orchestra_jax.environments.functions.success import judge, run_gold
from orchestra_jax.environments.tau2.source import command_line

SHIPPED = {"library": (make_library, generate_library_tasks), "courier": (make_courier, generate_courier_tasks)}
TAU2 = ("airline", "retail", "telecom")

_DOMAIN = flags.DEFINE_enum("domain", None, [*SHIPPED, *TAU2], "The domain.", required=True)
_NUM_TASKS = flags.DEFINE_integer("num_tasks", 1000, "Tasks of a shipped domain.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of a shipped domain's database and tasks.")
_SERVER_PYTHON = flags.DEFINE_string("server_python", sys.executable, "An interpreter that has inspect-evals.")
_CHECKOUT = flags.DEFINE_string("checkout", "", "A checkout of tau2-bench; without one, the package inspect-evals.")
_ANY_VERSION = flags.DEFINE_bool("any_version", False, "Take data of tau2-bench other than the pinned, too.")


def check_shipped(name: str) -> list[dict]:
    make, generate = SHIPPED[name]
    domain = make(_SEED.value)
    lines = []
    for task in generate(domain, _NUM_TASKS.value, _SEED.value):
        gold, untouched, told = run_gold(domain, task), domain.open_database(), task.communicate_info
        lines.append(
            {
                "task_id": task.task_id,
                "gold": judge(gold, task, run_gold(domain, task).database, told).outcome,
                "no_op": judge(gold, task, untouched, ()).outcome,
                "informed_no_op": judge(gold, task, untouched, told).outcome,
            }
        )
    return lines


def check_tau2(name: str) -> list[dict]:
    """In the interpreter that has the tools' code: SystemExit with its sentence where it has not, or has other data."""
    root = str(pathlib.Path(__file__).parents[1])
    told = command_line(name, _CHECKOUT.value, _ANY_VERSION.value)
    command = [_SERVER_PYTHON.value, "-m", "orchestra_jax.environments.tau2.replay", *told]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr.strip().splitlines()[-1])
    source, *lines = map(json.loads, result.stdout.splitlines())
    print(f"{source['source']} {source['version']}, data {source['digest']}")
    return lines


def main(_):
    lines = check_shipped(_DOMAIN.value) if _DOMAIN.value in SHIPPED else check_tau2(_DOMAIN.value)
    judged = [line for line in lines if line["gold"] is not None]
    print(f"{_DOMAIN.value}: {len(lines)} tasks, {len(lines) - len(judged)} of them need a judge")
    for name in ("gold", "no_op", "informed_no_op"):
        print(f"{name:15} {sum(line[name] == 1.0 for line in judged):5} of {len(judged)}")
    wrong = [line["task_id"] for line in judged if line["gold"] != 1.0]
    if wrong:
        raise SystemExit(f"the golden calls do not score 1 on {len(wrong)} tasks, the first is {wrong[0]}")


if __name__ == "__main__":
    app.run(main)
