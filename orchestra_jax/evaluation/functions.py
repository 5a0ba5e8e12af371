"""The end of a run on function-calling tasks: held-out tasks solved, by number of golden calls and by preference.

The trained policy is played greedily, the warm start both ways: it is its distribution that GRPO began with.
"""

from __future__ import annotations

import asyncio
import collections
import resource
from collections.abc import Sequence

import numpy as np

from orchestra_jax import chat as chat_format
from orchestra_jax.components import Components, build_engine
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.records import Instance
from orchestra_jax.evaluation.evaluate import NUM_SHOWN_TRAJECTORIES, current_commit, play
from orchestra_jax.evaluation.report import format_trajectory
from orchestra_jax.run_directory import RunDirectory, write_text
from orchestra_jax.types import Trajectory

COLUMNS = ("outcome", "database_equal", "information_told", "entries_touched", "cost_usd", "latency_s")


def evaluate_functions(config: RunConfig, parts: Components, params, reference_params, directory: RunDirectory) -> dict:
    """Writes sample trajectories to the run directory, prints the table, returns the summary."""
    instances = evaluation_instances(
        parts.test_tasks, parts.preferences, config.world, config.evaluation.num_per_preference, config.evaluation.seed
    )
    engine = build_engine(config, parts, params, version=0)
    played = {"trained": play(config, parts, engine, instances, temperature=0.0)}
    asyncio.run(engine.update_weights(reference_params, 1))
    played["warm_start"] = play(config, parts, engine, instances, temperature=1.0)
    played["warm_start_greedy"] = play(config, parts, engine, instances, temperature=0.0)
    shown = [
        format_trajectory(instances[number], each, chat_format.decode(parts.chat, each.tokens))
        for number, each in enumerate(played["trained"])
        if number % config.evaluation.num_per_preference < NUM_SHOWN_TRAJECTORIES
    ]
    write_text(directory.path / "sample_trajectories.txt", "\n\n".join(shown) + "\n")
    policies = {name: summarize(instances, trajectories) for name, trajectories in played.items()}
    print(format_solved(policies))
    return {
        "seed": config.seed,
        "commit": current_commit(),
        "wall_s": 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "policies": policies,
    }


def summarize(instances: Sequence[Instance], trajectories: Sequence[Trajectory]) -> dict[str, object]:
    """Means of those COLUMNS that there are, and the share solved by preference and by number of golden calls."""
    by_part: dict[str, dict[str, list[float]]] = {"preference": {}, "difficulty": {}}
    for instance, each in zip(instances, trajectories, strict=True):
        parts = {"preference": instance.preference.name, "difficulty": str(instance.task.difficulty)}
        for part, key in parts.items():
            by_part[part].setdefault(key, []).append(each.objectives["outcome"])
    columns = [name for name in COLUMNS if name in trajectories[0].objectives]  # tau2's reward has other parts
    means = {name: float(np.mean([each.objectives[name] for each in trajectories])) for name in columns}
    statuses = collections.Counter(str(each.status) for each in trajectories)
    return {
        **means,
        **{f"solved_by_{part}": {key: float(np.mean(values)) for key, values in groups.items()}
           for part, groups in by_part.items()},
        "statuses": dict(statuses),
    }  # fmt: skip


def format_solved(policies: dict[str, dict]) -> str:
    """The share of held-out tasks that each policy solves, as a table."""
    first = next(iter(policies.values()))
    keys = [("solved_by_difficulty", key) for key in sorted(first["solved_by_difficulty"])]
    keys += [("solved_by_preference", key) for key in first["solved_by_preference"]]
    heads = [f"{key} calls" if part == "solved_by_difficulty" else key for part, key in keys]
    lines = [f"{'policy':18}{'solved':>9}" + "".join(f"{head:>10}" for head in heads)]
    for name, summary in policies.items():
        values = [summary["outcome"], *(summary[part].get(key, float("nan")) for part, key in keys)]
        lines.append(f"{name:18}" + "".join(f"{value:>{9 if k == 0 else 10}.3f}" for k, value in enumerate(values)))
    return "\n".join(lines)
