"""The numbers of one step, from trajectories made by hand."""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.data.records import Budget, Instance, Preference, Task
from orchestra_jax.grpo.scoring import ScoringSettings, score_groups
from orchestra_jax.metrics import check_metric_names
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.rollout_metrics import SamplerGapError, check_sampler_gap, rollout_metrics
from orchestra_jax.tools.ledger import JUDGE, ORCHESTRATOR, USER, make_receipt
from orchestra_jax.types import CallRecord, CallStatus, EpisodeStatus, Reason, ToolCall, Trajectory, TrajectoryGroup

OBJECTIVES = (Objective("outcome", "maximize", 0.0, 1.0), Objective("cost_usd", "minimize", 0.0, 1.0))
SECONDS = (2.0, 0.5, 2.5, 1.5)  # the rollouts and their batches were made in turn
NUM_PROMPT_TOKENS = 2
LOSSES = [
    {
        "loss": 1.0,
        "policy_loss": 2.0,
        "sampler_gap_mean": 0.2,
        "sampler_gap_max": 0.5,
        "num_tokens": 10,
        "num_rollouts": 2,
        "gradient_norm": 1,
    },
    {
        "loss": 3.0,
        "policy_loss": 4.0,
        "sampler_gap_mean": 0.1,
        "sampler_gap_max": 0.1,
        "num_tokens": 30,
        "num_rollouts": 4,
        "gradient_norm": 2,
    },
]


def instance(preference, weights):
    task = Task("t", "geography", "one_hop", "", "", "search")
    return Instance(f"t/{preference}", task, Preference(preference, "", weights), (), 0)


CHEAP = instance("cheap", {"outcome": 0.0, "cost_usd": 1.0})
RIGHT = instance("right", {"outcome": 1.0, "cost_usd": 0.0})


def call(tool, alias, status=CallStatus.OK):
    return CallRecord(ToolCall(tool, {"model": alias}), "", status, False)


def rollout(outcome, cost_usd, calls=(), status=EpisodeStatus.ANSWERED, mask=(True, True, False, True)):
    """Two prompt tokens, then one a letter of `mask`; a sampled token has log-probability -1."""
    loss_mask = np.array([False] * NUM_PROMPT_TOKENS + list(mask))
    values = {"outcome": outcome, "cost_usd": cost_usd}
    return Trajectory(
        "t", 0, np.zeros(len(loss_mask), np.int32), loss_mask, -loss_mask.astype(np.float32), loss_mask - 1,
        NUM_PROMPT_TOKENS, tuple(calls), (), status, "", values,
    )  # fmt: skip


def group(of, *rollouts):
    return TrajectoryGroup(of.instance_id, of.preference.weights, rollouts)


def metrics(groups, losses=()):
    scored = score_groups(groups, OBJECTIVES, ScoringSettings())
    values = rollout_metrics([CHEAP, RIGHT], groups, scored, OBJECTIVES, losses, SECONDS)
    check_metric_names(values)
    return values


SEARCH, ANSWER, REFUSED = call("search", "expert-1"), call("answer", "expert-2"), call("x", "y", CallStatus.REFUSED)
FAILED = rollout(0.0, 9.0, [SEARCH] * 3, EpisodeStatus.TOOL_FAILURE, mask=(True,) * 8)
GROUPS = [
    group(CHEAP, rollout(1.0, 0.25, [SEARCH, ANSWER]), rollout(1.0, 0.75, [ANSWER])),
    group(RIGHT, rollout(0.0, 0.5, [REFUSED], EpisodeStatus.TURN_LIMIT, mask=(True, False)), FAILED),
]


def test_means_are_over_the_rollouts_that_say_something_about_the_policy():
    values = metrics(GROUPS, LOSSES)
    expected = {
        "score/reward": (0.75 + 0.25 + 0.0) / 3,
        "score/utility/cheap": 0.5,
        "score/accuracy": 2 / 3,
        "score/accuracy/right": 0.0,
        "objective/cost_usd": 0.5,
        "objective/right/cost_usd": 0.5,
        "calls/per_rollout": 4 / 3,
        "calls/refused_share": 1 / 4,
        "calls/cheap/search": 0.5,
        "calls/cheap/answer": 1.0,
        "calls/cheap/expert-2": 1.0,
        "episode/completion_tokens": 10 / 3,
        "episode/prompt_tokens": 2.0,
        "episode/truncated_share": 1 / 3,
        "sampler/logprob_mean": -1.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith("calls/right/") for name in values)  # a refused call used nobody


