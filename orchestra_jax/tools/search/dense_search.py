"""Dense search: texts as unit vectors (embedding.py), nearest ones by inner product.

The index is faiss, opened by memory map. "exact" compares with every vector; "lists" keeps vectors of 8 bits in
inverted lists, of which a query looks at some; "auto" is exact up to MAX_EXACT vectors.
    number of lists = 4 sqrt(N) rounded to a power of two;  lists looked at for a query = 128 unless told otherwise
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

KINDS = ("auto", "exact", "lists")
MAX_EXACT = 50_000
NUM_PROBES = 128
TRAINING_VECTORS_PER_LIST = 40


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1; ValueError for a row of zeros or one that is not finite."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    if not (np.isfinite(lengths_N1).all() and (lengths_N1 > 0).all()):
        raise ValueError("an embedding is zero or not finite: look at the texts or at the embedding endpoint")
    return vectors_ND / lengths_N1


def write_dense_index(path: str | os.PathLike, vectors_ND: np.ndarray, kind: str = "auto") -> None:
    """Builds the index over unit vectors (an array or a memory map of it) and writes it. ValueError for no kind."""
    import faiss

    if kind not in KINDS:
        raise ValueError(f"the kind {kind!r} of an index of vectors is not one of {KINDS}")
    num_vectors, num_dims = vectors_ND.shape
    if kind == "exact" or (kind == "auto" and num_vectors <= MAX_EXACT):
        index = faiss.IndexFlatIP(num_dims)
    else:
        num_lists = 2 ** round(np.log2(4 * num_vectors**0.5))
        index = faiss.index_factory(num_dims, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        num_training = min(num_vectors, TRAINING_VECTORS_PER_LIST * num_lists)
        chosen = np.sort(np.random.default_rng(0).choice(num_vectors, num_training, replace=False))
        index.train(np.ascontiguousarray(vectors_ND[chosen]))
    for start in range(0, num_vectors, MAX_EXACT):
        index.add(np.ascontiguousarray(vectors_ND[start : start + MAX_EXACT]))
    faiss.write_index(index, os.fspath(path))


class DenseIndex:
    """An index that `write_dense_index` wrote, opened by memory map.

    `num_probes`: how many lists a query looks at, where there are lists: more find more and take longer.
    ValueError if the index is not there, or for less than one list.
    """

    def __init__(self, path: str | os.PathLike, num_probes: int = NUM_PROBES):
        import faiss

        if num_probes < 1:
            raise ValueError(f"a query has to look at one list or more, got num_probes {num_probes}")
        if not pathlib.Path(path).is_file():
            raise ValueError(f"no dense index at {path}: build one with experiments/build_index.py")
        self._index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = num_probes

    def search(self, vector_D: np.ndarray, num_results: int) -> list[tuple[int, float]]:
        """Numbers of the nearest documents with their inner products, best first. ValueError for other dims."""
        if len(vector_D) != self._index.d:
            raise ValueError(
                f"the query's vector has {len(vector_D)} dims and those of the index have {self._index.d}: "
                "name the embedding model that the index was built with"
            )
        scores_1N, numbers_1N = self._index.search(vector_D[None, :], num_results)
        return [(int(i), float(score)) for i, score in zip(numbers_1N[0], scores_1N[0]) if i >= 0]
