"""Directories of Hugging Face: logits of every family, round trips, and what is refused.

The golden directories were saved by transformers itself (tests/golden/make_models.py).
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestra_jax.models import huggingface, huggingface_config
from orchestra_jax.models.config import MODELS, ModelConfig, RopeScaling
from orchestra_jax.models.transformer import Transformer, head_weights, init_params

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ("qwen3_tied", "qwen3_untied", "qwen3_yarn", "qwen2", "llama3", "llama3_wide")


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BT, segment_ids_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
    return jnp.matmul(hidden_BTD, head_weights(params, model.config).astype(hidden_BTD.dtype))


def load_exact(directory):
    """The model in float32, computation included."""
    model, params = huggingface.load_pretrained(directory)
    return Transformer(dataclasses.replace(model.config, compute_dtype="float32")), params


@pytest.fixture
def directory(tmp_path):
    """A copy of the tied Qwen3 that a test may spoil."""
    return pathlib.Path(shutil.copytree(GOLDEN / "qwen3_tied", tmp_path / "model"))


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face(family):
    model, params = load_exact(GOLDEN / family)
    golden = np.load(GOLDEN / family / "logits.npz")
    is_real_BT = golden["attention_mask"].astype(bool)
    logits_BTV = np.asarray(forward(model, params, golden["tokens"], golden["attention_mask"]))
    assert np.abs(golden["logits"][is_real_BT]).max() > 1
    np.testing.assert_allclose(logits_BTV[is_real_BT], golden["logits"][is_real_BT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_yarn", "llama3"])
def test_the_scaling_shows_in_the_logits(family):
    """What the test above cannot tell if the frequencies do not matter at these positions."""
    model, params = load_exact(GOLDEN / family)
    golden = np.load(GOLDEN / family / "logits.npz")
    unscaled = Transformer(dataclasses.replace(model.config, rope_scaling=RopeScaling()))
    logits_BTV = forward(unscaled, params, golden["tokens"], golden["attention_mask"])
    assert np.abs(np.asarray(logits_BTV)[0] - golden["logits"][0]).max() > 0.01


def test_bfloat16_stays_near_the_float32_logits():
    model, params = huggingface.load_pretrained(GOLDEN / "qwen3_untied")
    assert model.config.compute_dtype == "bfloat16"
    golden = np.load(GOLDEN / "qwen3_untied" / "logits.npz")
    logits_BTV = np.asarray(forward(model, params, golden["tokens"], golden["attention_mask"]), np.float32)
    assert np.abs(logits_BTV[0] - golden["logits"][0]).max() < 0.05 * np.abs(golden["logits"][0]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_written_as_it_is_read(family, tmp_path):
    config = huggingface_config.read_config(GOLDEN / family)
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config.config_fields(config)))
    assert huggingface_config.read_config(tmp_path) == config


def test_loading_shows_how_far_it_is(directory, capsys):
    huggingface.load_pretrained(directory)
    assert re.search(r"loading weights: 100%.*13/13", capsys.readouterr().err)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_a_round_trip_in_bfloat16_keeps_every_byte(max_shard_bytes, tmp_path):
    config = ModelConfig(37, 20, 28, 3, 4, 2, 6, is_tied=False, parameter_dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    huggingface.save_pretrained(Transformer(config), params, tmp_path / "first", max_shard_bytes=max_shard_bytes)
    model, loaded = huggingface.load_pretrained(tmp_path / "first")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    huggingface.save_pretrained(model, loaded, tmp_path / "second", max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert len(files) == 2 if max_shard_bytes > 10**6 else len(files) > 4
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_transformers_saved_is_saved_alike(tmp_path):
    for family in FAMILIES:
        model, params = huggingface.load_pretrained(GOLDEN / family)
        huggingface.save_pretrained(model, params, tmp_path / family)
        saved, golden = (load_file(path / family / "model.safetensors") for path in (tmp_path, GOLDEN))
        assert saved.keys() == golden.keys()
        for name, array in golden.items():
            np.testing.assert_array_equal(saved[name], array)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "qwen3_moe"}, r"model_type 'qwen3_moe' is not supported; choose one of \['llama', 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
        ({"quantization_config": {"bits": 4}}, "not supported: {'quantization_config'"),
        ({"final_logit_softcapping": 30.0}, "not supported: {'final_logit_softcapping': 30.0}"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "not supported: {'auto_map'"),
        ({"dtype": "auto"}, "dtype 'auto' is not supported"),
        ({"num_attention_heads": "4"}, "config.json: "),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"'default' does not know: \['full_attention'",
        ),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(directory, fields, told):
    edit_config(directory, **fields)
    with pytest.raises(ValueError, match=told):
        huggingface.load_pretrained(directory)


def test_the_older_spelling_of_rope_is_read(directory):
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5}
    path.write_text(json.dumps({**fields, "rope_theta": 5e6, "rope_scaling": scaling}))
    config = huggingface_config.read_config(directory)
    assert config.rope_theta == 5e6
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 32, attention_factor=1.5)


def test_rope_scaling_goes_before_rope_parameters(directory):
    """As the recipes for YaRN have it: scaling is added to a config.json that transformers 5 wrote."""
    edit_config(
        directory,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        original_max_position_embeddings=16,
    )
    config = huggingface_config.read_config(directory)
    assert config.rope_theta == 1e6
    assert (config.rope_scaling.kind, config.rope_scaling.original_max_position) == ("yarn", 16)


def test_a_missing_field_is_named(directory):
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    del fields["hidden_size"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="lacks the field 'hidden_size'"):
        huggingface_config.read_config(directory)
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        huggingface_config.read_config(directory)


def test_tensors_that_do_not_fit_are_all_named_at_once(directory):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 20), np.float32)
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((28, 20), np.float32)

    edit_weights(directory, spoil)
    with pytest.raises(ValueError) as error:
        huggingface.load_pretrained(directory)
    text = str(error.value)
    assert "1 missing: model.norm.weight [20]" in text
    assert "1 not of this model: model.layers.9.mlp.up_proj.weight [28, 20]" in text
    assert "model.layers.0.mlp.up_proj.weight is [3, 20] and should be [28, 20]" in text


def test_a_checkpoint_of_another_family_is_told_by_its_tensors(directory):
    shutil.copy(GOLDEN / "qwen2" / "model.safetensors", directory / "model.safetensors")
    with pytest.raises(ValueError, match="4 missing: .*q_norm.*not of this model: .*bias.*another shape"):
        huggingface.load_pretrained(directory)


def test_a_tied_checkpoint_may_carry_its_head(directory):
    edit_weights(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    _, params = huggingface.load_pretrained(directory)
    assert "head" not in params
    edit_weights(directory, lambda tensors: tensors["lm_head.weight"].__imul__(2))
    with pytest.raises(ValueError, match="says tie_word_embeddings, but lm_head.weight is not model.embed_tokens"):
        huggingface.load_pretrained(directory)


def test_weights_that_are_no_floats_are_named(directory):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=f"1 of a dtype that is not read: {name} is I8"):
        huggingface.load_pretrained(directory)


def test_tokenizer_and_special_tokens_are_carried_over(directory, tmp_path):
    edit_config(directory, eos_token_id=[7, 8], bos_token_id=3)
    (directory / "tokenizer.json").write_text("{}")
    model, params = huggingface.load_pretrained(directory)
    huggingface.save_pretrained(model, params, tmp_path / "with", directory)
    huggingface.save_pretrained(model, params, tmp_path / "without")
    with_source, without = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without"))
    assert (with_source["eos_token_id"], with_source["bos_token_id"]) == ([7, 8], 3)
    assert without["eos_token_id"] is None and (tmp_path / "with" / "tokenizer.json").is_file()


def test_parameters_of_another_dtype_than_the_configs_are_refused(directory, tmp_path):
    model, params = huggingface.load_pretrained(directory)
    with pytest.raises(ValueError, match=r"parameters are \['bfloat16'\] and parameter_dtype is 'float32'"):
        huggingface.save_pretrained(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tmp_path / "out")


def test_files_that_are_cut_short_or_absent_are_named(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read, it may be cut short"):
        huggingface.load_pretrained(directory)
    file.unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        huggingface.load_pretrained(directory)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        huggingface.load_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 1 files that are not there: model-00001-of-00002"):
        huggingface.load_pretrained(directory)


def test_weights_are_never_overwritten(directory):
    model, params = huggingface.load_pretrained(directory)
    with pytest.raises(ValueError, match="holds weights already"):
        huggingface.save_pretrained(model, params, directory)


def test_a_model_of_no_family_is_not_saved():
    with pytest.raises(ValueError, match="belongs to no family"):
        huggingface_config.config_fields(dataclasses.replace(MODELS["tiny"], has_qkv_bias=True))
