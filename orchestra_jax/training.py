"""The loop on one screen: warm start, then [rollouts -> rewards and advantages -> update -> weights to the engine]*.

`run` is the whole job: it opens or resumes a run directory, trains, evaluates and returns the summary. A run resumes at
the step of its last checkpoint with the same data, keys and weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import signal
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.collection import collect
from orchestra_jax.components import Components, build_components, build_engine
from orchestra_jax.config import GrpoConfig, RunConfig
from orchestra_jax.data.pipeline import InstanceStream, make_training_iterator
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.evaluation.evaluate import current_commit, evaluate_run
from orchestra_jax.evaluation.functions import evaluate_functions
from orchestra_jax.grpo.batching import BatchShape, MicroBatch, make_micro_batches
from orchestra_jax.grpo.filters import rollout_facts
from orchestra_jax.grpo.kl_penalty import KL_IN_REWARD, reference_kl
from orchestra_jax.grpo.packing import PackedBatch, PackedShape, make_packed_batches
from orchestra_jax.grpo.scoring import ScoredGroups, score_groups
from orchestra_jax.grpo.train_step import TrainState, init_state, train_step
from orchestra_jax.metrics import MetricsWriter
from orchestra_jax.optimizers import make_optimizer
from orchestra_jax.policy import (
    GRPO,
    WARM_START,
    abstract_arrays,
    new_state,
    on_mesh,
    saved_arrays,
    start_params,
    trained_params,
    whole_params,
)
from orchestra_jax.precision import recipe_of
from orchestra_jax.rewards.constraints import initial_multipliers, updated_multipliers
from orchestra_jax.rewards.objectives import objective_vector
from orchestra_jax.rollout_metrics import check_sampler_gap, rollout_metrics
from orchestra_jax.run_directory import RunDirectory, config_as_dict, open_run_directory, read_json
from orchestra_jax.seeds import derive_seed
from orchestra_jax.settings import (
    batch_shape,
    loss_settings,
    num_threads,
    packed_shape,
    scoring_settings,
    warm_start_shape,
)
from orchestra_jax.supervised import supervised_step
from orchestra_jax.types import TrajectoryGroup

WARM_START_REPORT_EVERY = 10  # steps
EVALUATIONS = {"question_answering": evaluate_run, "functions": evaluate_functions, "tau2": evaluate_functions}


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds, besides the data iterator's own state."""

    state: TrainState
    reference_params: object  # the warm start: what the KL term pulls towards
    step: int  # GRPO steps done
    wall_s: float  # of earlier sessions of the run
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)  # Lagrange multipliers, by objective


def run(config: RunConfig, workdir: str) -> dict[str, object]:
    """Trains and evaluates; returns the summary that it also writes to `workdir`/summary.json.

    ValueError for a mistake in the config or the directory. On an interrupt it saves first, then raises
    KeyboardInterrupt. A finished run is not run again: its summary is returned.
    """
    start_s = time.monotonic()
    current_commit()  # the summary names the one that the run began with
    parts = build_components(config)  # first: a config with a mistake in it claims no directory
    directory = open_run_directory(workdir, config_as_dict(config))
    if directory.summary_path.exists():
        print(f"{directory.path} holds this run, finished")
        return read_json(directory.summary_path)
    parts.account.keep_in(directory.spending_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.resources)
        gc.freeze()  # tasks and corpus live as long as the run: the collector need not walk them at every step
        stack.callback(gc.unfreeze)
        metrics = stack.enter_context(MetricsWriter(directory.path, directory.is_resumed))
        checkpointer = stack.enter_context(Checkpointer(directory.checkpoints_path, config.keep_checkpoints))
        batches = make_batches(config, parts, config.grpo.num_groups, derive_seed(config.seed, "grpo"))
        progress = restore(config, parts, checkpointer, batches)
        if progress is None:
            progress = warm_start(config, parts, directory)
            save(parts, progress, checkpointer, batches, start_s)
        progress = improve(config, parts, progress, batches, metrics, checkpointer, directory, start_s)
        trained = played_params(config, parts, progress)
        evaluate = EVALUATIONS[config.environment]
        summary = evaluate(config, parts, trained, progress.reference_params, directory)
    summary["wall_s"] = progress.wall_s + time.monotonic() - start_s
    directory.write_summary(summary)
    return summary


