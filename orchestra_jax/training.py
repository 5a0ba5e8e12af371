"""The loop on one screen: warm start, then [rollouts -> rewards and advantages -> update -> weights to the engine]*.

`run` is the whole job: it opens or resumes a run directory, trains, evaluates and returns the summary. A run resumes at
the step of its last checkpoint with the same data, keys and weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.components import Components, build_components, build_engine
from orchestra_jax.config import GrpoConfig, RunConfig
from orchestra_jax.data.pipeline import InstanceStream, make_training_iterator
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.evaluation.evaluate import current_commit, evaluate_run
from orchestra_jax.evaluation.functions import evaluate_functions
from orchestra_jax.experience import Experience, loss_kl_coefficient, make_experience, updates_per_step
from orchestra_jax.grpo.batching import make_micro_batches
from orchestra_jax.grpo.filters import rollout_facts
from orchestra_jax.grpo.train_state import TrainState, init_state
from orchestra_jax.grpo.train_step import dispatch_step, read_metrics
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
from orchestra_jax.sampler import Sampler
from orchestra_jax.seeds import derive_seed
from orchestra_jax.settings import (
    loss_settings,
    num_threads,
    scoring_settings,
    warm_start_shape,
)
from orchestra_jax.supervised import supervised_step
from orchestra_jax.types import TrajectoryGroup

WARM_START_REPORT_EVERY = 10  # steps
EVALUATIONS = {"question_answering": evaluate_run, "functions": evaluate_functions, "tau2": evaluate_functions}


class Lagging(NamedTuple):
    """The sampler's side of a run, from before the last update."""

    params: object  # whole weights
    multipliers: dict[str, float]


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds, besides the data iterator's own state."""

    state: TrainState
    reference_params: object  # the warm start: what the KL term pulls towards
    step: int  # GRPO steps done
    wall_s: float  # of earlier sessions of the run
    multipliers: dict[str, float] = dataclasses.field(default_factory=dict)  # Lagrange multipliers, by objective
    lagging: Lagging | None = None  # with a rollout lag: what the next step's experience is made with


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
            save(parts, progress, checkpointer, batches.get_state(), start_s)
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
    progress = Progress(state, reference_params, 0, 0.0, initial_multipliers(scoring_settings(config).budgets))
    progress.lagging = lagging_policy(config, parts, progress)
    return progress


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
    bar = tqdm(range(progress.step, settings.num_steps), desc="GRPO", initial=progress.step, total=settings.num_steps)
    with start_sampler(config, parts, progress, batches) as sampler, interrupt_flag() as interrupt:
        for step in bar:
            clock = [time.monotonic()]
            experience = sampler.take(step, progress.lagging.multipliers if progress.lagging else progress.multipliers)
            is_on_policy = sampler.version == step
            if settings.rollout_lag and step + 1 < settings.num_steps:
                if not is_on_policy:
                    progress.lagging = lagging_policy(config, parts, progress)
                    sampler.update_weights(progress.lagging.params, step)
                if not interrupt.is_set:
                    sampler.begin(step + 1, progress.lagging.multipliers)
            sampler.release_memory()
            clock.append(time.monotonic())
            losses = take_optimizer_steps(config, parts, progress, experience, optimizer, is_on_policy)
            if not settings.rollout_lag:
                sampler.update_weights(played_params(config, parts, progress), step + 1)
            instances, groups, scored, first_groups, num_resampled, _ = experience.collected
            raise_multipliers(config, parts, progress, first_groups)
            progress.step = step + 1
            clock.append(time.monotonic())
            seconds = (*experience.seconds, *np.diff(clock))
            values = rollout_metrics(instances, groups, scored, parts.objectives, losses, seconds, is_on_policy)
            values["filter/resampled_share"] = num_resampled / len(groups)
            values.update({f"multiplier/{name}": value for name, value in progress.multipliers.items()})
            values |= {"spend/total_usd": parts.account.spent_usd} if parts.account.spent_usd else {}
            metrics.write(step, values)
            bar.set_postfix({name: f"{values.get(f'score/{name}', np.nan):.3f}" for name in ("reward", "accuracy")})
            if step % config.checkpoint_every == 0:
                directory.write_trajectories(step, groups[: config.num_saved_groups])
            is_last = interrupt.is_set or progress.step == settings.num_steps
            if is_last or progress.step % config.checkpoint_every == 0:
                save(parts, progress, checkpointer, sampler.data_state(), start_s)
            if is_last:
                break
        if interrupt.is_set:
            raise KeyboardInterrupt
    return progress


