"""What travels to a server: the same tensors that `save_pretrained` writes, and only those that changed."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestra_jax.models.config import MODELS
from orchestra_jax.models.huggingface import load_pretrained, save_pretrained
from orchestra_jax.models.lora import LoraConfig, init_lora, merge
from orchestra_jax.models.transformer import Transformer, init_params
from orchestra_jax.models.weight_files import WeightWriter

CONFIG = MODELS["tiny"]


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def tensors(directory):
    return load_file(directory / "model.safetensors")


def test_the_file_holds_what_save_pretrained_writes(params, tmp_path):
    written, saved = tmp_path / "written", tmp_path / "saved"
    written.mkdir()
    assert WeightWriter(CONFIG, "float32").write(params, written)
    save_pretrained(Transformer(CONFIG), params, saved)
    ours, theirs = tensors(written), tensors(saved)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    _, loaded = load_pretrained(written)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_it_is_cast_to_the_dtype_of_the_servers(params, tmp_path):
    WeightWriter(CONFIG, "bfloat16").write(params, tmp_path)
    embedding = tensors(tmp_path)["model.embed_tokens.weight"]
    assert str(embedding.dtype) == "bfloat16"
    np.testing.assert_array_equal(embedding, params["embedding"].astype("bfloat16"))
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        WeightWriter(CONFIG, "int8")


def test_of_a_lora_the_adapted_matrices_travel_alone(params, tmp_path):
    writer, lora = WeightWriter(CONFIG, "float32"), LoraConfig(rank=2, projections=("query", "down"))
    factors = init_lora(lora, params, jax.random.key(1))
    assert writer.write(params, tmp_path)
    for number in (1.0, 2.0):
        trained = jax.tree.map(lambda leaf, number=number: leaf + number, factors)
        assert not writer.write(merge(params, trained, 2.0), tmp_path)
        names = {name.split(".", 3)[-1] for name in tensors(tmp_path)}
        assert names == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
        assert len(tensors(tmp_path)) == 2 * CONFIG.num_layers
    assert writer.write(jax.tree.map(lambda leaf: leaf + 1, params), tmp_path)  # all have changed