def make_batches(config: RunConfig, parts: Components, num_groups: int, seed: int) -> Iterator:
    """Endless batches of `num_groups` instances, of the run's files where it has some. What a checkpoint keeps of it:
    `get_state`."""
    if parts.train_parts:
        return InstanceStream(parts.train_parts, num_groups, seed)
    return make_training_iterator(parts.train_tasks, parts.preferences, config.world, num_groups, seed)


def warm_start(config: RunConfig, parts: Components, directory: RunDirectory) -> Progress:
    """Supervised training on demonstrations of random routes. Its metrics are a TensorBoard run of their own.

    KeyboardInterrupt, saved, behind the step in which Ctrl-C was pressed; the next call goes on there.
    """
    settings = config.warm_start
    optimizer = make_optimizer(settings.optimizer, settings.num_steps)
    batches = make_batches(config, parts, settings.num_groups, derive_seed(config.seed, "warm start"))
    shape = warm_start_shape(config)
    ones_PG = np.ones((settings.num_groups, settings.group_size))
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(directory.warm_start_path, directory.is_resumed))
        checkpointer = stack.enter_context(Checkpointer(directory.warm_start_path / "checkpoints", max_to_keep=1))
        interrupt = stack.enter_context(interrupt_flag())
        params = start_params(config, parts.model_config)
        base_params = params if config.lora.rank else None
        first_step, state = start_or_restore_warm_start(config, parts, params, optimizer, checkpointer, batches)
        del params  # the first step donates them, where they are what is trained
        bar = tqdm(range(first_step, settings.num_steps), "warm start", initial=first_step, total=settings.num_steps)
        for step in bar:
            groups = demonstrate(
                next(batches),
                settings.group_size,
                parts.environment,
                parts.chat,
                parts.rollout,
                derive_seed(config.seed, step),
                parts.demonstrated_turn,
            )
            micro_batches = make_micro_batches(groups, ones_PG, ones_PG.astype(bool), shape)
            with on_mesh(config):
                state, loss = supervised_step(
                    state, micro_batches, base_params, num_threads=num_threads(config),
                    config=parts.model_config, optimizer=optimizer, chunk=config.grpo.logprob_chunk,
                )  # fmt: skip
            if step % WARM_START_REPORT_EVERY == 0:  # to read the loss is to wait for it
                metrics.write(step, {"warm_start/loss": float(loss)})
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if interrupt.is_set:
                checkpointer.save(step + 1, {"state": state}, {"data_iterator": batches.get_state()})
                raise KeyboardInterrupt
    with on_mesh(config):
        params = whole_params(parts.model_config, state.params, base_params)
    # Without factors the next step donates the buffers.
    reference_params = params if config.lora.rank else jax.tree.map(jnp.copy, params)
    trained = trained_params(config, params, config.grpo.optimizer, GRPO)
    state = new_state(config, parts.model_config, trained, config.grpo.optimizer, grpo_optimizer(config.grpo))
    return Progress(state, reference_params, 0, 0.0, initial_multipliers(scoring_settings(config).budgets))


def start_or_restore_warm_start(config: RunConfig, parts: Components, params, optimizer, checkpointer, batches):
    """(steps done, TrainState): `params` untrained, or an interrupted warm start, with `batches` set behind it."""
    settings, step = config.warm_start.optimizer, checkpointer.latest_step()
    if step is None:
        trained = trained_params(config, params, settings, WARM_START)
        return 0, new_state(config, parts.model_config, trained, settings, optimizer)
    shapes = jax.eval_shape(
        lambda: {"state": init_state(trained_params(config, params, settings, WARM_START), optimizer)}
    )
    arrays, host = checkpointer.restore(step, abstract_arrays(config, parts.model_config, settings, shapes))
    batches.set_state(host["data_iterator"])
    return step, arrays["state"]


