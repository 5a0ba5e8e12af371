"""The loop, run for real on a tiny model: repeatable, resumable, and what it leaves in the run directory.

The short runs learn nothing: their policy babbles. A slow test has a warm start long enough for real episodes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.catalog import TRAINING, UNSEEN_MODELS
from orchestra_jax import experience, training
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import make_training_iterator
from orchestra_jax.metrics import MetricsWriter, check_metric_names
from orchestra_jax.optimizers import make_optimizer
from orchestra_jax.run_directory import read_json
from orchestra_jax.seeds import derive_seed
from orchestra_jax.trained_policy import evaluate_elsewhere
from orchestra_jax.types import EpisodeStatus

REPOSITORY = pathlib.Path(__file__).parents[1]
QWEN3_DIRECTORY = pathlib.Path(
    os.environ.get("ORCHESTRA_QWEN3_TOKENIZER", REPOSITORY.parent / "shared" / "data" / "qwen3_tokenizer")
)
NUM_STEPS = 2
TIME_FIELDS = ("speed/", "sampler/tokens_per_s")


def small_config():
    config = RunConfig(model="tiny")
    config.episode.num_corrections = 0  # what babbles babbles on
    config.data.num_tasks_per_cell, config.data.num_test_tasks_per_cell = 6, 2
    config.warm_start.num_steps, config.warm_start.num_groups, config.warm_start.group_size = 2, 2, 4
    config.warm_start.optimizer.learning_rate = 2e-2
    engine = config.jax_engine
    engine.num_rows, engine.chunk_rows = 16, 8
    engine.chunk_buckets, engine.row_buckets, engine.slot_buckets = (40,), (16,), ()
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.group_size = NUM_STEPS, 2, 4
    config.grpo.groups_per_update, config.grpo.groups_per_micro_batch = 2, 2
    config.grpo.completion_buckets, config.grpo.min_group_std = (), 0.0
    config.grpo.optimizer.warmup_steps = 0  # two steps: at the full rate from the first one on
    config.grpo.entropy_coefficient = 0.01  # so that every step moves the weights, whatever its rewards are
    config.evaluation.num_per_preference, config.evaluation.num_clairvoyant_draws = 8, 1
    return config


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of one process share what they compile.

    Compiled steps are kept by the optimizer object, which each run makes anew, and by whether arrays are committed to
    their device, as those of a restored checkpoint are.
    """
    made, restore = {}, training.restore

    def cached(config, num_steps):
        key = (repr(config), num_steps)
        if key not in made:
            made[key] = make_optimizer(config, num_steps)
        return made[key]

    def restore_uncommitted(*arguments):
        progress = restore(*arguments)
        if progress is not None:
            arrays = jax.device_get((progress.state, progress.reference_params))
            progress.state, progress.reference_params = jax.tree.map(jnp.asarray, arrays)
        return progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_optimizer", cached)
        patch.setattr(training, "restore", restore_uncommitted)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the summary of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, training.run(small_config(), str(path))


@pytest.fixture
def warm(finished, tmp_path):
    """A directory as a kill in the last step leaves it: the checkpoint of the warm start, metrics of all steps."""
    path = tmp_path / "warm"
    ignored = shutil.ignore_patterns(str(NUM_STEPS), "summary.json", "cost_accuracy.png")
    shutil.copytree(finished[0], path, ignore=ignored)
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["0"]
    return path


@pytest.fixture
def unevaluated(monkeypatch):
    """Evaluation is a stand-in: another test's matter."""
    monkeypatch.setitem(training.EVALUATIONS, "question_answering", lambda *_: {"policies": "a stand-in"})


def read_metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def untimed(path):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIME_FIELDS)} for line in read_metrics(path)
    ]


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def last_state(path, config=None):
    """The last checkpoint: step, arrays, and the ids of the batch that the data iterator comes to next."""
    config = config or small_config()
    parts = build_components(config)
    batches = make_training_iterator(
        parts.train_tasks, parts.preferences, config.world, config.grpo.num_groups, derive_seed(config.seed, "grpo")
    )
    with Checkpointer(path / "checkpoints", config.keep_checkpoints) as checkpointer:
        progress = training.restore(config, parts, checkpointer, batches)
    arrays = jax.device_get((progress.state, progress.reference_params, progress.lagging))
    return progress.step, arrays, [instance.instance_id for instance in next(batches)]


