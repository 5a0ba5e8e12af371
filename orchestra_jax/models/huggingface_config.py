"""Hugging Face's config.json <-> ModelConfig. What would change the maths and is not supported is refused by name.

Both spellings of the rotary embedding are read: `rope_theta` with `rope_scaling` (transformers 4 and before) and
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping

from orchestra_jax.models.config import ModelConfig, RopeScaling

# (has_qk_norm, has_qkv_bias) and head_dim where config.json has none (0: hidden_size / heads)
FAMILIES = {"qwen3": (True, False, 128), "qwen2": (False, True, 0), "llama": (False, False, 0)}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = ("float32", "bfloat16", "float16")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # not the model's business: carried from file to file
# Fields whose value must be this one, where they are there at all.
REQUIRED_VALUES = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
READ_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings", "layer_types", "torch_dtype", "dtype",
)  # fmt: skip
# Fields that say nothing about the forward pass as it is done here.
HARMLESS_FIELDS = (
    *TOKEN_IDS, "architectures", "attention_dropout", "initializer_range", "max_window_layers", "sliding_window",
    "transformers_version", "use_cache", "pretraining_tp", "_name_or_path", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
    "tokenizer_class", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset",
)  # fmt: skip
ROPE_FIELDS = {
    "default": (),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a directory's config.json; parameters in the dtype that it names, computation in bfloat16.

    ValueError for a file that is missing or no JSON object, a family, a field or a value that is not supported, and a
    field that is missing. A field that is not known may be null or false alone: it could change the maths.
    """
    path = pathlib.Path(directory) / "config.json"
    fields = read_fields(directory)
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported; choose one of {sorted(FAMILIES)}")
    for name, required in REQUIRED_VALUES.items():
        if name in fields and fields[name] != required:
            raise ValueError(f"{path}: {name} {fields[name]!r} is not supported, only {required!r} is")
    if any(layer_type != "full_attention" for layer_type in fields.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types {fields['layer_types']} is not supported, only full_attention is")
    known = {*READ_FIELDS, *HARMLESS_FIELDS, *REQUIRED_VALUES}
    unknown = {name: value for name, value in fields.items() if name not in known and value not in (None, False)}
    if unknown:
        raise ValueError(f"{path}: fields that are not supported: {unknown}; remove those that change nothing")
    has_qk_norm, has_qkv_bias, head_dim = FAMILIES[family]
    try:
        num_heads = fields["num_attention_heads"]
        theta, scaling = _read_rope(fields)
        return ModelConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=fields.get("num_key_value_heads") or num_heads,
            head_dim=fields.get("head_dim") or head_dim or fields["hidden_size"] // num_heads,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=fields["rms_norm_eps"],
            has_qk_norm=has_qk_norm,
            has_qkv_bias=has_qkv_bias,
            is_tied=fields.get("tie_word_embeddings", False),
            max_position=fields["max_position_embeddings"],
            parameter_dtype=_read_dtype(fields),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_fields(directory: str | pathlib.Path) -> dict[str, object]:
    """The JSON object in a directory's config.json; ValueError if there is none."""
    path = pathlib.Path(directory) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields


def _read_dtype(fields: Mapping[str, object]) -> str:
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {DTYPES}")
    return dtype


def _read_rope(fields: Mapping[str, object]) -> tuple[float, RopeScaling]:
    """Theta and scaling. `rope_scaling` goes before `rope_parameters`, as in transformers."""
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    in_parameters = (fields.get("rope_parameters") or {}).get("rope_theta")
    theta = float(rope.pop("rope_theta", None) or fields.get("rope_theta") or in_parameters or 10_000.0)
    kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope]
    kind = kinds[0] if kinds else "default"
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type {kind!r} is not supported; choose one of {sorted(ROPE_FIELDS)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported, only 1.0 is")
    unknown = sorted(set(rope) - {*ROPE_FIELDS[kind]})
    if unknown:
        raise ValueError(f"rope fields that {kind!r} does not know: {unknown}")
    if kind == "default":
        return theta, RopeScaling()
    length = fields["max_position_embeddings"]
    given = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(given or length)
    factor = float(rope.get("factor") or length / original)
    common = {"kind": kind, "factor": factor, "original_max_position": original}
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling(**common, low_frequency_factor=low, high_frequency_factor=high)
    return theta, RopeScaling(
        **common,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        is_truncated=rope.get("truncate", True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: Mapping[str, object], factor: float) -> float:
    """Given, or 0.1 ln(factor) + 1 (YaRN, section 3.4), or the quotient of two such terms."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def term(scale):
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return term(rope["mscale"]) / term(rope["mscale_all_dim"])
    return term(1.0)


def config_fields(config: ModelConfig) -> dict[str, object]:
    """The config.json that `read_config` reads back, and transformers and SGLang too.

    Ids of special tokens are null: a family's default would be another tokenizer's.
    """
    family = next(
        (name for name, switches in FAMILIES.items() if switches[:2] == (config.has_qk_norm, config.has_qkv_bias)), None
    )
    if family is None:
        raise ValueError("a model with both QK-norm and QKV bias belongs to no family: switch one of them off")
    fields = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.is_tied,
        "max_position_embeddings": config.max_position,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": config.parameter_dtype,
        **dict.fromkeys(TOKEN_IDS),
    }
    scaling = config.rope_scaling
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    rope["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.is_truncated}
        rope["attention_factor"] = scaling.attention_factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_frequency_factor
        rope["high_freq_factor"] = scaling.high_frequency_factor
    return fields if scaling.kind == "default" else {**fields, "rope_scaling": rope}
