"""Training on files: a synthesised domain in its folder, and files of tasks in a mixture that a checkpoint resumes."""

import collections
import dataclasses
import itertools
import json
import signal

import pytest

from configs.quickstart_functions import get_config
from orchestra_jax import training
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import InstanceStream, evaluation_instances
from orchestra_jax.data.synthesis.domain_file import DomainFile, write_domain
from orchestra_jax.data.synthesis.records import Brief, DataModel, FunctionSource, Reference
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.metrics import MetricsWriter
from tests.data.synthesis import bakery

BOUGHT = (bakery.GET_ORDER, bakery.CANCEL_ORDER, bakery.CHANGE_AMOUNT)


def small_config():
    config = get_config()
    config.model = "tiny"
    config.functions.num_databases = 1
    config.warm_start.num_steps, config.warm_start.num_groups = 1, 4
    config.jax_engine.num_rows = 16
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.groups_per_update = 2, 4, 4
    config.grpo.min_group_std = 0.0
    config.evaluation.num_per_preference = 2
    return config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The library's own tasks as files, by name: 60 of one line, 20 of two, 20 held out."""
    folder = tmp_path_factory.mktemp("tasks")
    config = small_config()
    config.functions.num_tasks, config.functions.num_test_tasks = 240, 20
    parts = build_components(config)
    by_difficulty = collections.defaultdict(list)
    for task in parts.train_tasks:
        by_difficulty[task.difficulty].append(task)
    tasks = {"one": by_difficulty[1][:60], "two": by_difficulty[2][:20], "held_out": parts.test_tasks}
    parts.resources.close()
    for name, each in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(task.model_dump_json() + "\n" for task in each))
    return folder


def config_on(files, weights=()):
    config = small_config()
    config.functions.task_paths = (str(files / "one.jsonl"), str(files / "two.jsonl"))
    config.functions.task_weights = weights
    config.functions.test_task_path = str(files / "held_out.jsonl")
    return config


def test_batches_are_the_files_tasks_by_weight_and_go_on_where_they_stopped(files):
    config = config_on(files, weights=(1.0, 3.0))
    parts = build_components(config)
    assert parts.train_tasks == () and len(parts.test_tasks) == 20
    batches = training.make_batches(config, parts, 40, seed=7)
    assert isinstance(batches, InstanceStream)
    first = next(batches)
    assert collections.Counter(each.task.difficulty for each in first) == {1: 10, 2: 30}
    state = json.loads(json.dumps(batches.get_state()))  # as a checkpoint keeps it
    second = next(batches)
    again = training.make_batches(config, build_components(config), 40, seed=7)
    again.set_state(state)
    assert next(again) == second != first
    assert {each.preference.name for each in first} == {"outcome", "cheap", "fast"}
    other = config_on(files)
    with pytest.raises(ValueError, match="the saved stream was .*'0/one.jsonl', 60, 1.0.* and this one is .*60, 60.0"):
        training.make_batches(other, build_components(other), 40, seed=7).set_state(state)


def test_without_weights_every_task_comes_once_in_an_epoch(files):
    config = config_on(files)
    parts = build_components(config)
    epoch = [each.task.task_id for each in next(training.make_batches(config, parts, 80, seed=0))]
    assert len(set(epoch)) == 80


@pytest.mark.slow
def test_a_run_on_files_that_is_interrupted_ends_as_an_undisturbed_one(files, tmp_path, monkeypatch):
    whole = training.run(config_on(files), str(tmp_path / "whole"))
    write = MetricsWriter.write

    def write_and_press(self, step, values):
        write(self, step, values)
        if step == 0 and "warm_start/loss" not in values:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_press)
        with pytest.raises(KeyboardInterrupt):
            training.run(config_on(files), str(tmp_path / "cut"))
    again = training.run(config_on(files), str(tmp_path / "cut"))
    assert again["policies"] == whole["policies"]

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line.get("loss/total")) for line in lines]

    assert losses("cut") == losses("whole") and len(losses("whole")) == 2


