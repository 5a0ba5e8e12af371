"""A search index on disk, opened by memory map: a million documents cost a process next to nothing to hold.

    <directory>/documents.jsonl, offsets.npy   the documents, one JSON a line, and where each line begins
    <directory>/bm25/                          scores by word, written by bm25s (the formula is local_search.py's)
    <directory>/dense.faiss                    vectors, where an embedding endpoint was given (dense_search.py)
    <directory>/index.json                     what it holds

`search` ranks by "bm25", by "dense", or by "fused": reciprocal ranks of both added up (Cormack et al. 2009),
    score(document) = sum over the two rankings of 1 / (60 + rank),   each ranking cut behind 100.
"""

from __future__ import annotations

import json
import mmap
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from orchestra_jax.data.records import Document
from orchestra_jax.tools.search.dense_search import KINDS, NUM_PROBES, DenseIndex, write_dense_index
from orchestra_jax.tools.search.embedding import Embed, most_cost_usd
from orchestra_jax.tools.search.local_search import load_bm25s, split_words

RANKINGS = ("bm25", "dense", "fused")
FUSION_OFFSET = 60
FUSION_DEPTH = 100
EMBEDDING_BATCH = 1_024


def build_index(
    directory: str | os.PathLike, documents: Iterable[Document], embed: Embed | None = None, kind: str = "auto"
) -> int:
    """Writes the index of `documents`, which may be a stream; returns how many there were.

    Memory: 4 bytes for each word of the corpus, and the vectors of one batch. `kind`: of the index of vectors, one of
    `dense_search.KINDS`.

    Raises:
      ValueError: no document, an unknown kind, or a directory that holds something already.
    """
    directory = pathlib.Path(directory)
    if kind not in KINDS:
        raise ValueError(f"the kind {kind!r} of an index of vectors is not one of {KINDS}")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: choose a new directory for the index")
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary: dict[str, int] = {}
    words, offsets = [], [0]
    with open(directory / "documents.jsonl", "wb") as file:
        for document in documents:
            fields = {"id": document.document_id, "title": document.title, "text": document.text}
            line = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
            offsets.append(offsets[-1] + file.write(line + b"\n"))
            ids = [vocabulary.setdefault(word, len(vocabulary)) for word in split_words(_searched(document))]
            words.append(np.array(ids, np.int32))
    if not words:
        raise ValueError("there is no document to index")
    np.save(directory / "offsets.npy", np.array(offsets, np.int64))
    _write_bm25(directory / "bm25", words, vocabulary)
    if embed is not None:
        _write_vectors(directory, len(words), embed, kind)
    about = {"num_documents": len(words), "num_words": len(vocabulary), "has_vectors": embed is not None}
    (directory / "index.json").write_text(json.dumps(about))  # last: an index without it is not whole
    return len(words)


def _searched(document: Document) -> str:
    return f"{document.title} {document.text}"


def _write_bm25(path: pathlib.Path, words: list[np.ndarray], vocabulary: dict[str, int]) -> None:
    index = load_bm25s().BM25(method="lucene", k1=1.5, b=0.75)
    index.index((words, vocabulary or {"": 0}), show_progress=False)
    index.save(path, show_progress=False)


def _write_vectors(directory: pathlib.Path, num_documents: int, embed: Embed, kind: str) -> None:
    """By way of a file of all vectors, which is removed: they need not fit into memory."""
    documents, path = _Documents(directory), directory / "vectors.npy"
    vectors_ND = None
    for start in range(0, num_documents, EMBEDDING_BATCH):
        numbers = range(start, min(start + EMBEDDING_BATCH, num_documents))
        batch_ND = embed([_searched(documents[number]) for number in numbers])
        if vectors_ND is None:
            vectors_ND = np.lib.format.open_memmap(path, "w+", np.float32, (num_documents, batch_ND.shape[1]))
        vectors_ND[start : start + len(batch_ND)] = batch_ND
    write_dense_index(directory / "dense.faiss", vectors_ND, kind)
    path.unlink()


