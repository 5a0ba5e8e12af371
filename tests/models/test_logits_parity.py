"""What we write, as transformers' torch models read it: the same logits in float32. Needs the `parity` extra.

pytest -m parity
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import huggingface
from orchestra_jax.models.config import MODELS, RopeScaling
from orchestra_jax.models.transformer import Transformer, head_weights, init_params

BASE = dataclasses.replace(MODELS["tiny"], vocab_size=41, max_position=128)
YARN = RopeScaling("yarn", factor=4.0, original_max_position=32, attention_factor=0.1 * np.log(4.0) + 1.0)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position=16)
CONFIGS = {
    "qwen3_tied": dataclasses.replace(BASE, rope_theta=1e4),
    "qwen3_untied_yarn": dataclasses.replace(BASE, is_tied=False, num_heads=8, num_kv_heads=1, rope_scaling=YARN),
    "qwen2": dataclasses.replace(BASE, num_heads=2, head_dim=10, has_qk_norm=False, has_qkv_bias=True, rope_theta=5e6),
    "llama3": dataclasses.replace(
        BASE, is_tied=False, num_heads=5, num_kv_heads=5, head_dim=4, has_qk_norm=False, rope_scaling=LLAMA3
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers")
    model = Transformer(CONFIGS[name])
    params = init_params(model.config, jax.random.key(0))
    # Larger than at the start, biases and norms included, so that every part of the model shows in the logits.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    huggingface.save_pretrained(model, params, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens_BT = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 80))
    with torch.no_grad():
        expected_BTV = theirs(input_ids=torch.tensor(tokens_BT)).logits.numpy()
    positions_BT = jnp.broadcast_to(jnp.arange(80)[None], (2, 80))
    hidden_BTD, _ = jax.jit(model.apply)({"params": params}, tokens_BT, positions_BT, jnp.ones((2, 80), jnp.int32))
    logits_BTV = jnp.matmul(hidden_BTD, head_weights(params, model.config))
    assert np.abs(expected_BTV).max() > 1
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4 * np.abs(expected_BTV).max())