def make_folder(folder, num_tasks):
    sources = [
        FunctionSource(each["name"], each["description"], each["parameters"], each["is_write"], each["source"])
        for each in BOUGHT
    ]
    model = DataModel(
        bakery.MODEL["tables"],
        {"cakes": "cake_id", "orders": "order_id"},
        tuple(Reference(**each) for each in bakery.MODEL["references"]),
    )
    brief = Brief("bakery", "A bakery takes orders.")
    domain_file = DomainFile(brief, "Be quick.", model, bakery.make_entries("S1-"), tuple(sources))
    write_domain(folder / "domain.json", domain_file)
    amounts = itertools.islice(itertools.count(4), num_tasks)
    lines = [
        FunctionTask(
            task_id=f"bakery/{amount}",
            domain="bakery",
            scenario={"reason_for_call": f"You want {amount} cakes.", "known_info": "Your order is S1-O1."},
            gold_calls=[{"name": "change_amount", "arguments": {"order_id": "S1-O1", "amount": amount}}],
            communicate_info=[f"${4.0 * amount:g}"],
        ).model_dump_json()
        for amount in amounts
    ]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_a_synthesised_domain_is_played_from_its_folder_in_the_sandbox(tmp_path):
    config = RunConfig(environment="functions")
    config.functions.domain = make_folder(tmp_path, num_tasks=12)
    config.prompt.rendering = "qwen3"
    config.episode.max_tokens, config.episode.max_turn_tokens = 8_000, 400
    config.jax_engine.max_tokens = 8_000
    parts = build_components(config_for_long_prompts(config))
    assert [task.task_id for task in parts.test_tasks] == ["bakery/4", "bakery/14"] and len(parts.train_tasks) == 10
    instances = evaluation_instances(parts.test_tasks, parts.preferences[:1], config.world, 2, 0)
    groups = demonstrate(instances, 1, parts.environment, parts.chat, parts.rollout, 0, parts.demonstrated_turn)
    assert [group.trajectories[0].objectives["outcome"] for group in groups] == [1.0, 1.0]
    parts.resources.close()


def config_for_long_prompts(config):
    """The default model is short: only its shape is asked here, nothing is trained."""
    config.model = "qwen3-8b"
    return config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"test_task_path": ""}, "functions.task_paths .* and functions.test_task_path '' are set together"),
        ({"task_weights": (1.0,)}, r"functions.task_weights \(1.0,\) must be one for each of functions.task_paths"),
        ({"task_weights": (1.0, -1.0)}, "the part '1/two.jsonl' has the weight -1.0"),
        ({"test_task_path": "/no/file.jsonl"}, "the data file /no/file.jsonl does not exist"),
        ({"demonstrations": "shown"}, r"functions.demonstrations 'shown' is not one of \['golden', 'guessed'\]"),
        ({"has_short_wishes": False}, 'functions.demonstrations "guessed" reads short wishes alone'),
        ({"domain": "/no/folder"}, "functions.domain '/no/folder' is not one of .*, and there is no such folder"),
    ],
)
def test_what_does_not_go_together_is_said(files, change, told):
    config = config_on(files)
    config.functions = dataclasses.replace(config.functions, **change)
    with pytest.raises(ValueError, match=told):
        training.make_batches(config, build_components(config), 4, seed=0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"domain": "bank"}, r"bad.jsonl, row 2, field domain: 'bank' is not one of \['library-0', 'library-1000'\]"),
        ({"gold_calls": [{"arguments": {}}]}, r"bad.jsonl, row 2, field gold_calls\[0\].name: is missing"),
        ({"difficulty": "hard"}, "bad.jsonl, row 2, field difficulty: 'hard' is not of type 'integer'"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(files, tmp_path, row, told):
    good = json.loads((files / "one.jsonl").read_text().splitlines()[0])
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **row}) + "\n")
    config = config_on(files)
    config.functions.task_paths = (str(path),)
    with pytest.raises(ValueError, match=told):
        build_components(config)


def test_a_folder_with_too_few_tasks_is_refused(tmp_path):
    config = RunConfig(environment="functions")
    config.functions.domain = make_folder(tmp_path, num_tasks=1)
    with pytest.raises(ValueError, match="tasks.jsonl has 1 tasks: one to train on and one to hold out"):
        build_components(config)
    (tmp_path / "tasks.jsonl").unlink()
    with pytest.raises(ValueError, match="has no tasks.jsonl: synthesise some, or set functions.task_paths"):
        build_components(config)
    (tmp_path / "domain.json").write_text("{}")
    with pytest.raises(ValueError, match="domain.json is no synthesised domain"):
        build_components(config)