class _Documents:
    """The documents of an index by number."""

    def __init__(self, directory: pathlib.Path):
        self._offsets = np.load(directory / "offsets.npy", mmap_mode="r")
        with open(directory / "documents.jsonl", "rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, number: int) -> Document:
        fields = json.loads(self._text[self._offsets[number] : self._offsets[number + 1]])
        return Document(fields["id"], fields["title"], fields["text"])


class DocumentIndex:
    """An index that `build_index` wrote.

    Args:
      directory: its place.
      ranking: one of RANKINGS.
      embed: queries to unit vectors by the model of the documents; wanted by all rankings but "bm25".
      usd_per_million_tokens: what embedding a query is charged.
      num_probes: of a large index of vectors, see `DenseIndex`.

    Raises:
      ValueError: no index there, an unknown ranking, or one that the index or the arguments do not allow.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        ranking: str = "bm25",
        embed: Embed | None = None,
        usd_per_million_tokens: float = 0.0,
        num_probes: int = NUM_PROBES,
    ):
        directory = pathlib.Path(directory)
        if ranking not in RANKINGS:
            raise ValueError(f"ranking {ranking!r} is not one of {RANKINGS}")
        if not (directory / "index.json").is_file():
            raise ValueError(f"no whole index at {directory}: build one with experiments/build_index.py")
        about = json.loads((directory / "index.json").read_text())
        if ranking != "bm25" and not (about["has_vectors"] and embed):
            raise ValueError(
                f"ranking {ranking!r} needs an index with vectors ({directory} has "
                f"{'some' if about['has_vectors'] else 'none'}) and an embedding endpoint for the queries"
            )
        self._ranking, self._embed = ranking, embed
        self._documents = _Documents(directory)
        self._bm25 = load_bm25s().BM25.load(directory / "bm25", mmap=True) if ranking != "dense" else None
        self._dense = DenseIndex(directory / "dense.faiss", num_probes) if ranking != "bm25" else None
        self.num_documents = about["num_documents"]
        self.asks_outside = ranking != "bm25"
        self._price = usd_per_million_tokens if self.asks_outside else 0.0

    def query_cost_usd(self, query: str) -> float:
        """What a search is charged: the most that embedding the query can cost."""
        return most_cost_usd([query], self._price)

    def search(self, query: str, num_results: int) -> list[tuple[Document, float]]:
        """Up to `num_results` documents, best first, with the ranking's own scores. Embedding the query may fail."""
        if num_results < 1:
            raise ValueError(f"num_results must be at least 1, got {num_results}")
        return [(self._documents[number], score) for number, score in self.rank(query, num_results)]

    def rank(self, query: str, num_results: int) -> list[tuple[int, float]]:
        """The same by the documents' numbers."""
        if self._ranking == "bm25":
            return self._rank_by_words(query, num_results)
        if self._ranking == "dense":
            return self._dense.search(self._embed([query])[0], num_results)
        scores: dict[int, float] = {}
        rankings = self._rank_by_words(query, FUSION_DEPTH), self._dense.search(self._embed([query])[0], FUSION_DEPTH)
        for ranking in rankings:
            for rank, (number, _) in enumerate(ranking, start=1):
                scores[number] = scores.get(number, 0.0) + 1 / (FUSION_OFFSET + rank)
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:num_results]

    def _rank_by_words(self, query: str, num_results: int) -> list[tuple[int, float]]:
        words = [word for word in split_words(query) if word in self._bm25.vocab_dict]
        if not words:
            return []
        scores_N = self._bm25.get_scores(words)
        num_results = min(num_results, len(scores_N))
        # The cut is found without sorting; among equals the earlier document stands first, as in local_search.py.
        least = np.partition(scores_N, len(scores_N) - num_results)[len(scores_N) - num_results]
        numbers = np.flatnonzero(scores_N >= max(least, np.finfo(np.float32).tiny))
        best = numbers[np.argsort(-scores_N[numbers], kind="stable")][:num_results]
        return [(int(number), float(scores_N[number])) for number in best]
