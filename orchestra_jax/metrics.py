"""The names of all metrics, and the writer that puts them into metrics.jsonl and TensorBoard.

A name that is not listed here is refused: a misspelt metric would otherwise be a new curve that nobody looks at. In a
name, `<word>` stands for one part that the run decides (a preference, a tool, an objective).

This computes nothing: values come from the loss, the rollouts and the loop. metrics.jsonl is the record; TensorBoard
event files hold the same values for looking at.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping

import numpy as np
from absl import logging
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from orchestra_jax.run_directory import write_text

METRICS = {
    # What the step's rollouts scored; means over valid rollouts.
    "score/reward": "preference-weighted reward",
    "score/reward/<preference>": "the same, of the rollouts with this preference",
    "score/accuracy": "share of rollouts whose answer is right",
    "score/accuracy/<preference>": "the same, of the rollouts with this preference",
    "score/utility": "utility on the reference scale, which does not depend on the group",
    "score/utility/<preference>": "the same, of the rollouts with this preference",
    # The objective vector, unweighted and in its own units; means over valid rollouts.
    "objective/<objective>": "mean of this objective (cost_usd in US dollars, latency_s in seconds, ...)",
    "objective/<preference>/<objective>": "the same, of the rollouts with this preference",
    # What the policy does; per valid rollout.
    "calls/per_rollout": "tool calls per rollout",
    "calls/refused_share": "share of calls that were not allowed or not understood",
    "calls/<preference>/<tool>": "calls of this tool or model per rollout with this preference",
    "calls/reason/<reason>": "share of calls that did not end well for this reason (types.Reason)",
    # Of the rollouts of instances with a budget.
    "budget/violation_rate": "share of rollouts that cost or took more than their budget",
    "budget/refused_share": "share of rollouts with a call that the budget refused or cut",
    "budget/used_share": "mean share of the tighter limit that was used",
    "spend/total_usd": "real money that the run has spent so far",
    "spend/judge_usd": "what the verdicts on the step's rollouts cost, those replayed included",
    "spend/user_usd": "what the model that plays the user cost in the step's rollouts, replies replayed included",
    "episode/completion_tokens": "tokens per rollout after the prompt",
    "episode/prompt_tokens": "tokens of the prompt",
    "episode/status/<status>": "share of rollouts that ended so (types.EpisodeStatus)",
    "episode/truncated_share": "share of rollouts that a turn or token limit ended",
    # What never reaches the loss.
    "filter/kept_groups_share": "share of groups that are trained on",
    "filter/reason/<reason>": "share of groups dropped for this reason (grpo.filters.FilterReason)",
    "filter/rollouts/<effect>/<reason>": "share of rollouts that a filter decided about so (grpo.filters)",
    "filter/resampled_share": "groups played in the place of homogeneous ones, per group of the step",
    "multiplier/<objective>": "Lagrange multiplier of the budget on this objective",
    "filter/failed_share": "share of rollouts that infrastructure ended: left out of every statistic",
    "filter/masked_tokens_share": "share of completion tokens outside the loss mask",
    "advantage/std": "standard deviation of the advantages over the trained rollouts",
    "advantage/clipped_share": "share of advantages that the clip changed",
    # The sampler; natural logarithms.
    "sampler/logprob_mean": "mean log-probability of a sampled token, as sampled",
    "sampler/gap_mean": "|log-probability of the trainer - of the sampler| with the same weights in both, nats",
    "sampler/tokens_per_s": "sampled tokens per second of rollout time",
    # grpo.loss, by its own names; means over tokens in the loss mask unless said otherwise.
    "loss/total": "the loss",
    "loss/policy_loss": "policy term of the loss",
    "loss/ratio_mean": "current over old probability",
    "loss/clip_share": "share of tokens where the clip is active",
    "loss/dual_clip_share": "share of tokens where the dual clip is active",
    "loss/kl_old": "estimate of KL(current, old), nats per token",
    "loss/kl_reference": "estimate of KL(current, reference), nats per token",
    "loss/entropy": "entropy of the policy, nats per token",
    "loss/correction_mean": "truncated importance correction, old over sampler probability",
    "loss/correction_truncated_share": "share of tokens whose correction is truncated",
    "loss/sampler_gap_mean": "|log-probability of the trainer - of the sampler|, nats",
    "loss/sampler_gap_max": "the largest such gap of the step, nats",
    "loss/num_tokens": "tokens in the loss mask",
    "loss/num_rollouts": "rollouts with a token in the loss mask",
    "optimizer/gradient_norm": "global norm of the gradient before clipping",
    # Supervised warm start.
    "warm_start/loss": "cross entropy, nats per trained token",
    # Seconds are wall-clock seconds of this step, not the episodes' virtual ones.
    "speed/step_s": "the whole step",
    "speed/rollout_s": "sampling and tools",
    "speed/batch_s": "advantages and packing; with a rollout lag the reference's log-probabilities, too",
    "speed/waited_s": "until rollouts and batches were there: with a rollout lag they are made beside the last update",
    "speed/train_s": "forward, backward and update",
    "speed/trained_tokens_per_s": "sampled tokens per second of step time",
    "speed/rollouts_per_s": "rollouts per second of step time",
}


def check_metric_names(names) -> None:
    """ValueError names the first name that METRICS does not list."""
    for name in names:
        if not _listed_names().fullmatch(name):
            close = difflib.get_close_matches(name, METRICS, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "list it in orchestra_jax.metrics.METRICS"
            raise ValueError(f"unknown metric {name!r}: {mend}")


@functools.cache
def _listed_names():
    return re.compile("|".join(re.sub("<[a-z_]+>", "[^/<>]+", re.escape(name)) for name in METRICS))


class MetricsWriter:
    """Writes the metrics of a run into `directory`. One `write` a step, on disk when it returns."""

    def __init__(self, directory: str | os.PathLike, is_resumed: bool):
        """Opens the files.

        Args:
          directory: the run directory; made if it is missing.
          is_resumed: the run goes on. Its first `write`, at step k, cuts away what was written for step k and later.

        Raises:
          ValueError: the run is new, but `directory` holds metrics.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        if not is_resumed and self._path.exists():
            raise ValueError(f"{self._path} exists: choose a new directory, or resume the run that wrote it")
        self._file = None
        self._last_step = -1
        self._warned_names = set()
        self._events = EventFileWriter(os.fspath(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes all metrics of one step. Values are Python, numpy or jax scalars; NaN and infinity become null.

        Raises:
          ValueError: a name is not listed in METRICS, or a value is no scalar.
        """
        check_metric_names(values)
        assert step > self._last_step, f"step {step} comes after step {self._last_step}: one write a step"
        numbers = {name: _as_float(name, value) for name, value in values.items()}
        if self._file is None:
            self._start(step)
        self._last_step = step
        self._warn_of_non_finite(step, numbers)
        line = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        summary = [summary_pb2.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add_event(step, summary=summary_pb2.Summary(value=summary))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, step):
        if self._path.exists():
            _cut_lines(self._path, step)
            # TensorBoard drops what older event files hold for this step and later.
            self._add_event(step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._file = open(self._path, "a", encoding="utf-8")

    def _add_event(self, step, **content):
        self._events.add_event(event_pb2.Event(step=step, wall_time=time.time(), **content))
        self._events.flush()

    def _warn_of_non_finite(self, step, numbers):
        names = [name for name, number in numbers.items() if not math.isfinite(number)]
        for name in sorted(set(names) - self._warned_names):  # once a name: a NaN mostly stays
            logging.warning("metric %s is %s at step %d", name, numbers[name], step)
        self._warned_names.update(names)


def _as_float(name, value):
    if np.ndim(value) != 0:
        raise ValueError(f"metric {name!r} has shape {np.shape(value)}: a metric is one number")
    return float(value)


def _cut_lines(path, first_step):
    """Removes the lines of `first_step` and later, and a last line that a kill left unfinished."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    write_text(path, "".join(line for line in lines if json.loads(line)["step"] < first_step))
