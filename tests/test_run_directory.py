"""The run directory: one run only, nothing overwritten, atomic writes."""

import dataclasses
import enum
import json
import math
import os
import pathlib

import numpy as np
import pytest

from orchestra_jax.run_directory import config_as_dict, json_value, open_run_directory, write_json
from orchestra_jax.types import EpisodeStatus, TrajectoryGroup

CONFIG = {"seed": 0, "grpo": {"group_size": 8, "clip": [0.2, 0.28]}, "name": "a"}


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_new_directory_is_made_and_the_same_config_resumes(tmp_path):
    run = open_run_directory(tmp_path / "deep" / "run", CONFIG)
    assert not run.is_resumed
    assert json.loads(run.config_path.read_text()) == CONFIG
    assert run.checkpoints_path.is_dir() and run.trajectories_path.is_dir()
    assert run.metrics_path == tmp_path / "deep" / "run" / "metrics.jsonl"
    # Tuples are lists in JSON: the config in memory still is the same run.
    again = open_run_directory(run.path, {**CONFIG, "grpo": {"group_size": 8, "clip": (0.2, 0.28)}})
    assert again.is_resumed and again.path == run.path


def test_another_config_is_refused_with_the_first_three_fields(tmp_path):
    run = open_run_directory(tmp_path, CONFIG)
    run.write_summary({"score": 1.0})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"grpo.group_size is 8 there, 4 here\); choose a new --workdir"):
        open_run_directory(tmp_path, {**CONFIG, "grpo": {"group_size": 4, "clip": [0.2, 0.28]}})
    with pytest.raises(ValueError) as caught:
        open_run_directory(tmp_path, {"seed": 1, "grpo": {"group_size": 4, "clip": [0.2, 0.3], "beta": 0.1}})
    assert str(tmp_path) in str(caught.value)
    assert "seed is 0 there, 1 here" in str(caught.value)
    assert "grpo.clip is [0.2, 0.28] there, [0.2, 0.3] here" in str(caught.value)
    assert "and 2 more" in str(caught.value) and "beta" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_field_that_is_new_or_of_another_type_is_a_difference(tmp_path):
    open_run_directory(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="a is 1 there, true here"):
        open_run_directory(tmp_path, {"a": True})
    with pytest.raises(ValueError, match="b is nothing there, null here"):
        open_run_directory(tmp_path, {"a": 1, "b": None})


def test_files_that_are_no_run_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no run directory.*thesis.tex"):
        open_run_directory(tmp_path, CONFIG)
    assert contents(tmp_path) == before


def test_a_kill_while_the_directory_was_made_can_be_repeated(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"se')
    assert not open_run_directory(tmp_path, CONFIG).is_resumed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.json", "trajectories"]


def test_what_cannot_be_written_or_read_is_a_user_mistake(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="cannot write to run directory .*file"):
            open_run_directory(path, CONFIG)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        open_run_directory(broken, CONFIG)
    run = open_run_directory(tmp_path / "run", CONFIG)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so permissions show nothing
    with pytest.raises(ValueError, match="no permission"):
        open_run_directory(run.path, CONFIG)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"score": 1})

    def fail(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"score": 2})
    assert json.loads(path.read_text()) == {"score": 1}


def test_trajectories_are_one_group_a_line(tmp_path):
    run = open_run_directory(tmp_path, CONFIG)
    group = TrajectoryGroup("task-1", {"outcome": 1.0}, ())
    path = run.write_trajectories(12, [group, {"tokens": np.array([1, 2]), "status": EpisodeStatus.ANSWERED}])
    assert path == tmp_path / "trajectories" / "step_000012.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"instance_id": "task-1", "weights": {"outcome": 1.0}, "trajectories": []},
        {"tokens": [1, 2], "status": "answered"},
    ]


class Rule(enum.Enum):
    GROUP = "group"


@dataclasses.dataclass
class Inner:
    clip: tuple[float, float] = (0.2, math.inf)
    rule: Rule = Rule.GROUP


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    directory: pathlib.Path = pathlib.Path("a/b")
    extra: object = None


def test_a_config_becomes_json_values():
    value = config_as_dict(Outer())
    assert value == {"inner": {"clip": [0.2, "inf"], "rule": "group"}, "directory": "a/b", "extra": None}
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_what_json_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"config.extra\[1\] is <function"):
        config_as_dict(Outer(extra=[1, open_run_directory]))
    with pytest.raises(ValueError, match="has the key 3"):
        json_value({"a": {3: 1}}, "config")
    with pytest.raises(ValueError, match="a config is a dataclass instance"):
        config_as_dict({"a": 1})
