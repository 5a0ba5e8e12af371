"""Runs that start from a checkpoint of Hugging Face, in full and by low-rank factors, resume, and are exported again.

The checkpoint is a tiny random Qwen3 that our own exporter wrote. Its runs learn nothing: their policy babbles.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from orchestra_jax import chat, policy, training
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY
from orchestra_jax.config import RunConfig
from orchestra_jax.export import export_policy
from orchestra_jax.models import huggingface, lora, transformer
from orchestra_jax.models.config import MODELS, QWEN3_VOCAB_SIZE

REPOSITORY = pathlib.Path(__file__).parents[1]
QWEN3_DIRECTORY = pathlib.Path(
    os.environ.get("ORCHESTRA_QWEN3_TOKENIZER", REPOSITORY.parent / "shared" / "data" / "qwen3_tokenizer")
)
SHAPE = dataclasses.replace(MODELS["tiny"], vocab_size=1504, num_layers=2, max_position=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "qwen3"
    params = transformer.init_params(SHAPE, jax.random.key(7))
    huggingface.save_pretrained(transformer.Transformer(SHAPE), params, path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_TOKENIZER_DIRECTORY / name, path)
    return path, params


def run_config(path):
    config = RunConfig(model=str(path))
    config.prompt.tokenizer_directory = str(path)
    config.compute.dtype = "float32"
    config.data.num_tasks_per_cell, config.data.num_test_tasks_per_cell = 4, 2
    config.warm_start.num_steps = 0
    engine = config.jax_engine
    engine.num_rows, engine.chunk_rows = 8, 8
    engine.chunk_buckets, engine.row_buckets, engine.slot_buckets = (40,), (8,), ()
    config.grpo.num_steps, config.grpo.num_groups, config.grpo.group_size = 2, 2, 4
    config.grpo.groups_per_update, config.grpo.groups_per_micro_batch = 2, 2
    config.grpo.completion_buckets, config.grpo.min_group_std = (), 0.0
    config.grpo.optimizer.warmup_steps, config.grpo.entropy_coefficient = 0, 0.01
    config.checkpoint_every, config.keep_checkpoints = 1, 3
    return config


@pytest.fixture(autouse=True)
def unevaluated(monkeypatch):
    """Evaluation is another test's matter: here it hands out what it was given."""
    given = []

    def evaluate(config, parts, params, reference_params, directory):
        given[:] = [jax.device_get(params), jax.device_get(reference_params)]
        return {"policies": "a stand-in"}

    monkeypatch.setitem(training.EVALUATIONS, "question_answering", evaluate)
    return given


def metrics_of(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("speed/", "sampler/tokens_per_s")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def differ(one, other):
    return jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), one, other)


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_and_its_export_is_one_again(checkpoint, unevaluated, tmp_path):
    path, params = checkpoint
    training.run(run_config(path), str(tmp_path / "run"))
    trained, reference = unevaluated
    jax.tree.map(np.testing.assert_array_equal, reference, params)  # no step of warm start
    assert all(jax.tree.leaves(differ(trained, params)))
    gaps = [line["loss/sampler_gap_max"] for line in metrics_of(tmp_path / "run")]
    assert len(gaps) == 2 and max(gaps) < 1e-4

    assert export_policy(str(tmp_path / "run"), str(tmp_path / "out"), "trained", "as_trained") == 2
    model, exported = huggingface.load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, exported, trained)
    assert model.config == dataclasses.replace(SHAPE, compute_dtype="bfloat16", remat="full")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    ids = chat.load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
    assert (config.eos_token_id, config.pad_token_id) == (ids.end_of_turn_id, ids.end_of_text_id)
    assert tokenizer.eos_token_id == ids.end_of_turn_id
    messages = [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
        {"role": "user", "content": "Sure"},
    ]
    assert "Easy." in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    again = run_config(tmp_path / "out")
    again.grpo.num_steps = 1
    training.run(again, str(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, unevaluated[1], trained)


@pytest.mark.slow
def test_low_rank_factors_are_trained_on_a_frozen_base_and_resume(checkpoint, unevaluated, tmp_path):
    path, params = checkpoint
    config = run_config(path)
    config.lora.rank, config.warm_start.num_steps, config.warm_start.num_groups = 2, 1, 2
    config.warm_start.optimizer.warmup_steps = 0
    training.run(config, str(tmp_path / "run"))
    trained, reference = unevaluated
    for one, other in ((reference, params), (trained, reference)):  # the warm start is merged before GRPO
        moved = differ(one, other)
        assert all(moved["layers"][part][name] for name, (part, _) in lora.PROJECTIONS.items())
        assert sum(jax.tree.leaves(moved)) == len(lora.PROJECTIONS)  # embedding and norms stay

    state = policy.saved_arrays(config, SHAPE, training.grpo_optimizer(config.grpo))["state"]
    num_factors = sum(x.size for x in jax.tree.leaves(state.params))
    moments = [x for x in jax.tree.leaves(state.optimizer_state) if x.ndim > 1]
    assert sum(x.size for x in moments) == 2 * num_factors < sum(x.size for x in jax.tree.leaves(params)) / 2

    lines = metrics_of(tmp_path / "run")
    assert (
        lines[1]["loss/sampler_gap_max"] < 1e-4 and lines[0]["loss/kl_reference"] < 1e-6 < lines[1]["loss/kl_reference"]
    )
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "summary.json").unlink()
    training.run(config, str(tmp_path / "run"))
    assert metrics_of(tmp_path / "run") == lines
    jax.tree.map(np.testing.assert_array_equal, unevaluated[0], trained)
    for name, expected in (("trained", trained), ("warm_start", reference)):
        export_policy(str(tmp_path / "run"), str(tmp_path / name), name, "as_trained")
        exported = huggingface.load_pretrained(tmp_path / name)[1]
        jax.tree.map(np.testing.assert_array_equal, exported, expected)
    export_policy(str(tmp_path / "run"), str(tmp_path / "half"), "trained", "bfloat16")
    half = huggingface.load_pretrained(tmp_path / "half")[1]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), half, trained)


