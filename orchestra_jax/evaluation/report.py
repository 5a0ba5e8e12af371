"""What a run shows: the entries of summary.json, one table, the picture of cost against accuracy, a trajectory as text.

It computes nothing but means over instances and the score (baselines.scores), and tests nothing (significance.py). The
dict of all policies, as it stands under "policies" in summary.json:

    {policy: {preference: {"score", "utility", "accuracy", "cost_usd", "latency_s", "calls": {tool or expert: mean},
                           "num_tasks", and for policies that were played "realised": {REALISED: mean}}}}

Values are exact expectations (oracle.py, trajectory_value.py); "realised" ones are what the ledger and the scorer said.

Shapes: I instances, S statistics (oracle.STATISTICS), R realised statistics (REALISED).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from orchestra_jax.data.records import Instance, Offer
from orchestra_jax.evaluation.baselines import scores
from orchestra_jax.evaluation.oracle import STATISTICS
from orchestra_jax.rewards.objectives import Objective, objective_vector
from orchestra_jax.rewards.preference import utility
from orchestra_jax.tools.ledger import EXPERIMENT, ORCHESTRATOR
from orchestra_jax.types import Trajectory, TrajectoryGroup

REALISED = ("accuracy", "cost_usd", "latency_s", "utility")
PLAYED = ("trained", "warm_start")  # the policies of the run itself; all others but the bounds are baselines
BOUNDS = ("optimal", "clairvoyant")
NUM_RESULT_CHARACTERS = 100  # of a call's result, in a trajectory as text

BASELINE_MARKERS = "os^vDP<>Xph"
POLICY_STYLES = {
    "trained": {"marker": "o", "s": 90, "color": "tab:red"},
    "warm_start": {"marker": "o", "s": 90, "color": "tab:orange"},
    # Hollow: a policy at the optimum stays visible inside it.
    "optimal": {"marker": "*", "s": 260, "facecolors": "none", "edgecolors": "tab:green", "linewidths": 1.5},
}


def policy_entry(
    statistics_IS: np.ndarray,
    rows: np.ndarray,
    random_IS: np.ndarray,
    optimal_IS: np.ndarray,
    names: Sequence[str] = STATISTICS,
) -> dict[str, object]:
    """One preference's part of summary.json: means of a policy's statistics over the instances `rows`.

    Args:
      statistics_IS: [I, S] expected statistics of the policy; cost in dollars and latency in seconds per task.
      rows: [I] bool, or indices: the instances with this preference.
      random_IS: [I, S] of the random policy, which scores 0.
      optimal_IS: [I, S] of the optimum, which scores 1.
      names: [S] of the columns.
    """
    means = dict(zip(names, np.asarray(statistics_IS)[rows].mean(axis=0).tolist(), strict=True))
    calls = {name.removeprefix("calls/"): mean for name, mean in means.items() if name.startswith("calls/")}
    return {
        "score": scores(statistics_IS, random_IS, optimal_IS, rows),
        **{name: mean for name, mean in means.items() if not name.startswith("calls/")},
        "calls": calls,
        "num_tasks": len(statistics_IS[rows]),
    }


def build_policies(
    statistics: Mapping[str, np.ndarray],
    preferences_I: Sequence[str],
    realised: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] = STATISTICS,
) -> dict[str, dict[str, dict]]:
    """The "policies" of summary.json.

    Args:
      statistics: [I, S] by policy; "random" and "optimal" are among them.
      preferences_I: the name of each instance's preference.
      realised: [I, R] by policy, for policies that were played (`realised_statistics`).
      names: [S] of the columns of `statistics`.
    """
    assert {"random", "optimal"} <= statistics.keys(), f"scores need random and optimal, got {sorted(statistics)}"
    preferences_I = np.asarray(preferences_I)
    random_IS, optimal_IS = statistics["random"], statistics["optimal"]
    policies: dict[str, dict[str, dict]] = {name: {} for name in statistics}
    for preference in dict.fromkeys(preferences_I.tolist()):
        rows = preferences_I == preference
        for name, statistics_IS in statistics.items():
            policies[name][preference] = policy_entry(statistics_IS, rows, random_IS, optimal_IS, names)
        for name, realised_IR in (realised or {}).items():
            means = dict(zip(REALISED, realised_IR[rows].mean(axis=0).tolist(), strict=True))
            policies[name][preference]["realised"] = means
    return policies


def realised_statistics(
    instances: Sequence[Instance], trajectories: Sequence[Trajectory], objectives: Sequence[Objective]
) -> np.ndarray:
    """[I, R] of one trajectory per instance: scored answer, ledger's dollars and seconds, utility of both."""
    rows = []
    for instance, trajectory in zip(instances, trajectories, strict=True):
        values = trajectory.objectives
        weights_M = objective_vector(instance.preference.weights, objectives)
        realised_utility = utility(objective_vector(values, objectives), weights_M, objectives)
        rows.append((values["outcome"], values["cost_usd"], values["latency_s"], realised_utility))
    return np.array(rows)


