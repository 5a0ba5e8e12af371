"""The notebooks run from top to bottom on a run directory that the real writers made."""

import pathlib

import nbclient
import nbformat
import numpy as np
import pytest

from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Task
from orchestra_jax.evaluation.baselines import evaluate_baselines
from orchestra_jax.evaluation.oracle import evaluate, make_charges, optimal_policy
from orchestra_jax.evaluation.report import REALISED, build_policies, group_with_texts
from orchestra_jax.evaluation.significance import obedience, paired_bootstrap
from orchestra_jax.experts.world import WorldConfig, skill_tables
from orchestra_jax.metrics import MetricsWriter
from orchestra_jax.run_directory import open_run_directory
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

ROOT = pathlib.Path(__file__).parents[1]
NUM_DRAWS = 4


def make_instances(world):
    task = Task("geo-1", "geography", "one_hop", "What is the capital of Chad?", "N'Djamena", "search")
    return [
        make_instance(task, preference, world, seed) for preference in PREFERENCES.values() for seed in range(NUM_DRAWS)
    ]


def make_summary(instances, world):
    preferences = [instance.preference.name for instance in instances]
    charges = make_charges(instances, world)
    statistics = evaluate_baselines(instances, charges, skill_tables(world))
    statistics["optimal"] = statistics["clairvoyant"] = evaluate(charges, optimal_policy)[0]
    statistics["trained"] = 0.9 * statistics["optimal"] + 0.1 * statistics["random"]
    realised = {"trained": np.ones((len(instances), len(REALISED)))}
    utilities = {name: statistics_IS[:, 0] for name, statistics_IS in statistics.items()}
    comparisons = {
        name: paired_bootstrap(
            utilities["trained"], utilities[name], utilities["random"], utilities["optimal"], preferences, seed=0
        )
        for name in ("cheapest", "price_blind")
    }
    trained, optimal = (
        dict(zip(PREFERENCES, np.split(statistics[name], len(PREFERENCES)))) for name in ("trained", "optimal")
    )
    return {
        "seed": 3,
        "commit": "0" * 40,
        "wall_s": 90.0,
        "peak_rss_bytes": 1 << 30,
        "policies": build_policies(statistics, preferences, realised),
        "comparisons": comparisons,
        "obedience": obedience(trained, optimal),
    }


def make_group(instance):
    trajectory = Trajectory(
        instance_id=instance.instance_id,
        rollout_index=0,
        tokens=np.arange(4, dtype=np.int32),
        loss_mask=np.array([False, False, True, True]),
        logprobs=np.zeros(4, np.float32),
        policy_versions=np.array([-1, -1, 0, 0], np.int32),
        num_prompt_tokens=2,
        calls=(),
        receipts=(),
        status=EpisodeStatus.MALFORMED,
        answer="",
        objectives={"outcome": 0.0, "cost_usd": 0.001, "latency_s": 1.0},
    )
    group = TrajectoryGroup(instance.instance_id, instance.preference.weights, (trajectory,))
    return group_with_texts(group, instance, lambda tokens: f"the {len(tokens)} tokens as text")


@pytest.fixture
def run_path(tmp_path):
    world = WorldConfig()
    instances = make_instances(world)
    directory = open_run_directory(tmp_path / "run", {"seed": 3})
    with MetricsWriter(directory.path, directory.is_resumed) as metrics:
        for step in range(12):
            values = {"score/reward": 0.3 + 0.01 * step, "score/accuracy": 0.5, "score/utility": 0.4}
            metrics.write(step, values | {f"score/reward/{name}": 0.3 for name in PREFERENCES})
    directory.write_trajectories(0, [make_group(instances[0])])
    directory.write_trajectories(10, [make_group(instances[-1])])
    directory.write_summary(make_summary(instances, world))
    return directory.path


def outputs_of(notebook):
    """All text that the cells printed or showed, and the number of pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {"text/plain": output.get("text", "")}) for output in outputs]
    return "\n".join(item.get("text/plain", "") for item in data), sum("image/png" in item for item in data)


def test_the_quickstart_notebook_runs_and_shows_the_run(run_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRA_RUN", str(run_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures inline, as a reader sees them
    notebook = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=resources).execute()
    text, num_pictures = outputs_of(notebook)
    assert num_pictures == 4  # two curves, cost against accuracy, calls
    for shown in (
        "seed 3, 12 GRPO steps, 1.5 minutes",
        "trained                    0.900",
        "optimal_move",
        "price_blind",
        "step_000010.jsonl",
        "What is the capital of Chad?",
        "preference  local",
        "the 4 tokens as text",
    ):
        assert shown in text, shown
    assert (run_path / "cost_accuracy.png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code_cells and all(cell.outputs == [] and cell.execution_count is None for cell in code_cells)
