"""A run's policy as a Hugging Face directory, which transformers, SGLang and `--config.model` read.

Weights merged and in the dtype asked for; the tokenizer of the run; a chat template that shows earlier thinking, as the
episodes did; the end of a turn as the end of a text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import jax

from orchestra_jax.chat import keep_thinking
from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.components import build_chat_and_model
from orchestra_jax.config import MeshConfig, RunConfig
from orchestra_jax.models.huggingface import COPIED_FILES, save_pretrained
from orchestra_jax.models.transformer import Transformer
from orchestra_jax.policy import on_mesh, saved_arrays, whole_params
from orchestra_jax.precision import cast_floats
from orchestra_jax.run_directory import config_from_dict, read_json
from orchestra_jax.training import grpo_optimizer

POLICIES = ("trained", "warm_start")
AS_TRAINED = "as_trained"


def export_policy(workdir: str, directory: str, policy: str, dtype: str) -> int:
    """Writes the `policy` (one of POLICIES) of the run in `workdir` to `directory`; returns the step it is of.

    The whole of the last checkpoint passes through memory, the optimizer's state included. `dtype`: a float's name, or
    AS_TRAINED.

    ValueError for a directory that is no run or has no checkpoint, and for one that holds weights already.
    """
    path = pathlib.Path(workdir)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no run directory: it has no config.json")
    config = config_from_dict(RunConfig(), read_json(path / "config.json"))
    if any(pathlib.Path(directory).glob("*.safetensors*")):
        raise ValueError(f"{directory} holds weights already: choose another directory")
    if math.prod(dataclasses.astuple(config.mesh)) > jax.device_count():
        config.mesh = MeshConfig()  # trained on a larger machine
    chat, model_config = build_chat_and_model(config)
    with Checkpointer(path / "checkpoints", config.keep_checkpoints) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise ValueError(f"{path} has no finished checkpoint yet: the first one is written behind the warm start")
        arrays, _ = checkpointer.restore(step, saved_arrays(config, model_config, grpo_optimizer(config.grpo)))
    params = arrays["reference_params"]
    if policy == "trained":
        with on_mesh(config):
            params = whole_params(model_config, arrays["state"].params, params if config.lora.rank else None)
    if dtype == AS_TRAINED:
        dtype = params["embedding"].dtype.name
    model_config = dataclasses.replace(model_config, parameter_dtype=dtype)
    token_ids = {"eos_token_id": chat.end_of_turn_id, "pad_token_id": chat.end_of_text_id}
    save_pretrained(Transformer(model_config), cast_floats(params, dtype), directory, token_ids=token_ids)
    _write_tokenizer(pathlib.Path(config.prompt.tokenizer_directory), pathlib.Path(directory))
    return step


def _write_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, directory)
    (directory / "generation_config.json").unlink(missing_ok=True)  # of another policy, and other ids
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        if name == "chat_template.jinja":
            text = keep_thinking(text)
        elif "chat_template" in (fields := json.loads(text)):
            fields["chat_template"] = keep_thinking(fields["chat_template"])
            text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
