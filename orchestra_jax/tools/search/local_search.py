"""Keyword search over documents that are held in memory: BM25 (Lucene's variant) through bm25s.

score(query, document) = sum over the query's words w of
    log(1 + (N - n_w + 0.5) / (n_w + 0.5)) * f_w / (f_w + k1 * (1 - b + b * length / mean_length)),   k1 = 1.5, b = 0.75
with n_w the documents that hold w and f_w how often this one does. Source: Kamphuis et al. 2020, "Which BM25 do you
mean?"; Lu 2024, "BM25S". A document without any of the query's words scores 0 and is never returned.

It is no dense retriever: it knows words, not meanings, and it does not stem.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
import types
from collections.abc import Sequence

import numpy as np

from orchestra_jax.data.records import Document

MAX_CACHED_QUERIES = 16_384

_WORD = re.compile(r"\w+")
# Lucene's English list, and the question words: a query that holds nothing else asks for nothing.
_STOPWORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this"
    " to was will with what which who whose where when how does do did has have its".split()
)


def split_words(text: str) -> list[str]:
    """The words of a text as the index knows them: case-folded, without stop words."""
    return [word for word in _WORD.findall(text.casefold()) if word not in _STOPWORDS]


class LocalSearch:
    """An index over `documents`: title and text are searched together. Deterministic; ties go to the earlier document.

    Raises ValueError when there is no document, or two have the same id.
    """

    asks_outside = False

    def __init__(self, documents: Sequence[Document]):
        if not documents:
            raise ValueError("LocalSearch needs at least one document, got none")
        ids = [document.document_id for document in documents]
        if len(set(ids)) < len(ids):
            repeated = next(each for each in ids if ids.count(each) > 1)
            raise ValueError(f"document ids must differ, but {repeated!r} occurs {ids.count(repeated)} times")
        self._documents = tuple(documents)
        self._index = load_bm25s().BM25(method="lucene", k1=1.5, b=0.75)
        texts = [split_words(f"{document.title} {document.text}") for document in documents]
        self._index.index(texts, show_progress=False)
        self._scores = functools.lru_cache(MAX_CACHED_QUERIES)(self._score)

    def search(self, query: str, num_results: int) -> list[tuple[Document, float]]:
        """Up to `num_results` documents with a score above 0, best first. An empty list says: no word matches."""
        if num_results < 1:
            raise ValueError(f"num_results must be at least 1, got {num_results}")
        return list(self._scores(query, num_results))

    def query_cost_usd(self, query: str) -> float:
        return 0.0

    def _score(self, query: str, num_results: int) -> tuple[tuple[Document, float], ...]:
        words = [word for word in split_words(query) if word in self._index.vocab_dict]
        if not words:
            return ()
        scores_N = self._index.get_scores(words)
        best = np.argsort(-scores_N, kind="stable")[:num_results]
        return tuple((self._documents[i], float(scores_N[i])) for i in best if scores_N[i] > 0)


@functools.cache
def load_bm25s() -> types.ModuleType:
    """bm25s without its jax backend.

    Where jax is installed, importing bm25s runs a jax operation, which starts the accelerator (and takes its memory) in
    a process that only wants to search. A `None` in `sys.modules` is the interpreter's own way to say "not available".
    """
    jax = sys.modules.get("jax")
    sys.modules["jax"] = None
    try:
        module = importlib.import_module("bm25s")
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index
        return module
    finally:
        del sys.modules["jax"]
        if jax is not None:
            sys.modules["jax"] = jax
