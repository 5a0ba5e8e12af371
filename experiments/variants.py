"""Named variants of the learner: each a handful of fields that differ from the config's own.

A key is a field's path in `RunConfig`. FACTORS change one thing at a time; the ratio is 1 in a single pass over the
rollouts, so what chooses it makes two. FULL_SIZE are the three that are worth hours. Floors and budgets are in dollars
and seconds of the default world (references $0.012 and 50 s).
"""

from __future__ import annotations

import copy

VARIANTS: dict[str, dict[str, object]] = {
    "anchored": {"grpo.range_rule": "reference"},  # the default
    "paper": {"grpo.range_rule": "group"},
    "paper_with_floor": {
        "grpo.range_rule": "group",
        "grpo.range_floor_cost_usd": 0.012,
        "grpo.range_floor_latency_s": 50.0,
    },
    "correct_only": {"grpo.range_rule": "correct"},
    "ungated": {"grpo.reward_form": "ungated_sum"},
    "weight_then_normalize": {"grpo.reward_form": "weight_then_normalize"},
    "chebyshev": {"grpo.reward_form": "chebyshev"},
    "per_objective": {"grpo.reward_form": "per_objective"},
    "constrained": {"grpo.reward_form": "constrained", "grpo.budget_cost_usd": 0.004, "grpo.budget_latency_s": 20.0},
    "group_std": {"grpo.advantage": "grpo"},
    "dr_grpo": {"grpo.advantage": "dr_grpo"},
    "rloo": {"grpo.advantage": "rloo"},
    "leave_one_out": {"grpo.advantage": "leave_one_out", "grpo.std_floor": 0.1},
    "batch_baseline": {"grpo.advantage": "batch"},
    "rollout_mean": {"grpo.aggregation": "rollout_mean"},
    "sequence_mean": {"grpo.aggregation": "sequence_mean"},
    "constant": {"grpo.aggregation": "constant"},
    "two_passes": {"grpo.num_updates": 2},  # what the next two are to be compared with
    "gspo": {
        "grpo.num_updates": 2,
        "grpo.ratio": "sequence",
        "grpo.aggregation": "rollout_mean",
        "grpo.clip_low": 3e-4,
        "grpo.clip_high": 4e-4,
    },
    "cispo": {"grpo.num_updates": 2, "grpo.ratio": "cispo"},
    "sequence_correction": {"grpo.correction": "sequence"},
    "no_correction": {"grpo.correction": "none"},
    "kl_k3": {"grpo.kl": "k3"},
    "kl_in_reward": {"grpo.kl": "k1_reward"},
    "paper_filters": {"grpo.filters": "paper"},
    "resampling": {"grpo.max_resamples": 2},
    "corrections": {"episode.num_corrections": 1},
    "overlong_masked": {"grpo.overlong": "mask"},
    "packed": {"grpo.batching": "packed"},
}
FACTORS = tuple(VARIANTS)
FULL_SIZE = ("anchored", "paper", "paper_with_floor")


def with_variant(config, name: str, seed: int):
    """A copy of the config with a variant's fields. ValueError for an unknown variant."""
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is not one of {sorted(VARIANTS)}")
    changed = copy.deepcopy(config)
    changed.seed = seed
    for path, value in VARIANTS[name].items():
        *parents, field = path.split(".")
        part = changed
        for parent in parents:
            part = getattr(part, parent)
        assert hasattr(part, field), f"{path} of variant {name} is no field of the config"
        setattr(part, field, value)
    return changed