def test_shares_of_statuses_and_filters_count_every_rollout():
    values = metrics(GROUPS)
    expected = {
        "episode/status/answered": 0.5,
        "episode/status/turn_limit": 0.25,
        "episode/status/tool_failure": 0.25,
        "filter/failed_share": 0.25,
        "filter/kept_groups_share": 0.5,
        "filter/reason/too_few_valid": 0.5,
        "filter/masked_tokens_share": 1 - (3 + 3 + 1 + 8) / (4 + 4 + 2 + 8),
        "advantage/std": 1 / np.sqrt(2),  # +-1/2 over the sample's standard deviation, 1/2 sqrt(2)
        "advantage/clipped_share": 0.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_losses_are_means_over_the_optimizer_steps_and_counts_add_up():
    values = metrics(GROUPS, LOSSES)
    expected = {
        "loss/total": 2.0,
        "loss/policy_loss": 3.0,
        "sampler/gap_mean": 0.2,  # of the first update alone
        "loss/sampler_gap_mean": 0.15,
        "loss/sampler_gap_max": 0.5,
        "loss/num_tokens": 40,
        "loss/num_rollouts": 6,
        "optimizer/gradient_norm": 1.5,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_speed_counts_sampled_tokens_and_the_seconds_of_the_step():
    values = metrics(GROUPS)
    num_sampled = 3 + 3 + 1 + 8
    expected = {
        "speed/rollout_s": 2.0,
        "speed/batch_s": 0.5,
        "speed/waited_s": 2.5,
        "speed/train_s": 1.5,
        "speed/step_s": 4.0,
        "speed/rollouts_per_s": 1.0,
        "speed/trained_tokens_per_s": num_sampled / 4,
        "sampler/tokens_per_s": num_sampled / 2,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_a_step_in_which_everything_failed_has_numbers_all_the_same():
    empty = dataclasses.replace(FAILED, tokens=FAILED.tokens[:2], loss_mask=FAILED.loss_mask[:2], calls=())
    values = metrics([group(CHEAP, empty, empty), group(RIGHT, empty, empty)])
    assert np.isfinite(list(values.values())).all()
    assert values["filter/failed_share"] == values["episode/status/tool_failure"] == 1.0
    assert (values["filter/kept_groups_share"], values["filter/reason/too_few_valid"]) == (0.0, 1.0)
    assert not any(name.startswith(("score/", "calls/", "objective/", "loss/", "advantage/")) for name in values)


def test_the_experiments_bills_are_summed_apart_and_are_no_calls():
    late = make_receipt(USER, service_s=1.0, fixed_cost_usd=0.5, status=CallStatus.TIMEOUT, reason=Reason.DEADLINE)
    own = make_receipt(ORCHESTRATOR, service_s=1.0, fixed_cost_usd=9.0)
    paid = dataclasses.replace(FAILED, receipts=(own, make_receipt(USER, service_s=1.0, fixed_cost_usd=0.25), late))
    judged = dataclasses.replace(
        GROUPS[0].trajectories[0], receipts=(own, make_receipt(JUDGE, service_s=1.0, fixed_cost_usd=0.125), late)
    )
    values = metrics([group(CHEAP, judged, judged), group(RIGHT, GROUPS[1].trajectories[0], paid)])
    assert (values["spend/user_usd"], values["spend/judge_usd"]) == (0.5 + 0.25 + 0.5 + 0.5, 0.25)
    assert not any(name.startswith("calls/reason/") for name in values)
    assert not any(name.startswith("spend/") for name in metrics(GROUPS))


def test_what_a_budget_did_by_hand():
    """Limits of $0.01 and 10 s: one stays within, one is refused a call and yet overspends, one is late."""

    def charged(cost_usd, service_s, *refusals):
        receipts = (
            make_receipt(ORCHESTRATOR, service_s=1.0, fixed_cost_usd=cost_usd),
            make_receipt("answer", service_s=service_s),
            *(make_receipt("answer", service_s=0.0, status=CallStatus.REFUSED, reason=reason) for reason in refusals),
        )
        return dataclasses.replace(rollout(1.0, cost_usd), receipts=receipts)

    limited = dataclasses.replace(CHEAP, budget=Budget(0.01, 10.0))
    rollouts = (charged(0.005, 3.0), charged(0.012, 1.0, Reason.OVER_BUDGET), charged(0.0, 19.0))
    groups = [group(limited, *rollouts), group(RIGHT, charged(5.0, 500.0), charged(0.0, 0.0), charged(0.1, 1.0))]
    scored = score_groups(groups, OBJECTIVES, ScoringSettings())
    values = rollout_metrics([limited, RIGHT], groups, scored, OBJECTIVES, (), SECONDS)
    expected = {"violation_rate": 2 / 3, "refused_share": 1 / 3, "used_share": (0.5 + 1.2 + 2.0) / 3}
    assert {name: values[f"budget/{name}"] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith("budget/") for name in metrics(GROUPS))  # no budget, no figure


def test_a_gap_beyond_the_limit_stops_the_run_and_so_does_one_that_is_no_number():
    check_sampler_gap(0.02, 0.02)
    with pytest.raises(SamplerGapError, match="differ by 0.021 nats on average, and grpo.max_sampler_gap is 0.02"):
        check_sampler_gap(0.021, 0.02)
    with pytest.raises(SamplerGapError, match="differ by nan"):
        check_sampler_gap(float("nan"), 0.02)
