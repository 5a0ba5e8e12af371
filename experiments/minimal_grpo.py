"""Multi-objective GRPO on one page: world, rollouts, reward, advantage, loss and update, on the tiny model.

    python -m experiments.minimal_grpo --num_steps=300

A minute or less on two cores. For reading: only the transformer comes from the package, which does the same
with prices, latencies, real tools, filters and a serving engine. What is left out: the KL term (it keeps a *pretrained*
policy from drifting; this one starts from nothing), the warm start, latencies, packing, checkpoints.

The world. A prompt is [task, preference, price list]; the policy answers with one token a turn: SEARCH, which costs a
little and is followed by an observation (found or not), or one of three experts, which ends the episode. A better
expert is dearer; on hard tasks the weak ones fail unless evidence was found. Any other token is malformed: outcome 0.

    prompt     task  preference  price_0  price_1  price_2      mask 0
    turn 1     SEARCH                                           mask 1, sampled, its log-probability recorded
               FOUND | MISSED                                   mask 0, given by the world
    turn 2     expert_k                                         mask 1

One step (ToolOrchestra, arXiv 2511.21689, section 3.2; GRPO, arXiv 2402.03300):

    vector     M = (outcome y, cost)                            kept unweighted
    reward     R = y (w_o n_y + w_c n_c)                        n: min-max over the group, with a floor
    advantage  A = (R - mean) / (std + eps), cut to +-3         groups with std R < 0.1 are dropped
    loss       -min(r A, clip(r, 1 - 0.2, 1 + 0.28) A) * min(pi_old / pi_sampler, 2)       r = pi / pi_old;
               mean over the sampled tokens of a rollout, then over rollouts

Legend: P prompts, G rollouts of each, B = P * G, T tokens, V vocabulary, M objectives.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from orchestra_jax.models.config import MODELS
from orchestra_jax.models.transformer import Transformer, head_weights, init_params

EASY, HARD, ACCURATE, CHEAP, LOW, MIDDLE, HIGH, FOUND, MISSED, SEARCH, EXPERT_0 = range(11)
VOCAB_SIZE = 16  # the last ids mean nothing: to learn not to say them is part of the task
CONFIG = dataclasses.replace(MODELS["tiny"], vocab_size=VOCAB_SIZE)
NUM_PROMPT_TOKENS, MAX_TOKENS = 5, 8
NUM_GROUPS, GROUP_SIZE = 32, 8

SUCCESS = np.array([[0.70, 0.80, 0.90], [0.10, 0.35, 0.80]])  # [task, price level] without evidence
SUCCESS_WITH_EVIDENCE = np.array([[0.75, 0.85, 0.95], [0.60, 0.75, 0.90]])
COST_USD = np.array([0.01, 0.04, 0.10])  # of an expert, by price level
SEARCH_COST_USD, FOUND_SHARE = 0.005, 0.9
WEIGHTS = np.array([[0.9, 0.1], [0.2, 0.8]])  # [preference, (outcome, cost)]
FLOORS = np.array([0.0, 0.1])  # on the range of outcome and cost: pennies are no full unit of reward
MIN_STD, ADVANTAGE_CLIP, CLIP_LOW, CLIP_HIGH, CORRECTION_CLIP = 0.1, 3.0, 0.2, 0.28, 2.0

_NUM_STEPS = flags.DEFINE_integer("num_steps", 300, "Optimizer steps.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, world and sampling.")


# The world: one that is given tokens and gives tokens back.


def draw_prompts(rng: np.random.Generator) -> np.ndarray:
    """[P, 5]: which expert has which price level differs from prompt to prompt."""
    levels = np.stack([rng.permutation(3) for _ in range(NUM_GROUPS)])
    tasks, preferences = rng.integers(0, 2, NUM_GROUPS), rng.integers(0, 2, NUM_GROUPS)
    return np.column_stack([EASY + tasks, ACCURATE + preferences, LOW + levels])


def act(state, prompts_B5, actions_B, rng):
    """Plays one action of each episode that still runs; `state` is changed. Returns the observations [B]."""
    is_search_B = state["running"] & (actions_B == SEARCH)
    is_found_B = is_search_B & (rng.random(len(actions_B)) < FOUND_SHARE)
    is_answer_B = state["running"] & (actions_B >= EXPERT_0) & (actions_B < EXPERT_0 + 3)
    expert_B = np.clip(actions_B - EXPERT_0, 0, 2)
    task_B, level_B = prompts_B5[:, 0] - EASY, prompts_B5[np.arange(len(prompts_B5)), 2 + expert_B] - LOW
    chance_B = np.where(state["evidence"], SUCCESS_WITH_EVIDENCE[task_B, level_B], SUCCESS[task_B, level_B])
    state["outcome"] += is_answer_B & (rng.random(len(actions_B)) < chance_B)
    state["cost_usd"] += np.where(is_answer_B, COST_USD[level_B], 0) + np.where(is_search_B, SEARCH_COST_USD, 0)
    state["evidence"] |= is_found_B
    state["running"] = is_search_B  # an answer and a malformed token end the episode
    return np.where(is_found_B, FOUND, MISSED)


# The policy.


def token_logits(params, tokens_BT):
    """Logits [B, T, V]; position t predicts token t + 1."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    ones_BT = jnp.ones_like(tokens_BT)  # one segment a row; what stands behind the end is never looked at
    hidden_BTD, _ = Transformer(CONFIG).apply({"params": params}, tokens_BT, positions_BT, ones_BT)
    return (hidden_BTD @ head_weights(params, CONFIG)).astype(jnp.float32)