def improve(
    config: RunConfig,
    parts: Components,
    progress: Progress,
    batches: Iterator,
    metrics: MetricsWriter,
    checkpointer: Checkpointer,
    directory: RunDirectory,
    start_s: float,
) -> Progress:
    """GRPO from `progress.step` on. KeyboardInterrupt, saved, behind the step in which Ctrl-C was pressed."""
    settings, optimizer = config.grpo, grpo_optimizer(config.grpo)
    shape = batch_shape(config)
    engine = build_engine(config, parts, played_params(config, parts, progress), version=progress.step)
    bar = tqdm(range(progress.step, settings.num_steps), desc="GRPO", initial=progress.step, total=settings.num_steps)
    with interrupt_flag() as interrupt:
        for step in bar:
            clock = [time.monotonic()]
            collected = collect(
                functools.partial(next, batches),
                functools.partial(play, config, parts, engine, step),
                functools.partial(score, config, parts, progress),
                settings.max_resamples,
            )
            asyncio.run(engine.release_memory())
            instances, groups, scored = collected.instances, collected.groups, collected.scored
            clock.append(time.monotonic() - collected.score_s)
            updates = split_into_updates(groups, scored, settings, shape, derive_seed(config.seed, "split", step))
            clock.append(time.monotonic())
            losses = take_optimizer_steps(config, parts, progress, updates, optimizer)
            asyncio.run(engine.update_weights(played_params(config, parts, progress), step + 1))
            raise_multipliers(config, parts, progress, collected.first_groups)
            progress.step = step + 1
            clock.append(time.monotonic())
            values = rollout_metrics(instances, groups, scored, parts.objectives, losses, np.diff(clock))
            values["filter/resampled_share"] = collected.num_resampled / len(groups)
            values.update({f"multiplier/{name}": value for name, value in progress.multipliers.items()})
            values |= {"spend/total_usd": parts.account.spent_usd} if parts.account.spent_usd else {}
            metrics.write(step, values)
            bar.set_postfix({name: f"{values.get(f'score/{name}', np.nan):.3f}" for name in ("reward", "accuracy")})
            if step % config.checkpoint_every == 0:
                directory.write_trajectories(step, groups[: config.num_saved_groups])
            is_last = interrupt.is_set or progress.step == settings.num_steps
            if is_last or progress.step % config.checkpoint_every == 0:
                save(parts, progress, checkpointer, batches, start_s)
            if is_last:
                break
        if interrupt.is_set:
            raise KeyboardInterrupt
    return progress


def play(config: RunConfig, parts: Components, engine, step: int, instances, round_number: int):
    """The groups of `instances`; round 0 is a step's first, later ones resample."""
    rounds = (round_number,) if round_number else ()
    seed = derive_seed(config.seed, "rollout", step, *rounds)
    return run_groups(instances, config.grpo.group_size, parts.environment, engine, parts.chat, parts.rollout, seed)


def score(config: RunConfig, parts: Components, progress: Progress, groups: list[TrajectoryGroup]) -> ScoredGroups:
    settings, penalty_PG = config.grpo, 0.0
    coefficient = kl_coefficient(settings, progress.step)
    if settings.kl == KL_IN_REWARD and coefficient:
        with on_mesh(config):
            nats_PG = reference_kl(
                groups, progress.reference_params, parts.rollout.temperature,
                config=parts.model_config, chunk=settings.logprob_chunk, shape=packed_shape(settings),
            )  # fmt: skip
        penalty_PG = coefficient * nats_PG
    return score_groups(
        groups, parts.objectives, scoring_settings(config),
        policy_version=progress.step, multipliers=progress.multipliers, kl_penalty_PG=penalty_PG,
    )  # fmt: skip


def raise_multipliers(config: RunConfig, parts: Components, progress: Progress, groups: list[TrajectoryGroup]) -> None:
    """One step of dual ascent on the budgets, if there are any. `groups`: as they were drawn, none of them replaced."""
    budgets = scoring_settings(config).budgets
    if not budgets:
        return
    vectors_PGM = np.array(
        [[objective_vector(each.objectives, parts.objectives) for each in group.trajectories] for group in groups]
    )
    progress.multipliers = updated_multipliers(
        progress.multipliers,
        vectors_PGM,
        ~rollout_facts(groups).is_failed_PG,
        parts.objectives,
        budgets,
        config.grpo.multiplier_rate,
    )


