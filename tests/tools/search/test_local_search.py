import subprocess
import sys

import numpy as np
import pytest

from orchestra_jax.data.records import Document
from orchestra_jax.tools.search.local_search import LocalSearch

DOCUMENTS = (
    Document("a", "Cats", "cats purr"),
    Document("b", "Dogs", "dogs bark at cats"),
    Document("c", "Fish", "fish swim"),
)


def test_scores_are_those_of_the_formula():
    # "cats": in 2 of 3 documents, twice in "a" (3 words) and once in "b" (4 words; "at" is a stop word); mean 10 / 3.
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    score_a = idf * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / (10 / 3)))
    score_b = idf * 1 / (1 + 1.5 * (0.25 + 0.75 * 4 / (10 / 3)))
    found = LocalSearch(DOCUMENTS).search("cats", 3)
    assert [document.document_id for document, _ in found] == ["a", "b"]
    np.testing.assert_allclose([score for _, score in found], [score_a, score_b], rtol=1e-5)


def test_only_positive_scores_and_at_most_num_results():
    search = LocalSearch(DOCUMENTS)
    assert [document.document_id for document, _ in search.search("Fish!", 2)] == ["c"]
    assert len(search.search("cats dogs fish", 2)) == 2


@pytest.mark.parametrize("query", ["", "   ", "zebra", "what is the", "?!"])
def test_a_query_without_a_known_word_finds_nothing(query):
    assert LocalSearch(DOCUMENTS).search(query, 3) == []


def test_ties_go_to_the_earlier_document_and_the_result_is_the_callers_own():
    search = LocalSearch([Document(str(index), "same", "text") for index in range(5)])
    first = search.search("text", 3)
    assert [document.document_id for document, _ in first] == ["0", "1", "2"]
    first.clear()
    assert len(search.search("text", 3)) == 3


def test_words_of_other_scripts_are_searchable():
    search = LocalSearch([*DOCUMENTS, Document("d", "Łódź", "miasto w Polsce")])
    assert search.search("łódź", 1)[0][0].document_id == "d"


def test_indexing_and_searching_are_silent(capfd):
    LocalSearch(DOCUMENTS).search("cats", 1)
    assert capfd.readouterr() == ("", "")


def test_user_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one document"):
        LocalSearch([])
    with pytest.raises(ValueError, match="'a' occurs 2 times"):
        LocalSearch([*DOCUMENTS, DOCUMENTS[0]])
    with pytest.raises(ValueError, match="got 0"):
        LocalSearch(DOCUMENTS).search("cats", 0)


def test_search_does_not_load_jax():
    program = (
        "import sys\n"
        "from orchestra_jax.data.records import Document\n"
        "from orchestra_jax.tools.search.local_search import LocalSearch\n"
        "LocalSearch([Document('a', 'cats', 'purr')]).search('cats', 1)\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
