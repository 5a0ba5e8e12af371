"""Builds a search index on disk from a corpus, with vectors if an embedding endpoint is named.

    python -m experiments.build_index --corpus=docs.jsonl --index=indexes/docs
    python -m experiments.build_index --corpus=docs.jsonl --index=indexes/docs \\
        --embedding_endpoint=http://127.0.0.1:30000/v1 --embedding_model=Qwen/Qwen3-Embedding-8B

The corpus is a file of JSON lines {"id", "title", "text"} or a folder of .txt files. `--config.tools.index_directory`
opens the index.
"""

import sys

from absl import app, flags

TIMEOUT_S = 3600.0  # of a batch: a small server may be slow
_CORPUS = flags.DEFINE_string("corpus", None, "JSON lines, or a folder of .txt files.", required=True)
_INDEX = flags.DEFINE_string("index", None, "A new directory for the index.", required=True)
_ENDPOINT = flags.DEFINE_string("embedding_endpoint", "", "Base URL of an OpenAI-compatible server; empty: no vectors.")
_MODEL = flags.DEFINE_string("embedding_model", "", "The name under which the server knows the model.")
_PRICE = flags.DEFINE_float("embedding_usd_per_million_tokens", None, "What embedding costs; wanted with a key.")
_CAP = flags.DEFINE_float("embedding_cap_usd", 0.0, "Real money that embedding the corpus may cost.")
_KIND = flags.DEFINE_enum("vector_index", "auto", ["auto", "exact", "lists"], "Of the vectors: see dense_search.py.")
_KEY = flags.DEFINE_string("api_key_variable", "", "The environment variable that holds the key, if one is wanted.")


def main(_):
    from orchestra_jax.data.corpus import load_documents
    from orchestra_jax.tools.budget import Account
    from orchestra_jax.tools.search.document_index import build_index
    from orchestra_jax.tools.search.embedding import EmbeddingEndpoint

    try:
        embed = None
        if _ENDPOINT.value:
            if _KEY.value and _PRICE.value is None:
                raise ValueError(
                    "an endpoint with a key says its price: give --embedding_usd_per_million_tokens (0: it is free)"
                )
            embed = EmbeddingEndpoint(
                _ENDPOINT.value, _MODEL.value, _KEY.value, timeout_s=TIMEOUT_S,
                usd_per_million_tokens=_PRICE.value or 0.0, account=Account(_CAP.value),
            ).embed  # fmt: skip
        num_documents = build_index(_INDEX.value, load_documents(_CORPUS.value), embed, _KIND.value)
    except ValueError as error:
        print(f"build_index: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{num_documents} documents in {_INDEX.value}")


if __name__ == "__main__":
    app.run(main)