def mean_over_preferences(policy: Mapping[str, Mapping], name: str) -> float:
    """The mean of one value ("score", "cost_usd", ...) of a policy of summary.json, all preferences alike."""
    return float(np.mean([entry[name] for entry in policy.values()]))


def format_table(summary: Mapping[str, object]) -> str:
    """Every policy of summary.json in a row, 110 characters wide with the five preferences.

    Score per preference, then means over the preferences. The run's own policies stand first, then the baselines, best
    first, then the bounds.
    """
    policies = summary["policies"]
    names = [name for name in PLAYED if name in policies]
    names += baseline_names(summary)
    names += [name for name in BOUNDS if name in policies]
    preferences = list(next(iter(policies.values())))
    rows = [["score by preference", *preferences, "mean", "accuracy", "$ per 1000", "latency s"]]
    for name in names:
        policy = policies[name]
        rows.append([name, *(f"{policy[preference]['score']:.3f}" for preference in preferences), *_shown(policy)])
    note = "score: 0 is the random policy, 1 the optimum; last four columns: means over the preferences."
    return f"{_aligned(rows)}\n{note}"


def format_front_table(summaries: Mapping[str, Mapping]) -> str:
    """Runs side by side: what the trained policy of each came to, and the optimum under the same weights.

    Args:
      summaries: summary.json by the run's label.
    """
    means = ["accuracy", "$ per 1000", "latency s"]
    rows = [["outcome, cost, latency", "score", *means, *(f"optimal {name}" for name in means)]]
    for label, summary in summaries.items():
        trained, optimal = (summary["policies"][name] for name in ("trained", "optimal"))
        rows.append([label, *_shown(trained), *_shown(optimal)[1:]])
    return _aligned(rows)


def baseline_names(summary: Mapping[str, object]) -> list[str]:
    """The baselines of a summary by falling mean score."""
    policies = summary["policies"]
    names = [name for name in policies if name not in (*PLAYED, *BOUNDS)]
    return sorted(names, key=lambda name: -mean_over_preferences(policies[name], "score"))


def plot_cost_accuracy(summary: Mapping[str, object], path: str | os.PathLike) -> None:
    """Draws expected accuracy against expected cost into the PNG `path`: one panel a preference, one mark a policy."""
    from matplotlib.figure import Figure

    policies = summary["policies"]
    preferences = list(next(iter(policies.values())))
    styles = {name: style for name, style in POLICY_STYLES.items() if name in policies}
    for name, marker in zip(baseline_names(summary), itertools.cycle(BASELINE_MARKERS)):
        styles[name] = {"marker": marker, "s": 40, "color": "0.45", "zorder": 1}
    num_columns = min(3, len(preferences) + 1)
    num_rows = -(-(len(preferences) + 1) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 3.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, preference in zip(panels, preferences):
        for name, style in styles.items():
            entry = policies[name][preference]
            panel.scatter(1000 * entry["cost_usd"], entry["accuracy"], label=name.replace("_", " "), **style)
        panel.set(title=f"preference: {preference}", xlabel="expected cost, $ per 1000 tasks")
        panel.tick_params(labelbottom=True)
        panel.grid(alpha=0.3)
    for panel in panels[::num_columns]:
        panel.set_ylabel("expected accuracy")
    for panel in panels[len(preferences) :]:
        panel.axis("off")
    panels[0].set_xlim(left=0)  # all panels', and only now: it ends the automatic limits
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(preferences)].legend(handles, labels, loc="center", frameon=False)
    figure.savefig(path, dpi=120)