def assert_same_run(path, other, config=None):
    assert untimed(path) == untimed(other)
    (step, arrays, ids), (other_step, other_arrays, other_ids) = last_state(path, config), last_state(other, config)
    assert (step, ids) == (other_step, other_ids)
    jax.tree.map(np.testing.assert_array_equal, arrays, other_arrays)


def interrupt_at(monkeypatch, step, stage="GRPO"):
    """Ctrl-C, pressed while the metrics of a stage's `step` are written."""
    write = MetricsWriter.write

    def write_and_press(self, at, values):
        write(self, at, values)
        if at == step and ("warm_start/loss" in values) == (stage == "warm start"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "write", write_and_press)


def test_a_run_interrupted_after_a_step_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch, capsys):
    """Two runs from one seed, one of them in two sessions: the same numbers, to the last bit."""
    path, summary = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=0)
        with pytest.raises(KeyboardInterrupt):
            training.run(small_config(), str(tmp_path / "run"))
    assert "interrupted: saving after this step" in capsys.readouterr().out
    assert last_state(tmp_path / "run")[0] == 1
    again = training.run(small_config(), str(tmp_path / "run"))
    assert_same_run(path, tmp_path / "run")
    same = ("seed", "commit", "policies", "comparisons", "obedience", "price_response")
    assert {name: again[name] for name in same} == {name: summary[name] for name in same}
    assert again["wall_s"] > 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_the_policy_of_a_run_is_evaluated_again(finished, tmp_path):
    """In its own world the numbers are the run's, to the last bit; nothing of the run is touched."""
    path, summary = finished
    before = contents(path)
    again = evaluate_elsewhere(small_config(), str(path), str(tmp_path / "same"))
    assert again["policies"] == summary["policies"] and again["price_response"] == summary["price_response"]
    assert evaluate_elsewhere(small_config(), str(path), str(tmp_path / "same")) == again  # read, not made again
    assert contents(path) == before
    other = small_config()
    other.prompt.rendering = "qwen3"
    with pytest.raises(ValueError, match=r"trained with .*compact.* as \['prompt'\], and the config has .*qwen3"):
        evaluate_elsewhere(other, str(path), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="holds a run with another config"):
        evaluate_elsewhere(small_config(), str(path), str(path))


