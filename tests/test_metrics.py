"""The metric list and the writer: refused names, null for NaN, resumption, TensorBoard's own reader."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestra_jax.metrics import METRICS, MetricsWriter, check_metric_names


def read_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory, tag):
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_what_is_written_is_read_back(tmp_path):
    with MetricsWriter(tmp_path / "run", is_resumed=False) as writer:
        writer.write(0, {"loss/total": 0.5, "calls/cheap/search-1": np.float32(2)})
        writer.write(3, {"loss/total": jnp.float32(0.25), "loss/num_tokens": 7})
    assert read_lines(tmp_path / "run") == [
        {"step": 0, "loss/total": 0.5, "calls/cheap/search-1": 2.0},
        {"step": 3, "loss/total": 0.25, "loss/num_tokens": 7.0},
    ]
    assert read_events(tmp_path / "run", "loss/total") == [(0, 0.5), (3, 0.25)]
    assert read_events(tmp_path / "run", "calls/cheap/search-1") == [(0, 2.0)]


def test_a_killed_run_loses_no_step(tmp_path):
    writer = MetricsWriter(tmp_path, is_resumed=False)
    writer.write(0, {"loss/total": 0.5})
    assert read_lines(tmp_path) == [{"step": 0, "loss/total": 0.5}]  # before close
    assert read_events(tmp_path, "loss/total") == [(0, 0.5)]
    writer.close()


def test_nan_is_null_and_warned_about_once(tmp_path, caplog):
    with MetricsWriter(tmp_path, is_resumed=False) as writer, caplog.at_level("WARNING", logger="absl"):
        writer.write(0, {"loss/total": math.nan, "loss/kl_old": math.inf})
        writer.write(1, {"loss/total": math.nan, "loss/kl_old": 1.0})
    assert read_lines(tmp_path)[0] == {"step": 0, "loss/total": None, "loss/kl_old": None}
    assert [record.getMessage() for record in caplog.records] == [
        "metric loss/kl_old is inf at step 0",
        "metric loss/total is nan at step 0",
    ]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, is_resumed=False) as writer:
        for step in range(4):
            writer.write(step, {"loss/total": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss/to')  # killed in the middle of a line
    with MetricsWriter(tmp_path, is_resumed=True) as writer:
        writer.write(2, {"loss/total": 20.0})
        writer.write(3, {"loss/total": 30.0})
    values = [(line["step"], line["loss/total"]) for line in read_lines(tmp_path)]
    assert values == [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0)]
    assert read_events(tmp_path, "loss/total") == values


def test_a_new_run_does_not_write_into_old_metrics(tmp_path):
    MetricsWriter(tmp_path, is_resumed=True).close()  # resumed before its first step: nothing to cut
    with MetricsWriter(tmp_path, is_resumed=False) as writer:
        writer.write(0, {"loss/total": 1.0})
    with pytest.raises(ValueError, match="metrics.jsonl exists"):
        MetricsWriter(tmp_path, is_resumed=False)


@pytest.mark.parametrize("name", ["score/reward", "calls/balanced/answer-math-1", "objective/cost_usd"])
def test_listed_and_open_names_pass(name):
    check_metric_names([name])


@pytest.mark.parametrize("name", ["loss/totl", "calls/cheap/search/1", "calls//search", "loss/total/x", "objective/"])
def test_an_unlisted_name_is_refused(name, tmp_path):
    with MetricsWriter(tmp_path, is_resumed=False) as writer:
        with pytest.raises(ValueError, match=f"unknown metric '{name}'"):
            writer.write(0, {"score/reward": 1.0, name: 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_close_name_is_proposed():
    with pytest.raises(ValueError, match="did you mean 'loss/total'"):
        check_metric_names(["loss/totl"])


def test_values_and_steps_are_checked(tmp_path):
    with MetricsWriter(tmp_path, is_resumed=False) as writer:
        with pytest.raises(ValueError, match=r"'loss/total' has shape \(2,\)"):
            writer.write(0, {"loss/total": np.zeros(2)})
        writer.write(1, {"loss/total": 1.0})
        with pytest.raises(AssertionError, match="one write a step"):
            writer.write(1, {"loss/total": 1.0})


def test_every_metric_has_a_meaning():
    for name, meaning in METRICS.items():
        assert "/" in name and meaning and "\n" not in meaning
