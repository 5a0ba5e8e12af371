"""Rewards, advantages and losses once more, in float64, rollout by rollout, written from the formulas.

Nothing here comes from the package: plain loops over plain numbers, as slow as they are easy to check. An objective
is a dict: name, direction, low, high, floor, gated, cap.
"""

import math

import numpy as np


def value_of(objective, value):
    return min(value, objective.get("cap", math.inf))


def ranges(rule, objectives, vectors, valid):
    """(low, high, span) of each objective."""
    found = []
    for m, objective in enumerate(objectives):
        if rule == "reference" or not objective["gated"]:
            found.append((objective["low"], objective["high"], objective["high"] - objective["low"]))
            continue
        rows = [i for i in range(len(vectors)) if valid[i]]
        if rule == "correct":
            if objective["name"] == "outcome":
                found.append((objective["low"], objective["high"], objective["high"] - objective["low"]))
                continue
            gate = [o["name"] for o in objectives].index("outcome")
            right = [i for i in rows if vectors[i][gate] == 1]
            rows = right or rows
        values = [value_of(objective, vectors[i][m]) for i in rows]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        if high - low < objective["floor"]:  # the interval of that length next to `low` that holds all values
            low = min(max(objective["low"], high - objective["floor"]), low)
            high = low + objective["floor"]
        found.append((low, high, high - low))
    return found


def normalized(rule, objectives, vectors, valid):
    """(coordinate, whether it has a range) for each rollout and objective."""
    bounds = ranges(rule, objectives, vectors, valid)
    rows = []
    for i, vector in enumerate(vectors):
        row = []
        for m, (low, high, span) in enumerate(bounds):
            if not valid[i] or span == 0:
                row.append((0.0, span > 0))
                continue
            value = min(max(value_of(objectives[m], vector[m]), low), high)
            gain = value - low if objectives[m]["direction"] == "maximize" else high - value
            row.append((gain / span, True))
        rows.append(row)
    return rows


def reward(form, rule, objectives, vectors, weights, valid, budgets=(), multipliers=None):
    gated = [m for m, objective in enumerate(objectives) if objective["gated"]]
    ungated = [m for m in range(len(objectives)) if m not in gated]
    total = sum(weights[m] for m in gated)
    share = {m: weights[m] / total for m in gated}
    gate = [objective["name"] for objective in objectives].index("outcome")
    coordinate = normalized(rule, objectives, vectors, valid)
    scores = []  # of "weight_then_normalize"
    for vector in vectors:
        terms = []
        for m in gated:
            objective = objectives[m]
            sign = 1 if objective["direction"] == "maximize" else -1
            terms.append(share[m] * sign * value_of(objective, vector[m]) / (objective["high"] - objective["low"]))
        scores.append(sum(terms))
    alive = [score for score, is_valid in zip(scores, valid) if is_valid]
    rewards = []
    for i, vector in enumerate(vectors):
        if not valid[i]:
            rewards.append(0.0)
            continue
        y, row = vector[gate], coordinate[i]
        weighted = sum(share[m] * row[m][0] for m in gated)
        if form in ("gated_sum", "per_objective"):
            main = y * weighted
        elif form == "ungated_sum":
            main = weighted
        elif form == "weight_then_normalize":
            spread = max(alive) - min(alive)
            main = y * (scores[i] - min(alive)) / spread if spread > 0 else 0.0
        elif form == "chebyshev":
            main = y * (1 - max(share[m] * (1 - row[m][0]) if row[m][1] else 0.0 for m in gated))
        elif form == "constrained":
            price, prices = 0.0, 0.0
            for name, limit in budgets:
                m = [objective["name"] for objective in objectives].index(name)
                price += multipliers[name] * (vector[m] - limit) / (objectives[m]["high"] - objectives[m]["low"])
                prices += multipliers[name]
            main = (y - price) / (1 + prices)
        rewards.append(main - sum(weights[m] * (1 - row[m][0]) for m in ungated))
    return np.array(rewards)


