"""Directories of Hugging Face: config.json -> ModelConfig, safetensors <-> parameters. Knows names and layouts only.

The families are those whose maths transformer.py has: `qwen3`, `qwen2` (Qwen2.5, the xLAM-2 line) and `llama` (Llama
3.x and what was tuned from it). A field that would change the maths and is not supported is refused by its name.

A weight matrix lies [out, in] there and [in, out] here, with heads as a dim of their own and layers stacked in front.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from orchestra_jax.models.config import ModelConfig, RopeScaling
from orchestra_jax.models.transformer import Transformer, init_params, logical_axes
from orchestra_jax.sharding import mesh_axes

# Our path -> (their name, how many of our leading dims are the matrix's input). Within a layer.
LAYER_MATRICES = {
    "attention/query": ("self_attn.q_proj.weight", 1),
    "attention/key": ("self_attn.k_proj.weight", 1),
    "attention/value": ("self_attn.v_proj.weight", 1),
    "attention/output": ("self_attn.o_proj.weight", 2),
    "feed_forward/gate": ("mlp.gate_proj.weight", 1),
    "feed_forward/up": ("mlp.up_proj.weight", 1),
    "feed_forward/down": ("mlp.down_proj.weight", 1),
}
LAYER_VECTORS = {
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
}
OUTER = {"embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight", "head": "lm_head.weight"}

MAX_SHARD_BYTES = 5 * 10**9
NUM_SHOWN = 5  # names in an error message

# (has_qk_norm, has_qkv_bias) and head_dim where config.json has none (0: hidden_size / heads)
FAMILIES = {"qwen3": (True, False, 128), "qwen2": (False, True, 0), "llama": (False, False, 0)}
# Fields whose value must be this one, where they are there at all.
REQUIRED_VALUES = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "quantization_config": None,
}
READ_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "layer_types", "torch_dtype", "dtype",
)  # fmt: skip
# Fields that say nothing about the forward pass at inference and training as they are done here.
HARMLESS_FIELDS = (
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    "max_window_layers", "sliding_window", "transformers_version", "use_cache", "pretraining_tp", "_name_or_path",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "tokenizer_class", "auto_map", "unsloth_version", "unsloth_fixed",
)  # fmt: skip


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a directory's config.json; parameters in the dtype that it names, computation in bfloat16.

    ValueError for a file that is missing or no JSON object, a family or a field's value that is not supported, and a
    field that is missing. A field that is not known is named in a warning.
    """
    path = pathlib.Path(directory) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported; choose one of {sorted(FAMILIES)}")
    for name, required in REQUIRED_VALUES.items():
        if name in fields and fields[name] != required:
            raise ValueError(f"{path}: {name} {fields[name]!r} is not supported, only {required!r} is")
    if any(layer_type != "full_attention" for layer_type in fields.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types {fields['layer_types']} is not supported, only full_attention is")
    unknown = sorted(set(fields) - {*READ_FIELDS, *HARMLESS_FIELDS, *REQUIRED_VALUES})
    if unknown:
        logging.warning("%s: fields that are not read: %s", path, ", ".join(unknown))
    has_qk_norm, has_qkv_bias, head_dim = FAMILIES[family]
    try:
        num_heads = fields["num_attention_heads"]
        theta, scaling = _read_rope(fields)
        dtype = fields.get("torch_dtype") or fields.get("dtype") or "float32"
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
            parameter_dtype=dtype,
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_rope(fields: Mapping[str, object]) -> tuple[float, RopeScaling]:
    """Theta and scaling from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": fields.get("rope_theta"), **(fields.get("rope_scaling") or {})}
    rope |= fields.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0 is")
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; choose default, yarn or llama3")
    original = rope.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    factor = rope.get("factor") or fields["max_position_embeddings"] / original
    common = {"kind": kind, "factor": float(factor), "original_max_position": int(original)}
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
    """The config.json that `read_config` reads back, and transformers and SGLang too."""
    family = next(
        (name for name, switches in FAMILIES.items() if switches[:2] == (config.has_qk_norm, config.has_qkv_bias)), None
    )
    if family is None:
        raise ValueError("a model with both QK-norm and QKV bias belongs to no family: switch one of them off")
    names = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    fields = {
        "architectures": [names[family]],
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


def load_pretrained(directory: str | pathlib.Path, mesh: Mesh | None = None) -> tuple[Transformer, object]:
    """The model and its parameters, each tensor put onto its shards as soon as it is read.

    Args:
      directory: config.json beside model.safetensors, or beside shards with model.safetensors.index.json.
      mesh: what the parameters are laid out on by sharding.RULES; without one they go to the first device.

    Raises:
      ValueError: what `read_config` refuses; tensors that are missing, too many or of another shape, all named at
        once; a file that is missing or cut short.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory)
    file_of = _find_tensors(directory, _expected_tensors(config))
    axes = _flat(logical_axes(config))
    shapes = _flat(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))

    def sharding(names: Sequence[str | None]) -> jax.sharding.Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(mesh, mesh_axes(names, mesh))

    leaves = {}
    for path, (names, dims) in tqdm(_names_by_leaf(config).items(), desc="loading weights"):
        dtype, spec = shapes[path].dtype, tuple(axes[path]) + (None,) * (len(shapes[path].shape) - len(axes[path]))
        is_stacked = path.startswith("layers/")
        shape = shapes[path].shape[1:] if is_stacked else shapes[path].shape
        if not is_stacked:
            leaves[path] = jax.device_put(_read(file_of, names[0], dims, shape, dtype), sharding(spec))
            continue
        whole = sharding(spec)
        make = jax.jit(lambda shape=shapes[path]: jnp.zeros(shape.shape, shape.dtype), out_shardings=whole)
        put = jax.jit(lambda stacked, one, layer: stacked.at[layer].set(one), donate_argnums=0, out_shardings=whole)
        stacked = make()
        for layer, name in enumerate(names):
            one = jax.device_put(_read(file_of, name, dims, shape, dtype), sharding(spec[1:]))
            stacked = put(stacked, one, layer)
        leaves[path] = stacked
    return Transformer(config), _nested(leaves)


