"""Directories of Hugging Face: safetensors <-> parameters. Knows names and layouts; config.json: huggingface_config.py.

The families are those whose maths transformer.py has: `qwen3`, `qwen2` (Qwen2.5) and `llama` (Llama 3.x and what was
tuned from it, such as xLAM-2-8B and Nemotron-Nano).

A weight matrix lies [out, in] there and [in, out] here, with heads as a dim of their own and layers stacked in front.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import shutil
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.huggingface_config import TOKEN_IDS, config_fields, read_config, read_fields
from orchestra_jax.models.transformer import Transformer, init_params, logical_axes
from orchestra_jax.sharding import shardings

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
NUM_SHOWN = 20  # names in an error message
STORED_DTYPES = ("F32", "BF16", "F16")
# What stands beside the weights and is not the model's: the tokenizer and how it is sampled from.
COPIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load_pretrained(directory: str | pathlib.Path, mesh: Mesh | None = None) -> tuple[Transformer, object]:
    """The model and its parameters, each tensor put onto its shards as soon as it is read.

    Host memory beside the parameters: one file and one tensor at most.

    Args:
      directory: config.json beside model.safetensors, or beside shards with model.safetensors.index.json.
      mesh: what the parameters are laid out on by sharding.RULES; without one they go to the first device.

    Raises:
      ValueError: what `read_config` refuses; tensors that are missing, too many, of another shape or of a dtype that
        is no float, named at once; a file that is missing or cut short; a dim that the mesh does not divide.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory)
    file_of = _find_tensors(directory, _expected_tensors(config))
    axes = flat_leaves(logical_axes(config))
    shapes = flat_leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))

    def sharding(names: Sequence[str | None]) -> jax.sharding.Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return shardings(PartitionSpec(*names), mesh)

    for path, shape in shapes.items():
        _check_divides(path, shape.shape, sharding(tuple(axes[path])))
    leaves = {}
    for path, (names, dims) in tqdm(names_by_leaf(config).items(), desc="loading weights"):
        dtype, spec = shapes[path].dtype, tuple(axes[path]) + (None,) * (len(shapes[path].shape) - len(axes[path]))
        is_stacked = path.startswith("layers/")
        shape = shapes[path].shape[1:] if is_stacked else shapes[path].shape
        if not is_stacked:
            leaves[path] = jax.device_put(_read(file_of, names[0], dims, shape, dtype), sharding(spec))
            continue
        stacked = _zeros(shapes[path].shape, dtype, sharding(spec))()
        put = _putter(sharding(spec))
        for layer, name in enumerate(names):
            one = jax.device_put(_read(file_of, name, dims, shape, dtype), sharding(spec[1:]))
            # Waited for: what is still to be copied would be held on the host.
            stacked = jax.block_until_ready(put(stacked, one, layer))
        leaves[path] = stacked
    return Transformer(config), _nested(leaves)