@jax.jit
def sample_next(params, tokens_BT, position, key):
    """A token for `position` of every row and its log-probability."""
    logprobs_BV = jax.nn.log_softmax(token_logits(params, tokens_BT)[:, position - 1])
    tokens_B = jax.random.categorical(key, logprobs_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


@jax.jit
def sequence_logprobs(params, tokens_BT):
    """log pi of every token given those before it, [B, T]; 0 for the first one."""
    logprobs_BTV = jax.nn.log_softmax(token_logits(params, tokens_BT)[:, :-1])
    picked_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=2)[:, :, 0]
    return jnp.pad(picked_BT, ((0, 0), (1, 0)))


def rollout(params, prompts_P5, key, rng):
    """Plays G episodes of every prompt; tokens, mask and log-probabilities are written where a token is born."""
    prompts_B5 = np.repeat(prompts_P5, GROUP_SIZE, axis=0)
    num_rows = len(prompts_B5)
    tokens_BT = np.zeros((num_rows, MAX_TOKENS), np.int32)
    tokens_BT[:, :NUM_PROMPT_TOKENS] = prompts_B5
    mask_BT, logprobs_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, np.float32)
    state = {name: np.zeros(num_rows) for name in ("outcome", "cost_usd")}
    state |= {"running": np.ones(num_rows, bool), "evidence": np.zeros(num_rows, bool)}
    for position in range(NUM_PROMPT_TOKENS, MAX_TOKENS, 2):
        key, step_key = jax.random.split(key)
        actions_B, picked_B = map(np.asarray, sample_next(params, tokens_BT, position, step_key))
        is_running_B = state["running"]
        tokens_BT[is_running_B, position] = actions_B[is_running_B]
        logprobs_BT[is_running_B, position] = picked_B[is_running_B]
        mask_BT[is_running_B, position] = True
        observations_B = act(state, prompts_B5, actions_B, rng)
        if position + 1 < MAX_TOKENS:
            tokens_BT[state["running"], position + 1] = observations_B[state["running"]]
    vectors_PGM = np.stack([state["outcome"], state["cost_usd"]], axis=-1).reshape(-1, GROUP_SIZE, 2)
    return tokens_BT, mask_BT, logprobs_BT, vectors_PGM


# From objective vectors to advantages.