def test_mistakes_are_named(checkpoint, tmp_path):
    path, _ = checkpoint
    other = pathlib.Path(shutil.copytree(path, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second = list(tokenizer["model"]["vocab"])[:2]
    tokenizer["model"]["vocab"][first], tokenizer["model"]["vocab"][second] = 1, 0
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    start = functools.partial(training.run, workdir=str(tmp_path / "run"))
    config = run_config(other)
    config.prompt.tokenizer_directory = str(SMALL_TOKENIZER_DIRECTORY)
    with pytest.raises(ValueError, match="is not the tokenizer of .*2 tokens have other ids"):
        start(config)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "vocab_size": 500}))
    with pytest.raises(ValueError, match="tokens and .* an embedding of 500 rows"):
        start(config)
    config.model = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not one of .*there is no such directory or file"):
        start(config)
    config = run_config(path)
    config.episode.max_tokens = config.jax_engine.max_tokens = 600
    with pytest.raises(ValueError, match="600 is beyond the 512"):
        start(config)
    config = run_config(path)
    config.compute.attention = "magic"
    with pytest.raises(ValueError, match="compute.attention 'magic' is not one of"):
        start(config)
    config = run_config(path)
    config.lora.rank = -1
    with pytest.raises(ValueError, match="lora.rank -1"):
        start(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="is no run directory"):
        export_policy(str(tmp_path), str(tmp_path / "out"), "trained", "as_trained")


@pytest.mark.slow
def test_a_checkpoint_with_the_real_tokenizer_is_trained_and_exported_by_command(tmp_path):
    """Qwen3's own vocabulary and embedding, ids and all, on a model that is tiny elsewhere."""
    if not (QWEN3_DIRECTORY / "tokenizer.json").is_file():
        pytest.skip("no Qwen3 tokenizer: set ORCHESTRA_QWEN3_TOKENIZER to a directory that holds one")
    shape = dataclasses.replace(SHAPE, vocab_size=QWEN3_VOCAB_SIZE, parameter_dtype="bfloat16")
    model, params = transformer.Transformer(shape), transformer.init_params(shape, jax.random.key(7))
    huggingface.save_pretrained(model, params, tmp_path / "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QWEN3_DIRECTORY / name, tmp_path / "qwen3")
    config = run_config(tmp_path / "qwen3")
    config.lora.rank, config.grpo.num_steps = 2, 1
    training.run(config, str(tmp_path / "run"))
    (line,) = metrics_of(tmp_path / "run")
    assert line["optimizer/gradient_norm"] > 0 and line["loss/num_rollouts"] == 8
    command = [sys.executable, "-m", "experiments.export_model", f"--workdir={tmp_path / 'run'}"]
    command.append(f"--directory={tmp_path / 'out'}")
    for code, told in ((0, "the trained policy of"), (2, "holds weights already")):
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert result.returncode == code and told in result.stdout + result.stderr, result.stderr
    exported = huggingface.load_pretrained(tmp_path / "out")[1]
    assert exported["embedding"].dtype == jnp.bfloat16
    moved = differ(exported, params)
    assert moved["layers"]["feed_forward"]["down"] and not moved["embedding"]
