"""GGUF files written by the `gguf` package itself, and what comes of them."""

import pathlib
import sys

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from experiments import import_gguf
from orchestra_jax.models import gguf_file, huggingface, huggingface_config, pretrained
from orchestra_jax.models.config import ModelConfig, RopeScaling
from orchestra_jax.models.transformer import Transformer, init_params

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ALPHABET = list("abcdefghijklmnopqrstuvwxyz")


def pairs_from_halves(weight, head_dim):
    """What llama.cpp does to the rows of queries and keys."""
    return np.concatenate(
        [
            np.stack([head[: head_dim // 2], head[head_dim // 2 :]], axis=1).reshape(head.shape)
            for head in weight.reshape(-1, head_dim, weight.shape[1])
        ]
    )


def write_gguf(path, family, tensors, config, **fields):
    """A file of architecture `family` with these Hugging Face tensors, in float32."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.head_dim)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_context_length(config.max_position)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    spellings = [*ALPHABET, "ab", *(f"<{number}>" for number in range(config.vocab_size - 27))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "qwen2"))
    writer.add_token_list(spellings)
    writer.add_token_types([1] * 27 + [3] * (config.vocab_size - 28) + [5])  # the last row is no token's
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(30)
    if "scaling" in fields:
        writer.add_rope_scaling_type(fields["scaling"])
    names = {theirs: ours for ours, theirs in gguf_file.OUTER_NAMES.items()}
    names |= {
        f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}"
        for layer in range(config.num_layers)
        for ours, theirs in gguf_file.LAYER_NAMES.items()
    }
    for name, array in tensors.items():
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = pairs_from_halves(array, config.head_dim)
        kind = fields.get("quantised", {}).get(name)
        writer.add_tensor(names[name], array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("family", "golden"), [("llama", "llama3"), ("qwen2", "qwen2"), ("qwen3", "qwen3_untied")])
def test_weights_config_and_tokenizer_come_back(family, golden, tmp_path):
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    config = huggingface_config.read_config(GOLDEN / golden)
    file = tmp_path / "model.gguf"
    write_gguf(file, family, tensors, config)
    gguf_file.convert(file, tmp_path / "out")
    read = huggingface_config.read_config(tmp_path / "out")
    assert (read.num_layers, read.num_kv_heads, read.has_qk_norm, read.has_qkv_bias, read.is_tied) == (
        config.num_layers, config.num_kv_heads, config.has_qk_norm, config.has_qkv_bias, config.is_tied,
    )  # fmt: skip
    assert read.rope_theta == config.rope_theta and read.rope_scaling == RopeScaling()
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(converted[name], array.astype(ml_dtypes.bfloat16))
    _, params = huggingface.load_pretrained(tmp_path / "out")
    assert pretrained.read_model(str(file)) == read
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(str(file), None), params)
    vocabulary = pretrained.read_vocabulary(str(tmp_path / "out"))
    assert pretrained.read_vocabulary(str(file)) == {
        spelling: token for spelling, token in vocabulary.items() if token < config.vocab_size - 1
    }
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("abc<3>").tokens == ["ab", "c", "<3>"]
    assert tokenizer.decode([26, 2, 30], skip_special_tokens=True) == "abc"


def test_k_quants_by_hand(tmp_path):
    """A block of 256 weights: Q6_K holds d * scale * (q - 32), Q4_K d * scale * q - d_min * min."""
    config = ModelConfig(38, 256, 256, 1, 2, 2, 128, has_qk_norm=False, has_qkv_bias=True, is_tied=False)
    params = init_params(config, jax.random.key(0))
    huggingface.save_pretrained(Transformer(config), params, tmp_path / "exact")
    tensors = load_file(tmp_path / "exact" / "model.safetensors")
    half, quarter = (np.frombuffer(np.float16(x).tobytes(), np.uint8) for x in (0.5, 0.25))
    q6_block = np.concatenate([np.zeros(192, np.uint8), np.ones(16, np.uint8), half])  # q 0, scales 1
    q4_block = np.concatenate([half, quarter, np.full(8, 1, np.uint8), np.full(4, 0x11, np.uint8), np.full(128, 0x33)])
    down, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    tensors[down], tensors[up] = (np.tile(block.astype(np.uint8), (256, 1)) for block in (q6_block, q4_block))
    kinds = {down: gguf.GGMLQuantizationType.Q6_K, up: gguf.GGMLQuantizationType.Q4_K}
    write_gguf(tmp_path / "model.gguf", "qwen2", tensors, config, quantised=kinds)
    feed_forward = pretrained.load_params(str(tmp_path / "model.gguf"), None)["layers"]["feed_forward"]
    np.testing.assert_array_equal(feed_forward["down"].astype(np.float32), np.full((1, 256, 256), -16.0))
    np.testing.assert_array_equal(feed_forward["up"].astype(np.float32), np.full((1, 256, 256), 1.25))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q5_K", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_other_kinds_are_what_the_package_reads_in_them(kind, tmp_path):
    """Random blocks, whose scales are small half floats. That rows and blocks keep their places is ours."""
    kind = gguf.GGMLQuantizationType[kind]
    config = ModelConfig(38, 256, 512, 1, 2, 2, 128, has_qk_norm=False, has_qkv_bias=True, is_tied=False)
    huggingface.save_pretrained(Transformer(config), init_params(config, jax.random.key(0)), tmp_path / "exact")
    tensors, name = load_file(tmp_path / "exact" / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    weights, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 0x30, (256, 512 // weights * bytes_of_block), np.uint8)
    tensors[name] = rows
    write_gguf(tmp_path / "model.gguf", "qwen2", tensors, config, quantised={name: kind})
    read = pretrained.load_params(str(tmp_path / "model.gguf"), None)["layers"]["feed_forward"]["down"]
    expected = gguf.dequantize(rows, kind).astype(ml_dtypes.bfloat16)
    assert expected.shape == (256, 512) and len(np.unique(expected)) > 100
    np.testing.assert_array_equal(read[0], expected.T)


def test_what_is_not_supported_is_named(tmp_path, monkeypatch, capsys):
    tensors, config = (
        load_file(GOLDEN / "qwen2" / "model.safetensors"),
        huggingface_config.read_config(GOLDEN / "qwen2"),
    )
    file = tmp_path / "model.gguf"
    for arguments, told in (
        (("gemma", {}), "architecture 'gemma' is not supported"),
        (("qwen2", {"scaling": gguf.RopeScalingType.YARN}), r"rope scaling \(yarn"),
        (("qwen2", {"pre": "unheard"}), "pre-tokenizer 'unheard' is not supported"),
    ):
        write_gguf(file, arguments[0], tensors, config, **arguments[1])
        with pytest.raises(ValueError, match=told):
            gguf_file.convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match="tensor 'blk.0.ffn_gate_inp.weight' is not supported"):
        gguf_file.their_name(file, "blk.0.ffn_gate_inp.weight")
    file.write_bytes(b"not a model")
    monkeypatch.setattr(sys, "argv", ["import_gguf", f"--gguf={file}", f"--directory={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as exit_info:
        import_gguf.app.run(import_gguf.main)
    assert exit_info.value.code == 2 and "cannot be read as GGUF" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
