"""A whole run on function-calling tasks: warm start, GRPO, evaluation, in miniature and with the tiny model."""

import json

import pytest

from configs.quickstart_functions import get_config
from orchestra_jax import training


@pytest.mark.slow
def test_a_run_goes_through_and_says_what_was_solved(tmp_path):
    config = get_config()
    config.model = "tiny"
    config.functions.num_tasks, config.functions.num_test_tasks = 64, 16
    config.warm_start.num_steps, config.warm_start.num_groups = 2, 4
    config.jax_engine.num_rows = 16
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.groups_per_update = 2, 4, 4
    config.grpo.min_group_std = 0.0  # an untrained policy solves nothing: the groups must stay all the same
    config.checkpoint_every, config.evaluation.num_per_preference = 1, 4
    summary = training.run(config, str(tmp_path / "run"))
    assert set(summary["policies"]) == {"trained", "warm_start", "warm_start_greedy"}
    assert set(summary["policies"]["trained"]["solved_by_difficulty"]) <= {"1", "2", "3"}
    assert 0.0 <= summary["policies"]["trained"]["outcome"] <= 1.0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policies"] == summary["policies"]
    assert (tmp_path / "run" / "trajectories" / "step_000000.jsonl").exists()
    assert "question" in (tmp_path / "run" / "sample_trajectories.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
