"""GGUF -> a Hugging Face directory: weights dequantised, names and layouts theirs, the tokenizer with them.

For the real small models that come as GGUF alone. Architectures `llama`, `qwen2` and `qwen3`; quantisations those that
the `gguf` package knows (Q4_0 to Q8_0, the K-quants). Dequantised weights are as coarse as the quantisation was.

llama.cpp turns neighbouring pairs (x[2i], x[2i + 1]) of a head in the `llama` architecture, Hugging Face the pairs
(x[i], x[i + H/2]): rows of the queries' and keys' matrices are put back in that order.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.huggingface import write_directory
from orchestra_jax.models.huggingface_config import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3")
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens that are no part of the BPE


class GgufFile(NamedTuple):
    reader: object  # gguf.GGUFReader: maps the file, reads no weights
    fields: dict[str, object]
    config: ModelConfig


def open_file(path: str | pathlib.Path) -> GgufFile:
    """The header of the GGUF file `path`.

    ValueError for a file that is no GGUF, an architecture or rope scaling that is not supported, and if the package
    `gguf` is not there.
    """
    try:
        import gguf  # an extra: only these files need it
    except ImportError as error:
        raise ValueError(f"{path}: reading GGUF needs the package gguf: pip install 'orchestra_jax[gguf]'") from error
    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    config = read_config(
        path, fields, is_tied="output.weight" not in names, has_scaled_rope="rope_freqs.weight" in names
    )
    return GgufFile(reader, fields, config)


def convert(path: str | pathlib.Path, directory: str | pathlib.Path) -> None:
    """Writes the model in the GGUF file `path` to `directory`, in bfloat16.

    ValueError as `open_file`, for a tensor or tokenizer that is not supported, and a directory that holds weights
    already.
    """
    reader, fields, config = open_file(path)
    import gguf

    tokenizer = build_tokenizer(path, fields)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in tqdm(reader.tensors, desc="dequantising"):
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            name = their_name(path, tensor.name)
            if fields["general.architecture"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                array = halves_from_pairs(array, config.head_dim)
            yield name, np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))

    token_ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{theirs}_token_id")
        for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_directory(config, tensors(), directory, token_ids)
    tokenizer.save(str(pathlib.Path(directory) / "tokenizer.json"))
    write_tokenizer_config(fields, directory)


def read_config(path, fields: Mapping[str, object], is_tied: bool, has_scaled_rope: bool) -> ModelConfig:
    """The ModelConfig of a GGUF's metadata. ValueError for what is not supported, or missing."""
    family = fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {family!r} is not supported; choose one of {ARCHITECTURES}")
    scaling = fields.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or has_scaled_rope:
        raise ValueError(f"{path}: rope scaling ({scaling}, or a tensor of its own) is not supported in GGUF")
    has_qk_norm, has_qkv_bias, _ = FAMILIES[family]
    try:
        hidden, num_heads = fields[f"{family}.embedding_length"], fields[f"{family}.attention.head_count"]
        head_dim = fields.get(f"{family}.attention.key_length", hidden // num_heads)
        if fields.get(f"{family}.rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{path}: {family}.rope.dimension_count is not head_dim {head_dim}: not supported")
        return ModelConfig(
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            hidden_size=hidden,
            intermediate_size=fields[f"{family}.feed_forward_length"],
            num_layers=fields[f"{family}.block_count"],
            num_heads=num_heads,
            num_kv_heads=fields.get(f"{family}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=float(fields.get(f"{family}.rope.freq_base", 10_000.0)),
            norm_epsilon=float(fields[f"{family}.attention.layer_norm_rms_epsilon"]),
            has_qk_norm=has_qk_norm,
            has_qkv_bias=has_qkv_bias,
            is_tied=is_tied,
            max_position=fields[f"{family}.context_length"],
            parameter_dtype="bfloat16",
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from error


def their_name(path, name: str) -> str:
    """Hugging Face's name of a GGUF tensor; ValueError for one that has none here."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    block, layer, within = (*name.split(".", 2), "", "")[:3]
    if block != "blk" or within not in LAYER_NAMES:
        raise ValueError(f"{path}: tensor {name!r} is not supported")
    return f"model.layers.{layer}.{LAYER_NAMES[within]}"


def halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads * H, D] of neighbouring pairs in the order of halves."""
    rows, width = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: _words(""),
    "llama-bpe": lambda: _words("{1,3}"),
}


def build_tokenizer(path, fields: Mapping[str, object]) -> tokenizers.Tokenizer:
    """The byte-level BPE of a GGUF. ValueError for another kind, or a pre-tokenizer that is not known."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported")
    spellings, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({spelling: token for token, spelling in enumerate(spellings)}, merges))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for spelling, token_kind in zip(spellings, kinds, strict=True):
        if token_kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(spelling, normalized=False, special=token_kind == CONTROL)])
    return tokenizer


def write_tokenizer_config(fields: Mapping[str, object], directory: str | pathlib.Path) -> None:
    spellings = fields["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "unknown", "padding"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[{"unknown": "unk_token", "padding": "pad_token"}.get(name, f"{name}_token")] = spellings[token]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    path = pathlib.Path(directory) / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
