"""tau2-bench's packaged domains on our database: gold scores 1 on every task, and what is less scores as tau2 has it.

Needs inspect-evals, here or in the interpreter that ORCHESTRA_TAU2_PYTHON names; skipped without.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from orchestra_jax.environments.tau2.session import _is_match

ROOT = pathlib.Path(__file__).parents[3]
PYTHON = os.environ.get("ORCHESTRA_TAU2_PYTHON") or (
    sys.executable if importlib.util.find_spec("inspect_evals") else ""
)
needs_tau2 = pytest.mark.skipif(not PYTHON, reason="inspect-evals is not installed: pip install 'orchestra_jax[tau2]'")

# Tasks, those that doing nothing solves, and those that saying the information alone solves. The retail figures are
# those of tau2-bench's own evaluator.
EXPECTED = {"airline": (50, 19, 20), "retail": (114, 7, 11), "telecom": (114, 0, 0)}


def run(code, *arguments, python=PYTHON):
    result = subprocess.run(
        [python, *code, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_tau2
@pytest.mark.slow
@pytest.mark.parametrize("domain", EXPECTED)
def test_gold_scores_one_on_every_task(domain):
    source, *lines = run(["-m", "orchestra_jax.environments.tau2.replay"], domain)
    assert source["version"] == "0.26.0"
    assert [line["task_id"] for line in lines if line["gold"] != 1.0] == []
    counts = len(lines), *(sum(line[name] == 1.0 for line in lines) for name in ("no_op", "informed_no_op"))
    assert counts == EXPECTED[domain]


DROPPED = """
import json, sys
from inspect_evals.tau2.common.scorer import get_expected_db
from inspect_evals.tau2.data_model.tasks import Task
from orchestra_jax.environments.tau2.session import Tau2Session
from orchestra_jax.environments.tau2.source import load_domain
domain = load_domain(sys.argv[1])
for task_id in list(domain.tasks)[:: int(sys.argv[2])]:
    actions = Task.model_validate(domain.tasks[task_id]).evaluation_criteria.actions
    if not actions:
        continue
    session = Tau2Session(domain, task_id)
    for action in actions[:-1]:
        session.call(action.name, action.arguments)
    ours = session._is_database_equal({})
    less, gold = (get_expected_db(sys.argv[1], each).db.get_hash() for each in (actions[:-1], actions))
    print(json.dumps([task_id, ours, less == gold]))
"""


@needs_tau2
@pytest.mark.slow
@pytest.mark.parametrize("domain", ["airline", "retail"])
def test_the_database_check_agrees_with_the_packages_own(domain):
    """Gold without its last action, against hashes of two databases that the package itself loads and plays on."""
    rows = run(["-c", DROPPED], domain, "6")
    assert len(rows) >= 7
    assert [row for row in rows if row[1] != row[2]] == []
    assert {row[1] for row in rows} == {True, False}


def test_an_action_is_matched_by_its_compared_arguments():
    action = {"name": "f", "arguments": {"a": 1, "b": 2}, "requestor": "user", "compare_args": None}
    call = {"name": "f", "arguments": {"a": 1, "b": 2}, "requestor": "user"}
    assert _is_match(action, call)
    assert _is_match(action, {**call, "arguments": {"a": 1}})  # as in tau2: the call's own arguments are compared
    assert not _is_match(action, {**call, "arguments": {"a": 2}})
    assert not _is_match(action, {**call, "requestor": "assistant"})
    assert _is_match({**action, "compare_args": []}, {**call, "arguments": {"a": 9}})
    assert not _is_match({**action, "compare_args": ["b"]}, {**call, "arguments": {"a": 1, "b": 3}})
