"""The summary's entries by hand, and what is shown of them."""

import json

import numpy as np
import pytest

from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Instance, Offer, Task
from orchestra_jax.environments.question_answering import reference_objectives
from orchestra_jax.evaluation import report
from orchestra_jax.evaluation.oracle import STATISTICS
from orchestra_jax.run_directory import open_run_directory
from orchestra_jax.tools.ledger import ORCHESTRATOR, make_receipt
from orchestra_jax.types import CallRecord, CallStatus, EpisodeStatus, ToolCall, Trajectory, TrajectoryGroup

NAMES = ("trained", "warm_start", "weak", "random", "strong_baseline", "optimal", "clairvoyant")


def statistics(utilities, **columns):
    """[I, S]: these utilities, and the other columns as given."""
    statistics_IS = np.zeros((len(utilities), len(STATISTICS)))
    statistics_IS[:, 0] = utilities
    for name, values in columns.items():
        statistics_IS[:, STATISTICS.index(name.replace("__", "/"))] = values
    return statistics_IS


def make_summary(preferences=tuple(PREFERENCES), num_draws=2):
    """Scores 0.9, 0.1, 0.2, 0, 0.6, 1, 1.2 in the order of NAMES, the same under every preference."""
    values = dict(zip(NAMES, (0.9, 0.1, 0.2, 0.0, 0.6, 1.0, 1.2)))
    num_instances = len(preferences) * num_draws
    table = {
        name: statistics(np.full(num_instances, value), accuracy=value / 2, cost_usd=0.02 - value / 100, latency_s=30.0)
        for name, value in values.items()
    }
    return {"policies": report.build_policies(table, np.repeat(preferences, num_draws))}


def instance_and_trajectory():
    task = Task("geo-1", "geography", "capital", "What is the capital of Chad?", "N'Djamena", "search")
    offers = (
        Offer("expert-1", "gpt-5", False, 15.0, 15.0, 60.0),
        Offer("expert-3", "Qwen3-32B", True, 0.2, 0.2, 2.0),
    )
    instance = Instance("geo-1/cheap/7", task, PREFERENCES["cheap"], offers, seed=7)
    calls = (
        CallRecord(ToolCall("search", {"model": "expert-2"}), "expert-2 is not on offer", CallStatus.REFUSED, False),
        CallRecord(ToolCall("search", {"model": "expert-3"}), "Chad: its\ncapital is ...", CallStatus.OK, True),
        CallRecord(ToolCall("answer", {"model": "expert-3"}), "Abeche", CallStatus.OK, True),
    )
    own = make_receipt(
        ORCHESTRATOR, service_s=0.1, input_tokens=100, output_tokens=20, output_usd_per_million_tokens=0.2
    )
    charges = (
        make_receipt("search", service_s=0.0, status=CallStatus.REFUSED),
        make_receipt("search", service_s=1.4, fixed_cost_usd=0.00014),
        make_receipt("answer", service_s=2.0, fixed_cost_usd=0.0004),
    )
    trajectory = Trajectory(
        instance_id=instance.instance_id,
        rollout_index=4,
        tokens=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([False, True, True]),
        logprobs=np.zeros(3, np.float32),
        policy_versions=np.array([-1, 0, 0], np.int32),
        num_prompt_tokens=1,
        calls=calls,
        receipts=tuple(receipt for charge in charges for receipt in (own, charge)),
        status=EpisodeStatus.ANSWERED,
        answer="Abeche",
        objectives={"outcome": 0.0, "cost_usd": 0.000552, "latency_s": 3.7, "disallowed_calls": 0.0},
    )
    return instance, trajectory


def test_an_entry_is_the_mean_over_its_rows():
    policy_IS = statistics(
        [0.2, 0.4, 9.0], accuracy=[0.5, 0.7, 9.0], cost_usd=[0.01, 0.03, 9.0], calls__search=[0, 1, 9]
    )
    random_IS, optimal_IS = statistics([0.1, 0.1, 0.0]), statistics([0.6, 0.6, 1.0])
    entry = report.policy_entry(policy_IS, np.array([True, True, False]), random_IS, optimal_IS)
    assert entry["score"] == pytest.approx(0.4)  # (0.3 - 0.1) / (0.6 - 0.1)
    assert entry["utility"] == pytest.approx(0.3) and entry["accuracy"] == pytest.approx(0.6)
    assert entry["cost_usd"] == pytest.approx(0.02) and entry["latency_s"] == 0.0
    assert entry["calls"]["search"] == 0.5 and entry["calls"]["expert-6"] == 0.0
    assert entry["num_tasks"] == 2
    assert set(entry) == {"score", "utility", "accuracy", "cost_usd", "latency_s", "calls", "num_tasks"}
    assert json.loads(json.dumps(entry)) == entry  # plain numbers


def test_policies_by_preference_with_the_realised_values_of_those_played():
    preferences = ["cheap", "cheap", "fast", "fast"]
    table = {
        "random": statistics([0.0, 0.0, 0.2, 0.2]),
        "optimal": statistics([1.0, 1.0, 0.6, 0.6]),
        "trained": statistics([0.5, 0.7, 0.5, 0.5]),
    }
    realised_IR = np.array([[1, 0.01, 5, 0.8], [0, 0.03, 15, 0.0], [1, 0.0, 0, 1], [1, 0.0, 0, 1]])
    policies = report.build_policies(table, preferences, {"trained": realised_IR})
    assert list(policies) == ["random", "optimal", "trained"] and list(policies["trained"]) == ["cheap", "fast"]
    assert policies["trained"]["cheap"]["score"] == pytest.approx(0.6)
    assert policies["trained"]["fast"]["score"] == pytest.approx(0.75)
    realised = {"accuracy": 0.5, "cost_usd": 0.02, "latency_s": 10.0, "utility": 0.4}
    assert policies["trained"]["cheap"]["realised"] == pytest.approx(realised)
    assert "realised" not in policies["optimal"]["cheap"]
    assert report.mean_over_preferences(policies["trained"], "score") == pytest.approx(0.675)


