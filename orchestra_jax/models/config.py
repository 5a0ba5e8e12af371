"""The shape of a dense decoder (Qwen3, Qwen2.5, Llama 3.x), and the named sizes. Not the mesh, not the weights.

Source of the numbers: the `config.json` of the published dense Qwen3 checkpoints. Any other checkpoint of the three
families brings its own (huggingface.py).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that the weights were trained for (rotary.py).

    `kind` is a key of `rotary.FREQUENCIES`; the fields behind `original_max_position` belong to one kind each.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    # yarn: full rotations within the original context above which a pair is left alone, and below which it is
    # interpolated altogether; whether these bounds are whole pairs; what cosines and sines are multiplied by.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    attention_factor: float = 1.0
    # llama3: wavelengths, as parts of the original context, between which a pair is interpolated in part
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the forward pass computes. Hashable, so it passes through jit as a static value.

    Qwen3 norms each query and key head (`has_qk_norm`); Qwen2.5 and Llama do not, and Qwen2.5 adds a bias to queries,
    keys and values (`has_qkv_bias`).

    `parameter_dtype` is how parameters are stored, `compute_dtype` what the matrix products run in; norms, the softmax
    and log-probabilities are always float32. `remat` names a key of `transformer.REMAT_POLICIES`, `attention` one of
    `attention.IMPLEMENTATIONS` or "auto". `lora_scale` is what products of
    low-rank factors are multiplied by where the parameters hold some (lora.py). `max_position` is the context length
    that config.json names: components.check_config bounds the episodes with it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_epsilon: float = 1e-6
    has_qk_norm: bool = True
    has_qkv_bias: bool = False
    is_tied: bool = True
    max_position: int = 40_960
    parameter_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "auto"
    lora_scale: float = 1.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embedding turns pairs, choose an even one")


QWEN3_VOCAB_SIZE = 151_936  # rows of the embedding; the tokenizer uses fewer

MODELS = {
    "qwen3-0.6b": ModelConfig(QWEN3_VOCAB_SIZE, 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": ModelConfig(QWEN3_VOCAB_SIZE, 2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": ModelConfig(QWEN3_VOCAB_SIZE, 2560, 9728, 36, 32, 8, 128),
    "qwen3-8b": ModelConfig(QWEN3_VOCAB_SIZE, 4096, 12288, 36, 32, 8, 128, is_tied=False),
    "qwen3-14b": ModelConfig(QWEN3_VOCAB_SIZE, 5120, 17408, 40, 40, 8, 128, is_tied=False),
    "qwen3-32b": ModelConfig(QWEN3_VOCAB_SIZE, 5120, 25600, 64, 64, 8, 128, is_tied=False),
    # About 1M parameters: learns a small tool-use task on two CPU cores. `vocab_size` is set where it is built.
    "quickstart": ModelConfig(
        1500, 128, 384, 4, 8, 4, 16, rope_theta=10_000.0, max_position=2048, compute_dtype="float32", remat="dots"
    ),
    # For tests: every dimension differs from the others, so a swapped axis cannot go unseen.
    "tiny": ModelConfig(
        37, 20, 28, 3, 4, 2, 6, rope_theta=10_000.0, max_position=4096, compute_dtype="float32", remat="none"
    ),
}
