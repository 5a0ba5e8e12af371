"""Recall at 10 of the search index on a labelled set: by words, and by vectors and both with an endpoint.

    pip download --no-deps inspect-evals==0.26.0 && unzip inspect_evals-*.whl 'inspect_evals/tau2/data/*'
    python -m experiments.retrieval_recall --folder=inspect_evals/tau2/data/domains/banking_knowledge \\
        --embedding_endpoint=http://127.0.0.1:8191/v1 --embedding_model=all-MiniLM-L6-v2     # serve_embeddings.py

The set: 698 documents of a bank, 97 tasks with the documents that each needs. A query is the user's own instructions.
recall@10 = mean over tasks of |needed documents among the first 10| / |needed documents|
"""

import gzip
import json
import pathlib
import sys
import tempfile

from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Holds documents.json.gz and tasks.json.", required=True)
_ENDPOINT = flags.DEFINE_string("embedding_endpoint", "", "Base URL of an OpenAI-compatible server; empty: BM25 alone.")
_MODEL = flags.DEFINE_string("embedding_model", "", "The name under which the server knows the model.")
_NUM_RESULTS = flags.DEFINE_integer("num_results", 10, "Where the ranking is cut.")


def main(_):
    from orchestra_jax.data.records import Document
    from orchestra_jax.tools.search.document_index import RANKINGS, DocumentIndex, build_index
    from orchestra_jax.tools.search.embedding import EmbeddingEndpoint

    folder = pathlib.Path(_FOLDER.value)
    with gzip.open(folder / "documents.json.gz") as file:
        documents = [Document(each["id"], each["title"], each["content"]) for each in json.load(file)]
    tasks = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    asked = [(each["user_scenario"]["instructions"], set(each.get("required_documents") or ())) for each in tasks]
    labelled = [(str(query), needed) for query, needed in asked if needed]
    embed = EmbeddingEndpoint(_ENDPOINT.value, _MODEL.value, timeout_s=3600.0).embed if _ENDPOINT.value else None
    with tempfile.TemporaryDirectory() as scratch:
        build_index(pathlib.Path(scratch) / "index", documents, embed)
        for ranking in RANKINGS if embed else RANKINGS[:1]:
            index = DocumentIndex(pathlib.Path(scratch) / "index", ranking, embed)
            shares = [recall(index.search(query, _NUM_RESULTS.value), needed) for query, needed in labelled]
            print(f"{ranking}: recall@{_NUM_RESULTS.value} {sum(shares) / len(shares):.3f} over {len(shares)} tasks")
    sys.stdout.flush()


def recall(found, needed) -> float:
    return len({document.document_id for document, _ in found} & needed) / len(needed)


if __name__ == "__main__":
    app.run(main)