def take_optimizer_steps(
    config: RunConfig, parts: Components, progress: Progress, updates: list[list[MicroBatch | PackedBatch]], optimizer
) -> list[dict[str, float]]:
    """Moves `progress.state` by one `train_step` for each update of a training step; returns their metrics."""
    settings, losses = config.grpo, []
    for micro_batches in updates:
        with on_mesh(config):
            progress.state, some = train_step(
                progress.state, micro_batches, parts.rollout.temperature, progress.reference_params,
                0.0 if settings.kl == KL_IN_REWARD else kl_coefficient(settings, progress.step),
                config=parts.model_config, settings=loss_settings(config),
                optimizer=optimizer, num_updates=settings.num_updates,
                gradient_dtype=recipe_of(settings.optimizer.precision).gradients,
                base_params=progress.reference_params if config.lora.rank else None, num_threads=num_threads(config),
            )  # fmt: skip
        if not losses:
            check_sampler_gap(some["sampler_gap_mean"], settings.max_sampler_gap)
        losses.append(some)
    return losses


def split_into_updates(
    groups: list[TrajectoryGroup],
    scored: ScoredGroups,
    settings: GrpoConfig,
    shape: BatchShape | PackedShape,
    seed: int,
) -> list[list[MicroBatch | PackedBatch]]:
    """Deals the kept groups out at random to updates of equal size, give or take one, each a list of micro-batches.

    Later updates of a step are slightly off-policy; the truncated importance correction (current over sampler) is what
    accounts for it. More, smaller optimizer steps on the same rollouts learn much faster here (docs/log.md).
    """
    # A group whose rollouts have all left the loss makes no update: its gradient is 0, and the momentum would step.
    numbers = [k for k, group in enumerate(scored.kept) if scored.trained_PG[group].any()]
    if not numbers:
        return []
    shuffled = np.array(numbers)[np.random.default_rng(seed).permutation(len(numbers))]
    kept = np.array(scored.kept)
    make_batches = make_packed_batches if isinstance(shape, PackedShape) else make_micro_batches
    return [
        make_batches(
            [groups[number] for number in kept[part]],
            scored.advantages_KG[part],
            scored.trained_PG[kept[part]],
            shape,
        )
        for part in np.array_split(shuffled, -(-len(numbers) // settings.groups_per_update))
    ]


def played_params(config: RunConfig, parts: Components, progress: Progress):
    """The policy as plain weights: what the engine samples from."""
    with on_mesh(config):
        base_params = progress.reference_params if config.lora.rank else None
        return whole_params(parts.model_config, progress.state.params, base_params)


def grpo_optimizer(settings: GrpoConfig):
    """Its rate decays over the optimizer steps of a run whose filter keeps every group."""
    updates_per_step = -(-settings.num_groups // settings.groups_per_update) * settings.num_updates
    return make_optimizer(settings.optimizer, settings.num_steps * updates_per_step)


def kl_coefficient(settings: GrpoConfig, step: int) -> float:
    """Falls linearly from the first to the final one: explore near the warm start first, then commit."""
    share = step / max(settings.num_steps - 1, 1)
    return settings.kl_coefficient + (settings.final_kl_coefficient - settings.kl_coefficient) * share


def save(parts: Components, progress: Progress, checkpointer: Checkpointer, batches: Iterator, start_s: float) -> None:
    """One atomic checkpoint of everything the next step depends on."""
    arrays = {"state": progress.state, "reference_params": progress.reference_params}
    wall_s = progress.wall_s + time.monotonic() - start_s
    host = {
        "data_iterator": batches.get_state(),
        "wall_s": wall_s,
        "multipliers": progress.multipliers,
        "account": parts.account.get_state(),
    }
    checkpointer.save(progress.step, arrays, host)


def restore(config: RunConfig, parts: Components, checkpointer: Checkpointer, batches: Iterator) -> Progress | None:
    """The last checkpoint, with `batches` set to go on behind it; None if there is none."""
    step = checkpointer.latest_step()
    if step is None:
        return None

    arrays, host = checkpointer.restore(step, saved_arrays(config, parts.model_config, grpo_optimizer(config.grpo)))
    batches.set_state(host["data_iterator"])
    parts.account.set_state(host["account"])
    return Progress(arrays["state"], arrays["reference_params"], step, host["wall_s"], host["multipliers"])


class Interrupt:
    """Set by Ctrl-C; read between steps, when the state is whole."""

    is_set = False

    def set(self, *_) -> None:
        self.is_set = True


@contextlib.contextmanager
def interrupt_flag():
    """Turns the first Ctrl-C into a flag; a second one interrupts at once."""
    interrupt = Interrupt()
    previous = signal.getsignal(signal.SIGINT)

    def handle(*_):
        interrupt.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("interrupted: saving after this step")

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