def test_realised_statistics_of_a_right_and_a_wrong_answer():
    instance, wrong = instance_and_trajectory()
    right = Trajectory(**{**vars(wrong), "objectives": {**wrong.objectives, "outcome": 1.0}})
    realised_IR = report.realised_statistics([instance, instance], [wrong, right], reference_objectives(0.01, 40.0))
    # 0.05 + 0.95 (1 - 0.000552 / 0.01) for the right one, nothing for the wrong one.
    expected = [[0.0, 0.000552, 3.7, 0.0], [1.0, 0.000552, 3.7, 0.94756]]
    np.testing.assert_allclose(realised_IR, expected, rtol=1e-6)


def test_the_table_orders_policies_and_fits_a_terminal():
    lines = report.format_table(make_summary()).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[3:8] == ["outcome", "cheap", "fast", "balanced", "local"]
    order = ["trained", "warm_start", "strong_baseline", "weak", "random", "optimal", "clairvoyant"]
    assert [line.split()[0] for line in lines[2:-1]] == order
    # Five scores, their mean, accuracy, dollars per 1000 tasks, seconds.
    assert lines[2].split() == ["trained", *["0.900"] * 6, "0.450", "11.00", "30.0"]
    assert lines[-3].split()[1:] == [*["1.000"] * 6, "0.500", "10.00", "30.0"]


def test_the_table_with_the_longest_baseline_name_fits_too():
    summary = make_summary()
    summary["policies"]["strongest_with_evidence"] = summary["policies"].pop("weak")
    assert max(map(len, report.format_table(summary).splitlines())) <= 120


def drawn_points(monkeypatch, draw):
    """The [N, 2] points of each panel's marks by label, caught on the figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    draw()
    (figure,) = figures
    return [
        {marks.get_label(): np.asarray(marks.get_offsets()) for marks in panel.collections} for panel in figure.axes
    ]


def test_the_picture_shows_dollars_per_1000_tasks_against_accuracy(monkeypatch):
    panels = drawn_points(monkeypatch, lambda: report.plot_cost_accuracy(make_summary(), "picture.png"))
    assert len(panels) == 6 and panels[5] == {}  # the legend stands in the sixth
    assert set(panels[0]) == {"trained", "warm start", "strong baseline", "weak", "random", "optimal"}
    for panel in panels[:5]:
        np.testing.assert_allclose(panel["trained"], [[11.0, 0.45]])


def test_the_front_shows_every_run(monkeypatch):
    summaries = {"1,0,0": make_summary(("balanced",)), "0.5,0.5,0": make_summary(("balanced",))}
    (panel,) = drawn_points(monkeypatch, lambda: report.plot_front(summaries, "front.png"))
    np.testing.assert_allclose(panel["trained"], [[11.0, 0.45]] * 2)
    np.testing.assert_allclose(panel["optimal"], [[10.0, 0.5]] * 2)


@pytest.mark.parametrize("num_preferences", [1, 3, 5])
def test_pictures_are_written(tmp_path, num_preferences):
    summary = make_summary(tuple(PREFERENCES)[:num_preferences])
    report.plot_cost_accuracy(summary, tmp_path / "cost_accuracy.png")
    assert (tmp_path / "cost_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_trajectory_as_text():
    instance, trajectory = instance_and_trajectory()
    assert report.format_trajectory(instance, trajectory, "<|im_start|>user\n...").splitlines() == [
        "instance    geo-1/cheap/7, rollout 4",
        "question    What is the capital of Chad?",
        "preference  cheap: Keep it cheap. (outcome 0.05, cost_usd 0.95, latency_s 0, disallowed_calls 0)",
        "offers      remote $15 60s expert-1  (gpt-5)",
        "            local $0.2 2s expert-3  (Qwen3-32B)",
        "calls       search(model=expert-2) refused, $0.000000, 0 s: expert-2 is not on offer",
        "            search(model=expert-3) ok, $0.000140, 1.4 s, evidence present: Chad: its capital is ...",
        "            answer(model=expert-3) ok, $0.000400, 2 s, evidence present: Abeche",
        "answer      'Abeche', gold \"N'Djamena\", episode answered",
        "objectives  outcome 0, cost_usd 0.000552, latency_s 3.7, disallowed_calls 0",
        "tokens",
        "<|im_start|>user",
        "...",
    ]


def test_a_trajectory_without_calls_says_so():
    instance, trajectory = instance_and_trajectory()
    silent = Trajectory(
        **{**vars(trajectory), "calls": (), "receipts": trajectory.receipts[:1], "status": EpisodeStatus.MALFORMED}
    )
    assert "calls       none\n" in report.format_trajectory(instance, silent, "")


def test_a_group_with_texts_is_a_line_of_the_run_directory(tmp_path):
    instance, trajectory = instance_and_trajectory()
    group = TrajectoryGroup(instance.instance_id, instance.preference.weights, (trajectory, trajectory))
    record = report.group_with_texts(group, instance, lambda tokens: f"{len(tokens)} tokens")
    path = open_run_directory(tmp_path / "run", {}).write_trajectories(3, [record])
    (line,) = path.read_text().splitlines()
    read = json.loads(line)
    assert read["instance_id"] == "geo-1/cheap/7" and read["trajectories"][1]["answer"] == "Abeche"
    assert len(read["texts"]) == 2 and read["texts"][0].endswith("tokens\n3 tokens")