# Cached: a function that is jitted anew is compiled anew.
@functools.lru_cache(maxsize=128)
def _zeros(shape: tuple[int, ...], dtype, sharding: jax.sharding.Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=128)
def _putter(sharding: jax.sharding.Sharding):
    # Not stacked.at[layer].set(one): for that XLA CPU copies all layers of a bfloat16 array.
    def put(stacked, one, layer):
        return jax.lax.dynamic_update_index_in_dim(stacked, one, layer, axis=0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def save_pretrained(
    model: Transformer,
    params,
    directory: str | pathlib.Path,
    source_directory: str | pathlib.Path = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    token_ids: Mapping[str, object] = types.MappingProxyType({}),
) -> None:
    """Writes config.json and safetensors, which transformers and SGLang load.

    source_directory: where the model came from; its tokenizer, its generation settings and its ids of special tokens
    are carried over. Without one the new directory has none, but for `token_ids`, by the name in config.json. Host
    memory: one shard and, twice, the tensor behind it. ValueError if the directory holds weights already, or
    parameters are of another dtype than the config says.
    """
    other = {str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {model.config.parameter_dtype}
    if other:
        raise ValueError(
            f"parameters are {sorted(other)} and parameter_dtype is {model.config.parameter_dtype!r}: make them equal"
        )
    if source_directory:
        fields = read_fields(source_directory)
        token_ids = {**token_ids} | {name: fields[name] for name in TOKEN_IDS if name in fields}
    write_directory(model.config, _theirs(model.config, flat_leaves(params)), directory, token_ids, max_shard_bytes)
    for name in COPIED_FILES if source_directory else ():
        if (pathlib.Path(source_directory) / name).is_file():
            shutil.copy(pathlib.Path(source_directory) / name, directory)


def write_directory(
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    directory: str | pathlib.Path,
    token_ids: Mapping[str, object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and the named tensors, in shards with an index if they exceed `max_shard_bytes`.

    token_ids: by the name in config.json. ValueError if the directory holds weights already.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.safetensors*")):
        raise ValueError(f"{directory} holds weights already: choose another directory")
    fields = {**config_fields(config), **token_ids}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
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


def names_by_leaf(config: ModelConfig) -> dict[str, tuple[list[str], int]]:
    """Our path -> (their names, one a layer, and the number of input dims; 0 for a vector, -1 for the embedding)."""
    leaves = {}
    for path in flat_leaves(logical_axes(config)):
        if path in OUTER:
            leaves[path] = ([OUTER[path]], {"embedding": -1, "head": 1}.get(path, 0))
            continue
        within = path.removeprefix("layers/")
        name, num_in = LAYER_MATRICES[within] if within in LAYER_MATRICES else (LAYER_VECTORS[within], 0)
        leaves[path] = ([f"model.layers.{layer}.{name}" for layer in range(config.num_layers)], num_in)
    return leaves


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Their names with their shapes."""
    shapes = flat_leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    expected = {}
    for path, (names, num_in) in names_by_leaf(config).items():
        shape = shapes[path].shape[1:] if path.startswith("layers/") else shapes[path].shape
        if num_in > 0:
            shape = (math.prod(shape[num_in:]), math.prod(shape[:num_in]))
        elif num_in == 0:
            shape = (math.prod(shape),)
        expected |= dict.fromkeys(names, shape)
    return expected


def _find_tensors(directory: pathlib.Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, pathlib.Path]:
    """The file of each tensor, once names, shapes and dtypes are known to be right; reads headers alone."""
    file_of, shape_of, wrong, odd = {}, {}, [], []
    for file in _weight_files(directory):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():
                    stored = tensors.get_slice(name)
                    file_of[name], shape_of[name] = file, list(stored.get_shape())
                    if stored.get_dtype() not in STORED_DTYPES:
                        odd.append(f"{name} is {stored.get_dtype()}")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read, it may be cut short: {error}") from error
    head, embedding = OUTER["head"], OUTER["embedding"]
    is_tied_with_head = head not in expected and head in file_of
    wanted = {**expected, head: expected[embedding]} if is_tied_with_head else expected
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in file_of]
    extra = [
        f"{name} {shape_of[name]}"
        for name in file_of
        if name not in wanted and not name.endswith("rotary_emb.inv_freq")  # old Llama files have them
    ]
    wrong = [
        f"{name} is {shape_of[name]} and should be {list(shape)}"
        for name, shape in wanted.items()
        if name in file_of and shape_of[name] != list(shape)
    ]
    if missing or extra or wrong or odd:
        told = [
            ("missing", missing),
            ("not of this model", extra),
            ("of another shape", wrong),
            ("of a dtype that is not read", odd),
        ]
        raise ValueError(
            f"the weights in {directory} do not fit its config.json: "
            + "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in told if names)
        )
    if is_tied_with_head and not np.array_equal(_stored(file_of, head), _stored(file_of, embedding)):
        raise ValueError(f"{directory}: config.json says tie_word_embeddings, but {head} is not {embedding}")
    return file_of


def _check_divides(path: str, shape: Sequence[int], sharding: jax.sharding.Sharding) -> None:
    for dim, axes in enumerate(sharding.spec if isinstance(sharding, NamedSharding) else ()):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        num_shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
        if shape[dim] % num_shards:
            raise ValueError(
                f"{path} has {shape[dim]} entries in dim {dim}, which mesh axes {axes} cut into {num_shards}: "
                "choose a mesh that divides them"
            )


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise ValueError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        return [directory / "model.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [directory / name for name in sorted(set(names))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}") from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{index} names {len(absent)} files that are not there: {_some(absent)}")
    return files


def _read(file_of: Mapping[str, pathlib.Path], name: str, num_in: int, shape: Sequence[int], dtype) -> np.ndarray:
    """One tensor in our layout."""
    array = _stored(file_of, name)
    return (array.T if num_in > 0 else array).reshape(shape).astype(dtype, copy=False)


def _stored(file_of: Mapping[str, pathlib.Path], name: str) -> np.ndarray:
    """One tensor as it lies in its file, which is mapped, so that nothing else is read."""
    try:
        with safe_open(file_of[name], "np") as tensors:
            return tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} in {file_of[name]} cannot be read: {error}") from error


def _theirs(config: ModelConfig, leaves: Mapping[str, jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, layer after layer."""
    leaf_names = names_by_leaf(config)

    def layout(array, num_in):
        array = np.asarray(jax.device_get(array))
        if num_in > 0:
            array = array.reshape(math.prod(array.shape[:num_in]), -1).T
        return np.ascontiguousarray(array if num_in else array.reshape(-1))

    for path in ("embedding", "final_norm/scale", "head"):
        if path in leaf_names:
            (name,), num_in = leaf_names[path]
            yield name, layout(leaves[path], num_in)
    for layer in range(config.num_layers):
        for path, (names, num_in) in leaf_names.items():
            if path.startswith("layers/"):
                yield names[layer], layout(leaves[path][layer], num_in)


def flat_leaves(tree) -> dict[str, object]:
    """The leaves by their paths, names joined by "/"."""
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