def save_pretrained(
    model: Transformer, params, directory: str | pathlib.Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes config.json and safetensors, which transformers and SGLang load.

    Host memory: one shard. ValueError if the directory holds weights already.
    """
    write_directory(model.config, _theirs(model.config, _flat(params)), directory, max_shard_bytes)


def write_directory(
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    directory: str | pathlib.Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and the named tensors, in shards with an index if they exceed `max_shard_bytes`.

    ValueError if the directory holds weights already.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds weights already: choose another directory")
    (directory / "config.json").write_text(json.dumps(config_fields(config), indent=2) + "\n", encoding="utf-8")
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def write_shard():
        save_file(shard, directory / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + array.nbytes > max_shard_bytes:
            write_shard()
        shard[name] = array
        total += array.nbytes
    write_shard()
    if len(shards) == 1:
        (directory / "part-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names_by_leaf(config: ModelConfig) -> dict[str, tuple[list[str], int]]:
    """Our path -> (their names, one a layer, and the number of input dims; 0 for a vector, -1 for the embedding)."""
    leaves = {}
    for path in _flat(logical_axes(config)):
        if path in OUTER:
            leaves[path] = ([OUTER[path]], {"embedding": -1, "head": 1}.get(path, 0))
            continue
        within = path.removeprefix("layers/")
        name, num_in = LAYER_MATRICES[within] if within in LAYER_MATRICES else (LAYER_VECTORS[within], 0)
        leaves[path] = ([f"model.layers.{layer}.{name}" for layer in range(config.num_layers)], num_in)
    return leaves


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Their names with their shapes."""
    shapes = _flat(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    expected = {}
    for path, (names, num_in) in _names_by_leaf(config).items():
        shape = shapes[path].shape[1:] if path.startswith("layers/") else shapes[path].shape
        if num_in > 0:
            shape = (math.prod(shape[num_in:]), math.prod(shape[:num_in]))
        elif num_in == 0:
            shape = (math.prod(shape),)
        expected |= dict.fromkeys(names, shape)
    return expected


def _find_tensors(directory: pathlib.Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, pathlib.Path]:
    """The file of each tensor, once names and shapes are known to be the expected ones; reads headers alone."""
    file_of, wrong = {}, []
    for file in _weight_files(directory):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():
                    file_of[name] = file
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if name in expected and shape != expected[name]:
                        wrong.append(f"{name} is {list(shape)} and should be {list(expected[name])}")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read, it may be cut short: {error}") from error
    missing = [name for name in expected if name not in file_of]
    # A tied checkpoint may carry its head all the same, and old Llama ones their frequencies.
    ignored = () if OUTER["head"] in expected else (OUTER["head"],)
    extra = [name for name in file_of if name not in (*expected, *ignored) and not name.endswith("rotary_emb.inv_freq")]
    if missing or extra or wrong:
        told = [("missing", missing), ("not of this model", extra), ("of another shape", wrong)]
        raise ValueError(
            f"the weights in {directory} do not fit its config.json: "
            + "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in told if names)
        )
    return file_of


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise ValueError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        return [directory / "model.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}") from error
    files = [directory / name for name in sorted(set(names))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{index} names {len(absent)} files that are not there: {_some(absent)}")
    return files


def _read(file_of: Mapping[str, pathlib.Path], name: str, num_in: int, shape: Sequence[int], dtype) -> np.ndarray:
    """One tensor in our layout; its file is mapped, so nothing else is read."""
    try:
        with safe_open(file_of[name], "np") as tensors:
            array = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} in {file_of[name]} cannot be read: {error}") from error
    return (array.T if num_in > 0 else array).reshape(shape).astype(dtype)


def _theirs(config: ModelConfig, leaves: Mapping[str, jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, layer after layer."""
    names_by_leaf = _names_by_leaf(config)

    def layout(array, num_in):
        array = np.asarray(jax.device_get(array))
        if num_in > 0:
            array = array.reshape(math.prod(array.shape[:num_in]), -1).T
        return np.ascontiguousarray(array if num_in else array.reshape(-1))

    for path in ("embedding", "final_norm/scale", "head"):
        if path in names_by_leaf:
            (name,), num_in = names_by_leaf[path]
            yield name, layout(leaves[path], num_in)
    for layer in range(config.num_layers):
        for path, (names, num_in) in names_by_leaf.items():
            if path.startswith("layers/"):
                yield names[layer], layout(leaves[path][layer], num_in)


def _flat(tree) -> dict[str, object]:
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return {"/".join(str(part.key) for part in path): leaf for path, leaf in paths}


def _nested(leaves: Mapping[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more
