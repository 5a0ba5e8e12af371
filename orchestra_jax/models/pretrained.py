"""A model by where its weights lie: a directory of Hugging Face, or a GGUF file. Formats: huggingface.py, gguf_file.py.

What is read before anything is trained (shape, vocabulary) is headers alone.
"""

from __future__ import annotations

import pathlib
import tempfile

from jax.sharding import Mesh
from tokenizers import Tokenizer

from orchestra_jax.models import gguf_file, huggingface, huggingface_config
from orchestra_jax.models.config import ModelConfig

NUM_SHOWN = 3  # tokens in an error message


def read_model(path: str) -> ModelConfig:
    """The shape of the model at `path`; ValueError for what is not there or not supported."""
    if pathlib.Path(path).is_file():
        return gguf_file.open_file(path).config
    return huggingface_config.read_config(path)


def load_params(path: str, mesh: Mesh | None):
    """The weights in the dtype that they are stored in, on the first device or on the shards of `mesh`.

    A GGUF file is written out as a directory first, beside other temporary files. ValueError as `load_pretrained` and
    `gguf_file.convert`.
    """
    if not pathlib.Path(path).is_file():
        return huggingface.load_pretrained(path, mesh)[1]
    with tempfile.TemporaryDirectory() as directory:
        gguf_file.convert(path, directory)
        return huggingface.load_pretrained(directory, mesh)[1]


def read_vocabulary(path: str) -> dict[str, int]:
    """Ids by spelling of the tokenizer that stands beside the weights; empty if there is none."""
    if pathlib.Path(path).is_file():
        fields = gguf_file.open_file(path).fields
        tokens = enumerate(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
        # Rows of the embedding that no token has are spelled too.
        return {spelling: token for token, (spelling, kind) in tokens if kind != gguf_file.UNUSED}
    file = pathlib.Path(path) / "tokenizer.json"
    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) if file.is_file() else {}


def check_tokenizer(path: str, vocab_size: int, tokenizer: Tokenizer) -> None:
    """ValueError unless `tokenizer` has an id within the embedding for each of its tokens, and those that the weights
    were trained with: it may know more tokens (control tokens on rows that are free), but none under another id."""
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    if num_tokens > vocab_size:
        raise ValueError(
            f"prompt.tokenizer_directory has {num_tokens} tokens and {path} an embedding of {vocab_size} rows: take "
            "the tokenizer that belongs to the weights"
        )
    theirs = read_vocabulary(path)
    other = {spelling: (token, tokenizer.token_to_id(spelling)) for spelling, token in theirs.items()}
    other = [f"{spelling!r} ({own} there, {here} here)" for spelling, (own, here) in other.items() if own != here]
    if other:
        raise ValueError(
            f"prompt.tokenizer_directory is not the tokenizer of {path}: {len(other)} tokens have other ids, such as "
            f"{', '.join(other[:NUM_SHOWN])}; set it to the directory of that model's tokenizer.json"
        )
