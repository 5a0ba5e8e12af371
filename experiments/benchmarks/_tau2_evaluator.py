"""tau2's airline or retail on our database, beside the packaged evaluator; run by an interpreter with inspect-evals."""

from __future__ import annotations

import json
import sys
import time

from inspect_ai.tool import ToolError
from inspect_evals.tau2.common.scorer import get_expected_db
from inspect_evals.tau2.data_model.tasks import Task

from orchestra_jax.environments.tau2.replay import replay_gold
from orchestra_jax.environments.tau2.session import COMMON, Tau2Session
from orchestra_jax.environments.tau2.source import load_domain
from orchestra_jax.environments.tau2.toolkits import Tau2Domain

NUM_TASKS = 12  # of the packaged evaluator, which takes half a second each


def measure_steps(domain: Tau2Domain) -> dict[str, float]:
    """A plain toolkit goes beside the session; calls whose results differ (it is never reset) are left out."""
    plain = get_expected_db(domain.name, [])
    step_s = plain_s = open_s = reward_s = 0.0
    num_steps = 0
    for task_id in domain.tasks:
        start_s = time.process_time()
        session = Tau2Session(domain, task_id)
        open_s += time.process_time() - start_s
        for action in session.task["evaluation_criteria"]["actions"] or ():
            if action["name"] in COMMON:
                continue
            start_s = time.process_time()
            text, _ = session.call(action["name"], action["arguments"])
            middle_s = time.process_time()
            try:
                same = getattr(plain, action["name"])(**action["arguments"])
            except ToolError as error:
                same = f"Error: {error}"
            end_s = time.process_time()
            if same == text:
                step_s, plain_s, num_steps = step_s + middle_s - start_s, plain_s + end_s - middle_s, num_steps + 1
        start_s = time.process_time()
        session.reward()
        reward_s += time.process_time() - start_s
    return {
        "open_us": open_s / len(domain.tasks) * 1e6,
        "step_us": step_s / num_steps * 1e6,
        "step_overhead_us": (step_s - plain_s) / num_steps * 1e6,
        "reward_us": reward_s / len(domain.tasks) * 1e6,
        "num_steps": num_steps,
    }


def compare_evaluators(domain: Tau2Domain) -> dict[str, float]:
    """Gold replay and its reward, both ways, on the same tasks."""
    task_ids = list(domain.tasks)[:: max(1, len(domain.tasks) // NUM_TASKS)][:NUM_TASKS]
    start_s = time.process_time()
    for _ in range(10):
        rewards = [replay_gold(domain, task_id).reward()[0] for task_id in task_ids]
    ours_s = (time.process_time() - start_s) / 10
    assert set(rewards) == {1.0}, rewards
    actions = [Task.model_validate(domain.tasks[each]).evaluation_criteria.actions or [] for each in task_ids]
    start_s = time.process_time()
    for each in actions:
        played, expected = get_expected_db(domain.name, each), get_expected_db(domain.name, each)
        assert played.db.get_hash() == expected.db.get_hash()
    theirs_s = time.process_time() - start_s
    return {
        "replay_ms": ours_s / len(task_ids) * 1e3,
        "packaged_replay_ms": theirs_s / len(task_ids) * 1e3,
        "replay_speedup": theirs_s / ours_s,
    }


if __name__ == "__main__":
    made = load_domain(sys.argv[1])
    print(json.dumps(measure_steps(made) | compare_evaluators(made)))
