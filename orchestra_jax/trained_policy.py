"""The policies of a run read back from its last checkpoint, and played in another world than they were trained in."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time

import jax

from orchestra_jax.chat import Chat
from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.components import build_chat_and_model, build_components
from orchestra_jax.config import MeshConfig, RunConfig
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.policy import on_mesh, saved_arrays, whole_params
from orchestra_jax.run_directory import config_as_dict, config_from_dict, open_run_directory, read_json
from orchestra_jax.training import EVALUATIONS, grpo_optimizer

# What a policy has been trained to read and write with; another world may change all else.
OWN_FIELDS = ("model", "lora", "prompt")


@dataclasses.dataclass(frozen=True)
class Policies:
    """`trained` and `warm_start` are plain weights, low-rank factors merged."""

    config: RunConfig
    chat: Chat
    model_config: ModelConfig
    step: int  # of GRPO
    trained: object
    warm_start: object


def read_policies(workdir: str, mesh: MeshConfig | None = None) -> Policies:
    """Those of the run in `workdir`. The whole of the checkpoint passes through memory, the optimizer's state included.

    They lie on `mesh`; if none is given, on the run's own, or on one device where there are fewer than it had.
    ValueError for a directory that is no run or has no checkpoint.
    """
    path = pathlib.Path(workdir)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no run directory: it has no config.json")
    config = config_from_dict(RunConfig(), read_json(path / "config.json"))
    if mesh is not None:
        config.mesh = mesh
    elif math.prod(dataclasses.astuple(config.mesh)) > jax.device_count():
        config.mesh = MeshConfig()  # trained on a larger machine
    chat, model_config = build_chat_and_model(config)
    with Checkpointer(path / "checkpoints", config.keep_checkpoints) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise ValueError(f"{path} has no finished checkpoint yet: the first one is written behind the warm start")
        arrays, _ = checkpointer.restore(step, saved_arrays(config, model_config, grpo_optimizer(config.grpo)))
    warm_start = arrays["reference_params"]
    with on_mesh(config):
        trained = whole_params(model_config, arrays["state"].params, warm_start if config.lora.rank else None)
    return Policies(config, chat, model_config, step, trained, warm_start)


def evaluate_elsewhere(config: RunConfig, policy_of: str, workdir: str) -> dict[str, object]:
    """Evaluates the policies of the run in `policy_of` as `config` says, nothing trained; returns the summary.

    The summary goes to `workdir` with all that an evaluation leaves there; one that is there already is returned.
    ValueError for what `read_policies` and `build_components` refuse, and a config with another model or prompt.
    """
    start_s = time.monotonic()
    held = read_policies(policy_of, config.mesh)
    here, there = config_as_dict(config), config_as_dict(held.config)
    if differing := [name for name in OWN_FIELDS if here[name] != there[name]]:
        raise ValueError(
            f"the policy of {policy_of} was trained with {[there[name] for name in differing]} as {differing}, and "
            f"the config has {[here[name] for name in differing]}: give the run's own"
        )
    parts = build_components(config)
    directory = open_run_directory(workdir, {**here, "policy_of": policy_of, "policy_step": held.step})
    if directory.summary_path.exists():
        print(f"{directory.path} holds this evaluation, finished")
        return read_json(directory.summary_path)
    parts.account.keep_in(directory.spending_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.resources)
        evaluate = EVALUATIONS[config.environment]
        summary = evaluate(config, parts, held.trained, held.warm_start, directory)
    summary["wall_s"] = time.monotonic() - start_s
    directory.write_summary(summary)
    return summary
