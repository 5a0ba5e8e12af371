"""The index on disk: the in-memory ranking by words, exact vectors, fusion by hand; opened again by memory map."""

import numpy as np
import pytest

from orchestra_jax.data.corpus import build_documents
from orchestra_jax.data.records import Document
from orchestra_jax.tools.search import dense_search
from orchestra_jax.tools.search.dense_search import DenseIndex, unit, write_dense_index
from orchestra_jax.tools.search.document_index import DocumentIndex, build_index
from orchestra_jax.tools.search.local_search import LocalSearch

DOCUMENTS = (
    Document("a", "Cats", "cats purr"),
    Document("b", "Dogs", "dogs bark at cats"),
    Document("c", "Łódź", "a city\nof two lines"),
)
TOPICS = ("cat", "dog", "city")


def embed(texts):
    """One dimension a topic, so that nearness can be told by hand."""
    return unit(np.array([[text.lower().count(topic) + 1e-3 for topic in TOPICS] for text in texts], np.float32))


@pytest.fixture
def directory(tmp_path):
    assert build_index(tmp_path / "index", iter(DOCUMENTS), embed) == 3
    return tmp_path / "index"


def ids(found):
    return [document.document_id for document, _ in found]


def test_by_words_it_ranks_as_the_index_in_memory(tmp_path):
    documents = build_documents()
    build_index(tmp_path / "index", documents)
    index, memory = DocumentIndex(tmp_path / "index"), LocalSearch(documents)
    assert index.num_documents == len(documents)
    for query in ("capital of France", "atomic number of gold", "w zebra", "", "the"):
        for (document, score), (expected, expected_score) in zip(index.search(query, 7), memory.search(query, 7)):
            assert document == expected and score == pytest.approx(expected_score, rel=1e-6)
        assert len(index.search(query, 7)) == len(memory.search(query, 7))


def test_documents_come_back_whole(directory):
    ((document, score),) = DocumentIndex(directory).search("łódź", 2)
    assert document == DOCUMENTS[2] and score > 0


def test_by_vectors_the_nearest_comes_first(directory):
    found = DocumentIndex(directory, "dense", embed).search("dog city", 3)
    # The query is (0, 1, 1) / sqrt(2); c is (0, 0, 1), and b, of one cat and two dogs, (1, 2, 0) / sqrt(5).
    assert ids(found) == ["c", "b", "a"]
    assert [score for _, score in found[:2]] == pytest.approx([1 / np.sqrt(2), 2 / np.sqrt(10)], abs=2e-3)


def test_fusion_adds_reciprocal_ranks(directory):
    found = DocumentIndex(directory, "fused", embed).search("cats city", 3)
    words = ids(DocumentIndex(directory, "bm25").search("cats city", 3))
    dense = ids(DocumentIndex(directory, "dense", embed).search("cats city", 3))
    for document, score in found:
        name = document.document_id
        expected = 1 / (61 + dense.index(name)) + (1 / (61 + words.index(name)) if name in words else 0)
        assert score == pytest.approx(expected)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_many_vectors_are_kept_in_lists_and_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_search, "MAX_EXACT", 1_000)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 16), np.float32)
    vectors = unit(centres[rng.integers(50, size=6_000)] + 0.3 * rng.standard_normal((6_000, 16), np.float32))
    write_dense_index(tmp_path / "dense.faiss", vectors)
    index = DenseIndex(tmp_path / "dense.faiss")
    exact = np.argsort(-(vectors @ vectors[:20].T), axis=0)[:10].T

    def recall(index):
        return np.mean([len({i for i, _ in index.search(vectors[n], 10)} & set(exact[n])) / 10 for n in range(20)])

    assert recall(index) > 0.9 > recall(DenseIndex(tmp_path / "dense.faiss", num_probes=1))
    write_dense_index(tmp_path / "exact.faiss", vectors, "exact")
    assert recall(DenseIndex(tmp_path / "exact.faiss")) == 1.0
    assert (tmp_path / "exact.faiss").stat().st_size > 2 * (tmp_path / "dense.faiss").stat().st_size


def test_mistakes_are_named(tmp_path, directory):
    with pytest.raises(ValueError, match="is not empty"):
        build_index(directory, DOCUMENTS)
    with pytest.raises(ValueError, match="no document to index"):
        build_index(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="no whole index at"):
        DocumentIndex(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'words' is not one of"):
        DocumentIndex(directory, "words")
    with pytest.raises(ValueError, match="'dense' needs an index with vectors .* has some.* embedding endpoint"):
        DocumentIndex(directory, "dense")
    build_index(tmp_path / "words", DOCUMENTS)
    with pytest.raises(ValueError, match="has none"):
        DocumentIndex(tmp_path / "words", "fused", embed)
    with pytest.raises(ValueError, match="the kind 'tree' .* is not one of"):
        build_index(tmp_path / "tree", DOCUMENTS, embed, "tree")
    with pytest.raises(ValueError, match="num_probes 0"):
        DocumentIndex(directory, "dense", embed, num_probes=0)
    with pytest.raises(ValueError, match="zero or not finite"):
        unit(np.zeros((1, 3), np.float32))