def start_sampler(config: RunConfig, parts: Components, progress: Progress, batches: Iterator) -> Sampler:
    """With an engine that has the weights which the next step's rollouts are to be sampled by."""

    def make(engine, draw, step, multipliers):
        return make_experience(config, parts, engine, draw, progress.reference_params, step, multipliers)

    params = progress.lagging.params if progress.lagging else played_params(config, parts, progress)
    version = max(progress.step - config.grpo.rollout_lag, 0)
    return Sampler(make, build_engine(config, parts, params, version), batches, version)


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
    config: RunConfig,
    parts: Components,
    progress: Progress,
    experience: Experience,
    optimizer,
    is_on_policy: bool,
) -> list[dict[str, float]]:
    """Moves `progress.state` by one step for each update of a training step; returns their metrics.

    is_on_policy: the rollouts were sampled by the state's weights, so that the first update's gap has to be 0.
    """
    settings, measured = config.grpo, []
    for micro_batches, reference_logprobs in zip(experience.updates, experience.reference_logprobs, strict=True):
        with on_mesh(config):
            progress.state, some = dispatch_step(
                progress.state, micro_batches, parts.rollout.temperature, progress.reference_params,
                loss_kl_coefficient(settings, progress.step),
                config=parts.model_config, settings=loss_settings(config),
                optimizer=optimizer, num_updates=settings.num_updates,
                gradient_dtype=recipe_of(settings.optimizer.precision).gradients,
                base_params=progress.reference_params if config.lora.rank else None, num_threads=num_threads(config),
                reference_logprobs=reference_logprobs,
            )  # fmt: skip
        measured.append(some)
    losses = [read_metrics(each) for each in measured]
    if losses and is_on_policy:
        check_sampler_gap(losses[0]["sampler_gap_mean"], settings.max_sampler_gap)
    return losses


def played_params(config: RunConfig, parts: Components, progress: Progress):
    """The policy as plain weights: what the engine samples from."""
    with on_mesh(config):
        base_params = progress.reference_params if config.lora.rank else None
        return whole_params(parts.model_config, progress.state.params, base_params)


def lagging_policy(config: RunConfig, parts: Components, progress: Progress) -> Lagging | None:
    """The policy as it is now, copied where the update donates the original. None without a lag."""
    if not config.grpo.rollout_lag:
        return None
    params = played_params(config, parts, progress)
    return Lagging(params if config.lora.rank else jax.tree.map(jnp.copy, params), progress.multipliers)


def grpo_optimizer(settings: GrpoConfig):
    """Its rate falls over all optimizer steps of the run."""
    return make_optimizer(settings.optimizer, settings.num_steps * updates_per_step(settings) * settings.num_updates)


def save(parts: Components, progress: Progress, checkpointer: Checkpointer, data_state, start_s: float) -> None:
    """One atomic checkpoint of everything the next step depends on."""
    arrays = {"state": progress.state, "reference_params": progress.reference_params}
    wall_s = progress.wall_s + time.monotonic() - start_s
    host = {
        "data_iterator": data_state,
        "wall_s": wall_s,
        "multipliers": progress.multipliers,
        "account": parts.account.get_state(),
    }
    if progress.lagging is not None:
        arrays["sampler_params"], host["sampler_multipliers"] = progress.lagging
    checkpointer.save(progress.step, arrays, host)


def restore(config: RunConfig, parts: Components, checkpointer: Checkpointer, batches: Iterator) -> Progress | None:
    """The last checkpoint, with `batches` set to go on behind it; None if there is none."""
    step = checkpointer.latest_step()
    if step is None:
        return None

    arrays, host = checkpointer.restore(step, saved_arrays(config, parts.model_config, grpo_optimizer(config.grpo)))
    batches.set_state(host["data_iterator"])
    parts.account.set_state(host["account"])
    progress = Progress(arrays["state"], arrays["reference_params"], step, host["wall_s"], host["multipliers"])
    if config.grpo.rollout_lag:
        progress.lagging = Lagging(arrays["sampler_params"], host["sampler_multipliers"])
    return progress


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
