"""A run's policy as a Hugging Face directory, which transformers, SGLang and `--config.model` read.

Weights merged and in the dtype asked for; the tokenizer of the run; a chat template that shows earlier thinking, as the
episodes did; the end of a turn as the end of a text.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

from orchestra_jax.chat import keep_thinking
from orchestra_jax.models.huggingface import COPIED_FILES, save_pretrained
from orchestra_jax.models.transformer import Transformer
from orchestra_jax.precision import cast_floats
from orchestra_jax.trained_policy import read_policies

AS_TRAINED = "as_trained"


def export_policy(workdir: str, directory: str, policy: str, dtype: str) -> int:
    """Writes the "trained" or the "warm_start" `policy` of the run in `workdir` to `directory`; returns its step.

    The whole of the last checkpoint passes through memory, the optimizer's state included. `dtype`: a float's name, or
    AS_TRAINED.

    ValueError for a directory that is no run or has no checkpoint, and for one that holds weights already.
    """
    if any(pathlib.Path(directory).glob("*.safetensors*")):
        raise ValueError(f"{directory} holds weights already: choose another directory")
    held = read_policies(workdir)
    params = getattr(held, policy)
    if dtype == AS_TRAINED:
        dtype = params["embedding"].dtype.name
    model_config = dataclasses.replace(held.model_config, parameter_dtype=dtype)
    token_ids = {"eos_token_id": held.chat.end_of_turn_id, "pad_token_id": held.chat.end_of_text_id}
    save_pretrained(Transformer(model_config), cast_floats(params, dtype), directory, token_ids=token_ids)
    _write_tokenizer(pathlib.Path(held.config.prompt.tokenizer_directory), pathlib.Path(directory))
    return held.step


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
