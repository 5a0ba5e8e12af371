"""The end of a run: the trained policy and the warm start on held-out instances, beside what can be done.

The same draws are played under every preference. Values are expectations under the world's known probabilities given
the calls made (trajectory_value.py), exact ones for the optimum and the baselines (oracle.py); realised ones stand
beside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pathlib
import resource
import subprocess
from collections.abc import Sequence

import numpy as np
from absl import logging

from orchestra_jax import chat as chat_format
from orchestra_jax.components import Components, build_engine
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.evaluation.baselines import evaluate_baselines
from orchestra_jax.evaluation.oracle import (
    STATISTICS,
    clairvoyant_statistics,
    evaluate,
    make_charges,
    optimal_policy,
    statistic_names,
)
from orchestra_jax.evaluation.report import (
    baseline_names,
    build_policies,
    format_table,
    format_trajectory,
    plot_cost_accuracy,
    realised_statistics,
)
from orchestra_jax.evaluation.significance import obedience, paired_bootstrap, permutation_p_value
from orchestra_jax.evaluation.trajectory_value import expected_statistics
from orchestra_jax.experts.world import skill_tables
from orchestra_jax.generation.engine import Engine
from orchestra_jax.run_directory import RunDirectory, write_text
from orchestra_jax.types import Trajectory

NUM_SHOWN_TRAJECTORIES = 2  # of each preference, as text
MIN_COST_WEIGHT = 0.1  # below it a preference need not answer to a price


def evaluate_run(config: RunConfig, parts: Components, params, reference_params, directory: RunDirectory) -> dict:
    """Writes the picture and the sample trajectories to the run directory, prints the table, returns the summary.

    The trained policy is played greedily; the warm start samples, since it is its distribution that must be no better
    than random.
    """
    instances = evaluation_instances(
        parts.test_tasks,
        parts.preferences,
        config.world,
        config.evaluation.num_per_preference,
        config.evaluation.seed,
    )
    charges = make_charges(instances, config.world)
    statistics = {"optimal": evaluate(charges, optimal_policy)[0]}
    statistics |= evaluate_baselines(instances, charges, skill_tables(config.world))
    statistics["clairvoyant"] = clairvoyant_statistics(
        charges, config.evaluation.seed, config.evaluation.num_clairvoyant_draws
    )
    engine = build_engine(config, parts, params, version=0)
    played = {"trained": play(config, parts, engine, instances, temperature=0.0)}
    asyncio.run(engine.update_weights(reference_params, 1))
    played["warm_start"] = play(config, parts, engine, instances, temperature=1.0)
    statistics |= {name: expected_statistics(charges, trajectories) for name, trajectories in played.items()}
    preference_I = [instance.preference.name for instance in instances]
    realised = {
        name: realised_statistics(instances, trajectories, parts.objectives) for name, trajectories in played.items()
    }
    asyncio.run(engine.update_weights(params, 2))
    summary = {
        "seed": config.seed,
        "commit": current_commit(),
        "wall_s": 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "policies": build_policies(statistics, preference_I, realised, statistic_names(config.world)),
    }
    summary["comparisons"] = compare(statistics, preference_I, baseline_names(summary), config.evaluation.seed)
    trained, optimal = (by_preference(statistics[name], preference_I) for name in ("trained", "optimal"))
    summary["obedience"] = obedience(trained, optimal)
    column = STATISTICS.index("cost_usd")  # by instance: what runs are compared by, on the same draws
    summary["trained_costs_usd"] = {name: trained_NS[:, column].tolist() for name, trained_NS in trained.items()}
    summary["price_response"] = price_response(config, parts, engine, instances)
    decode = functools.partial(chat_format.decode, parts.chat)
    texts = [
        format_trajectory(instances[number], played["trained"][number], decode(played["trained"][number].tokens))
        for number in range(len(instances))
        if number % config.evaluation.num_per_preference < NUM_SHOWN_TRAJECTORIES
    ]
    write_text(directory.path / "sample_trajectories.txt", "\n\n".join(texts) + "\n")
    plot_cost_accuracy(summary, directory.path / "cost_accuracy.png")
    print(format_table(summary))
    return summary


def play(
    config: RunConfig, parts: Components, engine: Engine, instances: Sequence[Instance], temperature: float
) -> list[Trajectory]:
    """One rollout of each instance."""
    rollout = dataclasses.replace(parts.rollout, temperature=temperature)
    groups = run_groups(instances, 1, parts.environment, engine, parts.chat, rollout, config.evaluation.seed)
    return [group.trajectories[0] for group in groups]


def by_preference(statistics_IS: np.ndarray, preference_I: Sequence[str]) -> dict[str, np.ndarray]:
    names = np.array(preference_I)
    return {name: statistics_IS[names == name] for name in dict.fromkeys(preference_I)}


def compare(
    statistics: dict[str, np.ndarray], preference_I: Sequence[str], baselines: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """The trained policy against each baseline, by paired bootstrap over the draws; none if there are too few."""
    utility_I = {name: statistics_IS[:, STATISTICS.index("utility")] for name, statistics_IS in statistics.items()}
    try:
        return {
            name: paired_bootstrap(
                utility_I["trained"], utility_I[name], utility_I["random"], utility_I["optimal"], preference_I, seed
            )
            for name in baselines
        }
    except ValueError as error:
        logging.warning("no comparison with the baselines: %s", error)
        return {}


def price_response(
    config: RunConfig, parts: Components, engine: Engine, instances: Sequence[Instance]
) -> dict[str, float]:
    """Raises one expert's price from the lowest to the highest level in the prompt and counts its calls.

    Over the instances whose preference weighs cost and that offer an expert at the lowest price. A response of the
    trained policy beside the optimum's: mean calls of that expert before - after, and the permutation p-value. Empty
    where experts come from a pool, which has no levels.
    """
    if config.world.evaluation_pool.listings:
        return {}
    levels = config.world.price_levels_usd_per_million_tokens
    low, high = min(levels), max(levels)
    pairs = []
    for instance in instances:
        cheap = [offer for offer in instance.offers if offer.output_usd_per_million_tokens == low]
        if cheap and instance.preference.weights["cost_usd"] > MIN_COST_WEIGHT:
            raised = dataclasses.replace(
                cheap[0], input_usd_per_million_tokens=high, output_usd_per_million_tokens=high
            )
            offers = tuple(raised if offer is cheap[0] else offer for offer in instance.offers)
            dear = dataclasses.replace(instance, instance_id=f"{instance.instance_id}/raised", offers=offers)
            pairs.append((instance, dear, f"calls/{cheap[0].alias}"))
    if not pairs:
        return {}
    calls = {}
    for number, when in enumerate(("before", "after")):
        asked = [pair[number] for pair in pairs]
        charges = make_charges(asked, config.world)
        columns = [STATISTICS.index(pair[2]) for pair in pairs]
        rows = np.arange(len(pairs))
        trained_IS = expected_statistics(charges, play(config, parts, engine, asked, temperature=0.0))
        calls["trained", when] = trained_IS[rows, columns]
        calls["optimal", when] = evaluate(charges, optimal_policy)[0][rows, columns]
    return {
        "move": float((calls["trained", "before"] - calls["trained", "after"]).mean()),
        "optimal_move": float((calls["optimal", "before"] - calls["optimal", "after"]).mean()),
        "p_value": permutation_p_value(calls["trained", "before"], calls["trained", "after"], config.evaluation.seed),
        "num_pairs": len(pairs),
    }


@functools.cache
def current_commit() -> str:
    """The commit of the checkout that this file is in, wherever it is run from, or "unknown" outside one.

    As it is at the first call, which a run makes at its start: the checkout may move on while it lasts.
    """
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