def mean_and_std(values, ddof):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - ddof, 1))


def advantages(kind, rewards_PG, valid_PG, ddof, epsilon, floor):
    """Before the clip."""
    everything = [r for row, valid in zip(rewards_PG, valid_PG) for r, is_valid in zip(row, valid) if is_valid]
    squares, num_free = 0.0, 0
    for row, valid in zip(rewards_PG, valid_PG):
        values = [r for r, is_valid in zip(row, valid) if is_valid]
        if len(values) >= 2:
            squares += sum((r - sum(values) / len(values)) ** 2 for r in values)
            num_free += len(values) - ddof
    found = np.zeros(np.shape(rewards_PG))
    for p, (row, valid) in enumerate(zip(rewards_PG, valid_PG)):
        alive = [i for i in range(len(row)) if valid[i]]
        for i in alive:
            others = [row[j] for j in alive if j != i]
            if kind == "batch":
                if len(everything) >= 2:
                    mean, std = mean_and_std(everything, ddof)
                    found[p, i] = (row[i] - mean) / (max(std, floor) + epsilon)
                continue
            if not others:
                continue
            mean, std = mean_and_std([row[j] for j in alive], ddof)
            if kind == "grpo":
                found[p, i] = (row[i] - mean) / (max(std, floor) + epsilon)
            elif kind == "dr_grpo":
                found[p, i] = row[i] - mean
            elif kind == "batch_std":
                found[p, i] = (row[i] - mean) / (max(math.sqrt(squares / num_free), floor) + epsilon)
            elif kind == "rloo":
                found[p, i] = row[i] - sum(others) / len(others)
            elif kind == "leave_one_out":
                mean, std = mean_and_std(others, ddof)
                found[p, i] = (row[i] - mean) / (max(std, floor) + epsilon)
    return found


def loss(current, old, sampler, reference, entropy, advantage, mask, settings):
    """The loss of a batch [B][T] with one rollout a row. `settings` holds everything that `grpo_loss` is told."""
    total, num_tokens, num_rollouts = 0.0, 0, 0
    for i in range(len(mask)):
        tokens = [t for t in range(len(mask[i])) if mask[i][t]]
        if not tokens:
            continue
        num_rollouts += 1
        num_tokens += len(tokens)
        mean_log_ratio = sum(current[i][t] - old[i][t] for t in tokens) / len(tokens)
        product = math.exp(sum(old[i][t] - sampler[i][t] for t in tokens))
        for t in tokens:
            ratio = math.exp(mean_log_ratio if settings["ratio"] == "sequence" else current[i][t] - old[i][t])
            untruncated = {"token": math.exp(old[i][t] - sampler[i][t]), "sequence": product, "none": 1.0}
            correction = min(untruncated[settings["correction"]], settings["correction_clip"])
            a = advantage[i]
            if settings["ratio"] == "cispo":
                # The weight has no gradient: it is taken at `frozen`, where the caller stands.
                weight = math.exp(settings.get("frozen", current)[i][t] - old[i][t])
                policy = -min(weight, 1 + settings["clip_high"]) * a * current[i][t]
            else:
                clipped = min(max(ratio, 1 - settings["clip_low"]), 1 + settings["clip_high"])
                surrogate = min(ratio * a, clipped * a)
                if a < 0:
                    surrogate = max(surrogate, settings["dual_clip"] * a)
                policy = -surrogate
            difference = reference[i][t] - current[i][t]
            kl = {"k2": 0.5 * difference**2, "k3": math.exp(difference) - 1 - difference}[settings["kl"]]
            token = correction * policy + settings["kl_coefficient"] * kl
            token -= settings["entropy_coefficient"] * entropy[i][t]
            total += token / len(tokens) if settings["aggregation"] == "rollout_mean" else token
    denominators = {
        "token_mean": num_tokens,
        "sequence_mean": num_rollouts,
        "rollout_mean": num_rollouts,
        "constant": num_rollouts * settings["length"],
    }
    return total / max(denominators[settings["aggregation"]], 1)