def preference_reward(vectors_PGM, weights_PM):
    """R [P, G]. By hand, weights (0.2, 0.8), right for $0.01, right for $0.05 and wrong for $0.11: 1, 0.68, 0."""
    low_P1M, high_P1M = vectors_PGM.min(axis=1, keepdims=True), vectors_PGM.max(axis=1, keepdims=True)
    span_P1M = np.maximum(high_P1M - low_P1M, FLOORS)
    # Costs that all lie within the floor are measured from it, not from the dearest of them: a fixed utility.
    high_P1M = np.maximum(high_P1M, FLOORS)
    gain_PGM = np.stack([vectors_PGM[..., 0] - low_P1M[..., 0], high_P1M[..., 1] - vectors_PGM[..., 1]], axis=-1)
    normalized_PGM = np.divide(gain_PGM, span_P1M, out=np.zeros_like(gain_PGM), where=span_P1M > 0)
    return vectors_PGM[..., 0] * (normalized_PGM * weights_PM[:, None, :]).sum(axis=-1)


def group_advantages(rewards_PG):
    """A [P, G] and which groups are kept [P]: one whose rewards hardly differ says nothing."""
    std_P1 = rewards_PG.std(axis=1, ddof=1, keepdims=True)
    advantages_PG = (rewards_PG - rewards_PG.mean(axis=1, keepdims=True)) / (std_P1 + 1e-6)
    return np.clip(advantages_PG, -ADVANTAGE_CLIP, ADVANTAGE_CLIP), std_P1[:, 0] >= MIN_STD


# The update.


def grpo_loss(params, tokens_BT, mask_BT, sampler_BT, advantages_B):
    """Old is the policy before the step: with one step per batch it is the current one, and the ratio is 1."""
    current_BT = sequence_logprobs(params, tokens_BT)
    old_BT = jax.lax.stop_gradient(current_BT)
    ratio_BT = jnp.exp(current_BT - old_BT)
    gain_BT = ratio_BT * advantages_B[:, None]
    clipped_BT = jnp.clip(ratio_BT, 1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages_B[:, None]
    correction_BT = jnp.minimum(jnp.exp(old_BT - sampler_BT), CORRECTION_CLIP)
    token_loss_BT = jnp.where(mask_BT, -correction_BT * jnp.minimum(gain_BT, clipped_BT), 0.0)
    per_rollout_B = token_loss_BT.sum(axis=1) / jnp.maximum(mask_BT.sum(axis=1), 1)
    return per_rollout_B.sum() / jnp.maximum(mask_BT.any(axis=1).sum(), 1)


@functools.partial(jax.jit, static_argnames="optimizer")
def update(params, optimizer_state, batch, optimizer):
    loss, gradients = jax.value_and_grad(grpo_loss)(params, *batch)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss


def train(num_steps: int, seed: int, report=lambda line: None) -> list[dict[str, float]]:
    """One dict of metrics a step."""
    params = init_params(CONFIG, jax.random.key(seed))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=0.0))
    optimizer_state, rng, history = optimizer.init(params), np.random.default_rng(seed), []
    for step in range(num_steps):
        prompts_P5 = draw_prompts(rng)
        key = jax.random.fold_in(jax.random.key(seed), step)
        tokens_BT, mask_BT, sampler_BT, vectors_PGM = rollout(params, prompts_P5, key, rng)
        preference_P = prompts_P5[:, 1] - ACCURATE
        rewards_PG = preference_reward(vectors_PGM, WEIGHTS[preference_P])
        advantages_PG, is_kept_P = group_advantages(rewards_PG)
        mask_BT &= np.repeat(is_kept_P, GROUP_SIZE)[:, None]  # a dropped group leaves loss and denominator
        batch = (tokens_BT, mask_BT, sampler_BT, advantages_PG.reshape(-1).astype(np.float32))
        params, optimizer_state, loss = update(params, optimizer_state, batch, optimizer)
        metrics = {"loss": float(loss), "reward": rewards_PG.mean(), "kept": is_kept_P.mean()}
        for number, name in enumerate(("accurate", "cheap")):
            means_M = vectors_PGM[preference_P == number].mean(axis=(0, 1))
            metrics |= {f"{name}/accuracy": means_M[0], f"{name}/cost_usd": means_M[1]}
        history.append({name: float(value) for name, value in metrics.items()})
        if step % 10 == 0 or step == num_steps - 1:
            report(f"step {step:4d}  " + "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items()))
    return history


def main(_):
    train(_NUM_STEPS.value, _SEED.value, report=print)


if __name__ == "__main__":
    app.run(main)