def plot_front(summaries: Mapping[str, Mapping], path: str | os.PathLike) -> None:
    """Draws the trained policies of several runs, each labelled, and their optima into the PNG `path`.

    Args:
      summaries: summary.json by the run's label.
      path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    points = {
        name: [_cost_and_accuracy(summary["policies"][name]) for summary in summaries.values()]
        for name in ("trained", "optimal")
    }
    for name, pairs in points.items():
        panel.scatter(*zip(*pairs), label=name, **POLICY_STYLES[name])
    for trained, optimal in zip(points["trained"], points["optimal"]):
        panel.plot(*zip(trained, optimal), color="0.6", linewidth=1, zorder=1)
    by_cost = sorted(zip(points["trained"], summaries))
    for index, (point, label) in enumerate(by_cost):  # above and below in turn: neighbours do not overlap
        panel.annotate(label, point, xytext=(9, 7 if index % 2 else -15), textcoords="offset points")
    panel.set(xlabel="expected cost, $ per 1000 tasks", ylabel="expected accuracy")
    panel.set_title("trained policies, labelled by their weights of outcome, cost and latency", fontsize="medium")
    panel.margins(y=0.12)
    panel.set_xlim(0, 1.25 * max(cost for pairs in points.values() for cost, _ in pairs))  # room for the last label
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def format_trajectory(instance: Instance, trajectory: Trajectory, text: str) -> str:
    """One episode for a reader: what was asked, what was called at which price, what came of it, then the tokens.

    Args:
      instance: the one that was played.
      trajectory: a rollout of it.
      text: its tokens decoded, control tokens shown (chat.decode).
    """
    assert trajectory.instance_id == instance.instance_id, (trajectory.instance_id, instance.instance_id)
    preference, task = instance.preference, instance.task
    lines = [
        f"instance    {instance.instance_id}, rollout {trajectory.rollout_index}",
        f"question    {task.question}",
        f"preference  {preference.name}: {preference.text} ({_named_numbers(preference.weights)})",
        *_block("offers", [_offer_line(offer) for offer in instance.offers]),
        *_block("calls", _call_lines(trajectory)),
        f"answer      {trajectory.answer!r}, gold {task.answer!r}, episode {trajectory.status}",
        f"objectives  {_named_numbers(trajectory.objectives)}",
        *_bill_lines(trajectory),
    ]
    return "\n".join([*lines, "tokens", text])


def _offer_line(offer: Offer) -> str:
    place = "local" if offer.is_local else "remote"
    return f"{place} ${offer.output_usd_per_million_tokens:g} {offer.latency_s:g}s {offer.alias}  ({offer.model})"


def group_with_texts(
    group: TrajectoryGroup, instance: Instance, decode: Callable[[Sequence[int]], str]
) -> dict[str, object]:
    """A group as a line of trajectories/step_*.jsonl: its fields, and under "texts" each rollout as text.

    Args:
      group: the rollouts of `instance`.
      instance: the one that was played.
      decode: tokens to text, control tokens shown.
    """
    texts = [format_trajectory(instance, trajectory, decode(trajectory.tokens)) for trajectory in group.trajectories]
    return {**{field.name: getattr(group, field.name) for field in dataclasses.fields(group)}, "texts": texts}


def _call_lines(trajectory):
    receipts = [receipt for receipt in trajectory.receipts if receipt.tool not in (ORCHESTRATOR, *EXPERIMENT)]
    for record, receipt in zip(trajectory.calls, receipts, strict=True):
        arguments = ", ".join(f"{name}={value}" for name, value in record.call.arguments.items())
        result = textwrap.shorten(record.result_text, NUM_RESULT_CHARACTERS, placeholder=" ...")
        evidence = ", evidence present" if record.is_evidence_present else ""
        yield (
            f"{record.call.name}({arguments}) {record.status}, ${receipt.cost_usd:.6f}, "
            f"{receipt.service_s:g} s{evidence}: {result}"
        )


def _bill_lines(trajectory):
    """What the experiment paid for the episode besides the policy's own bill; nothing where it paid nothing."""
    receipts = [receipt for receipt in trajectory.receipts if receipt.tool in EXPERIMENT]
    yield from (
        f"{receipt.tool:<12}{receipt.model} {receipt.status}, ${receipt.cost_usd:.6f}, {receipt.service_s:g} s"
        for receipt in receipts
    )


def _block(title, lines):
    """The lines under one title, which stands before the first of them."""
    return [f"{title if index == 0 else '':<12}{line}" for index, line in enumerate(lines)] or [f"{title:<12}none"]


def _named_numbers(values):
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def _cost_and_accuracy(policy):
    """Dollars per 1000 tasks, and accuracy."""
    return 1000 * mean_over_preferences(policy, "cost_usd"), mean_over_preferences(policy, "accuracy")


def _shown(policy):
    """Mean score, accuracy, dollars per 1000 tasks and seconds of a policy, as written in a table."""
    score, accuracy, cost_usd, latency_s = (
        mean_over_preferences(policy, name) for name in ("score", "accuracy", "cost_usd", "latency_s")
    )
    return [f"{score:.3f}", f"{accuracy:.3f}", f"{1000 * cost_usd:.2f}", f"{latency_s:.1f}"]


def _aligned(rows):
    """Rows of strings as a table with a rule under the first: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