@pytest.mark.slow
def test_the_policy_of_a_run_is_evaluated_in_another_world(finished, tmp_path):
    path, summary = finished
    config = small_config()
    config.world.training_pool, config.world.evaluation_pool = TRAINING, UNSEEN_MODELS
    config.episode.max_tokens = config.jax_engine.max_tokens = 600
    policies = evaluate_elsewhere(config, str(path), str(tmp_path / "unseen"))["policies"]
    assert policies["optimal"] != summary["policies"]["optimal"] and "trained" in policies
    command = [sys.executable, "-m", "experiments.evaluate", "--config=configs/smoke.py", f"--policy_of={path}"]
    told = subprocess.run([*command, f"--workdir={tmp_path / 'smoke'}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 2 and "was trained with ['tiny'] as ['model']" in told.stderr


@pytest.mark.slow
def test_a_run_interrupted_in_its_warm_start_ends_as_an_undisturbed_one(finished, unevaluated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=0, stage="warm start")
        with pytest.raises(KeyboardInterrupt):
            training.run(small_config(), str(tmp_path / "run"))
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    steps = []
    supervised_step = training.supervised_step
    monkeypatch.setattr(training, "supervised_step", lambda *a, **k: steps.append(k) or supervised_step(*a, **k))
    training.run(small_config(), str(tmp_path / "run"))
    assert len(steps) == small_config().warm_start.num_steps - 1
    assert_same_run(finished[0], tmp_path / "run")


def test_a_run_killed_before_its_save_does_the_steps_again(finished, warm, unevaluated):
    training.run(small_config(), str(warm))
    assert_same_run(finished[0], warm)


def test_an_interrupt_during_the_last_save_loses_nothing(finished, warm, unevaluated, monkeypatch):
    save = training.save

    def press_and_save(*arguments):
        signal.raise_signal(signal.SIGINT)
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save", press_and_save)
        with pytest.raises(KeyboardInterrupt):
            training.run(small_config(), str(warm))
    assert_same_run(finished[0], warm)
    monkeypatch.setattr(experience, "run_groups", None)  # what is left is no step of training
    assert training.run(small_config(), str(warm))["policies"] == "a stand-in"


def test_money_that_was_spent_is_known_to_the_run_that_goes_on(finished, tmp_path):
    """Saved beside the arrays of a real checkpoint, what was under way when it was written included."""
    config = small_config()
    config.experts.spend_cap_usd = 1.0
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")

    def opened():
        parts = build_components(config)
        batches = make_training_iterator(parts.train_tasks, parts.preferences, config.world, config.grpo.num_groups, 0)
        with Checkpointer(tmp_path / "checkpoints", config.keep_checkpoints) as checkpointer:
            yield parts, batches, checkpointer, training.restore(config, parts, checkpointer, batches)

    for parts, batches, checkpointer, progress in opened():
        assert parts.account.spent_usd == 0.0
        assert parts.account.reserve(0.25) and parts.account.reserve(0.5)
        parts.account.settle(0.5, 0.375)
        progress.step += 1
        training.save(parts, progress, checkpointer, batches.get_state(), 0.0)
    for parts, _, _, progress in opened():
        assert (progress.step, parts.account.spent_usd) == (NUM_STEPS + 1, 0.625)
        assert not parts.account.reserve(0.376) and parts.account.reserve(0.375)


def test_a_step_without_a_kept_group_goes_on(warm, unevaluated, monkeypatch):
    """Every rollout of the first step is ended by infrastructure, and one of each group of the second."""
    run_groups, steps = experience.run_groups, iter(range(NUM_STEPS))

    def failing(*arguments):
        groups, is_first = run_groups(*arguments), next(steps) == 0
        return [
            dataclasses.replace(
                group,
                trajectories=tuple(
                    dataclasses.replace(each, status=EpisodeStatus.TOOL_FAILURE) if is_first or index == 0 else each
                    for index, each in enumerate(group.trajectories)
                ),
            )
            for group in groups
        ]

    monkeypatch.setattr(experience, "run_groups", failing)
    training.run(small_config(), str(warm))
    first, second = read_metrics(warm)
    assert (first["filter/failed_share"], first["filter/kept_groups_share"]) == (1.0, 0.0)
    assert first["filter/reason/too_few_valid"] == 1.0 and "loss/total" not in first
    assert (second["filter/failed_share"], second["filter/kept_groups_share"]) == (0.25, 1.0)
    assert second["loss/num_rollouts"] == 6
    step, (state, *_), _ = last_state(warm)
    assert (step, int(state.step)) == (NUM_STEPS, NUM_STEPS - 1)  # one optimizer step less


def test_a_finished_run_is_not_run_again_and_another_config_is_refused(finished, monkeypatch, capsys):
    path, summary = finished
    before = contents(path)
    monkeypatch.setattr(training, "warm_start", None)
    monkeypatch.setattr(training, "improve", None)
    again = training.run(small_config(), str(path))
    assert again == read_json(path / "summary.json") == json.loads(json.dumps(summary))
    assert capsys.readouterr().out == f"{path} holds this run, finished\n"
    other = small_config()
    other.grpo.kl_coefficient = 0.5
    with pytest.raises(ValueError, match="grpo.kl_coefficient is 0.2 there, 0.5 here"):
        training.run(other, str(path))
    assert contents(path) == before


def test_a_mistake_in_the_config_claims_no_directory(tmp_path):
    config = small_config()
    config.engine = "no such engine"
    with pytest.raises(ValueError, match="engine 'no such engine'"):
        training.run(config, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_leaves_behind(finished):
    path, summary = finished
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith("events.out.tfevents.")}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "warm_start",
        "checkpoints",
        "trajectories",
        "sample_trajectories.txt",
        "cost_accuracy.png",
        "summary.json",
    }
    assert set(summary) >= {"seed", "commit", "wall_s", "peak_rss_bytes", "policies"}
    assert (summary["seed"], read_json(path / "config.json")["model"]) == (0, "tiny") and summary["wall_s"] > 0
    for name in ("trained", "warm_start", "optimal", "random"):
        for entry in summary["policies"][name].values():
            assert {"score", "utility", "accuracy", "cost_usd", "latency_s", "calls", "num_tasks"} <= set(entry)
    saved = [json.loads(line) for line in (path / "trajectories" / "step_000000.jsonl").read_text().splitlines()]
    assert [len(group["trajectories"]) for group in saved] == [4, 4]
    versions = {version for group in saved for each in group["trajectories"] for version in each["policy_versions"]}
    assert versions == {-1, 0}


def test_metrics_are_listed_on_disk_and_in_tensorboard(finished):
    path, _ = finished
    lines = read_metrics(path)
    assert [line.pop("step") for line in lines] == list(range(NUM_STEPS))
    events = EventAccumulator(str(path)).Reload()
    for step, line in enumerate(lines):
        check_metric_names(line)
        for name, value in line.items():
            shown = {event.step: event.value for event in events.Scalars(name)}
            assert shown[step] == pytest.approx(value, rel=1e-6), name


def test_the_trainer_agrees_with_the_sampler_and_every_step_moves_the_weights(finished):
    """One update a step, so the gap is between two programs alone: decoding with a cache, and the packed pass."""
    path, _ = finished
    first, second = read_metrics(path)
    for line in (first, second):
        assert 0 <= line["loss/sampler_gap_mean"] <= line["loss/sampler_gap_max"] < 1e-4
        assert line["loss/ratio_mean"] == 1.0 and line["optimizer/gradient_norm"] > 0
    assert abs(first["loss/kl_reference"]) < 1e-6 < second["loss/kl_reference"]


@pytest.mark.slow
def test_real_episodes_with_programs_and_rewards_are_repeated_too(tmp_path):
    """How long a program runs in the sandbox is the one thing in a run that has a clock."""
    config = small_config()
    config.warm_start.num_steps, config.warm_start.num_groups = 100, 4
    config.grpo.num_groups, config.grpo.num_steps, config.grpo.groups_per_update = 8, 3, 8
    config.jax_engine.num_rows, config.jax_engine.row_buckets = 32, (4, 16)
    summaries = [training.run(config, str(tmp_path / name)) for name in ("one", "two")]
    assert untimed(tmp_path / "one") == untimed(tmp_path / "two")
    assert summaries[0]["policies"] == summaries[1]["policies"]
    for line in read_metrics(tmp_path / "one"):
        assert line["episode/status/answered"] > 0.2 and line["calls/per_rollout"] > 1
        assert line["advantage/std"] > 0.1 and line["loss/sampler_gap_max"] < 1e-4


@pytest.mark.slow
def test_the_learners_other_choices_run_and_resume_with_their_multipliers(tmp_path):
    """Packed rows, a KL in the reward, budgets, resampling, the paper's filters, corrections: all in one run."""
    config = small_config()
    config.checkpoint_every, config.keep_checkpoints = 1, 3
    config.episode.num_corrections = 1
    # Long enough for episodes that differ: where all are cut at the token limit, no group is trained on.
    config.warm_start.num_steps, config.warm_start.num_groups = 100, 4
    config.jax_engine.num_rows, config.jax_engine.row_buckets = 32, (4, 16)
    settings = config.grpo
    settings.num_groups, settings.groups_per_update = 8, 8
    settings.batching, settings.tokens_per_row, settings.rows_per_micro_batch = "packed", 192, 4
    settings.kl = "k1_reward"
    settings.reward_form, settings.budget_cost_usd, settings.multiplier_rate = "constrained", 1e-6, 10.0
    settings.filters, settings.overlong, settings.ratio, settings.correction = "paper", "soft", "sequence", "sequence"
    settings.num_updates, settings.overlong_buffer_tokens = 2, 150  # almost everybody pays for length
    settings.advantage, settings.aggregation, settings.max_resamples = "leave_one_out", "constant", 1
    settings.min_group_std, settings.std_floor = 1e-4, 0.1
    summary = training.run(config, str(tmp_path / "run"))
    lines = untimed(tmp_path / "run")
    assert all(line["multiplier/cost_usd"] > 0 for line in lines)
    for line in lines:
        assert line["filter/kept_groups_share"] > 0 and line["loss/num_tokens"] > 0
        assert line["loss/ratio_mean"] != 1.0 and line["optimizer/gradient_norm"] > 0
        assert line["filter/rollouts/lowers_reward/overlong"] > 0
    assert any(line["filter/resampled_share"] > 0 for line in lines)
    assert any(name.startswith("filter/rollouts/leaves_loss/") for line in lines for name in line)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(NUM_STEPS))
    (tmp_path / "run" / "summary.json").unlink()
    again = training.run(config, str(tmp_path / "run"))
    assert untimed(tmp_path / "run") == lines and again["policies"] == summary["policies"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({}, 0),
        ({"grpo.reward_form": "constrained", "grpo.budget_cost_usd": 1e-6, "grpo.multiplier_rate": 10.0}, 1),
        ({"lora.rank": 2}, 2),
        ({"grpo.kl": "k1_reward", "grpo.optimizer.precision": "bfloat16_master"}, 1),
    ],
)
def test_a_run_one_step_ahead_interrupted_ends_as_an_undisturbed_one(fields, step, unevaluated, tmp_path, monkeypatch):
    """Its sampler is one update behind, from the second step on, in both; so are the multipliers."""
    config = small_config()
    config.grpo.rollout_lag, config.grpo.num_steps = 1, 4
    for path, value in fields.items():
        *parents, field = path.split(".")
        setattr(functools.reduce(getattr, parents, config), field, value)
    training.run(config, str(tmp_path / "one"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            training.run(config, str(tmp_path / "two"))
    training.run(config, str(tmp_path / "two"))
    assert_same_run(tmp_path / "one", tmp_path / "two", config)
    lines = untimed(tmp_path / "one")
    assert ["sampler/gap_mean" in line for line in lines] == [True, False, False, False]
    assert all(line["loss/ratio_mean"] == 1.0 for line in lines)
    gaps = [line["loss/sampler_gap_max"] for line in lines]
    if "grpo.optimizer.precision" not in fields:
        assert gaps[0] < 1e-4
    assert gaps[0] < min(gaps[1:])


@pytest.mark.slow
def test_a_run_with_its_moments_on_the_host_is_the_same_run(finished, unevaluated, tmp_path):
    config = small_config()
    config.warm_start.optimizer.is_state_on_host = config.grpo.optimizer.is_state_on_host = True
    training.run(config, str(tmp_path / "run"))
    assert untimed(tmp_path / "run") == untimed(finished[0])


def test_the_first_ctrl_c_is_a_flag_and_the_second_one_interrupts():
    with pytest.raises(KeyboardInterrupt):
        with training.interrupt_flag() as interrupt:
            assert not interrupt.is_set
            signal.raise_signal(signal.SIGINT)
            assert interrupt.is_set
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directory", "max_prompt_tokens"),
    [(SMALL_TOKENIZER_DIRECTORY, 1408), (QWEN3_DIRECTORY, 704)],
    ids=["small", "qwen3"],
)
def test_the_whole_template_runs_too(directory, max_prompt_tokens, tmp_path, unevaluated):
    """Tools as JSON schemas and results in full: demonstrations, warm start, one step of GRPO."""
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("no Qwen3 tokenizer: set ORCHESTRA_QWEN3_TOKENIZER to a directory that holds one")
    config = small_config()
    config.prompt.rendering, config.prompt.tokenizer_directory = "qwen3", str(directory)
    config.episode.max_tokens = config.jax_engine.max_tokens = max_prompt_tokens + 512
    config.episode.max_turn_tokens = 120
    config.jax_engine.num_rows, config.jax_engine.row_buckets = 4, (4,)
    config.jax_engine.chunk_rows, config.jax_engine.chunk_buckets = 2, (256,)
    config.grpo.prefix_buckets, config.grpo.logprob_chunk = (max_prompt_tokens,), 256
    config.grpo.completion_buckets = (512,)
    config.warm_start.num_steps, config.warm_start.num_groups, config.warm_start.group_size = 1, 2, 2
    config.grpo.num_steps, config.grpo.group_size = 1, 2
    training.run(config, str(tmp_path / "run"))
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss/sampler_gap_max"] < 1e-4 and line["loss/num_rollouts"] == 4
    assert line["episode/prompt_tokens"] > 400
