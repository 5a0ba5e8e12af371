import dataclasses

import pytest

from orchestra_jax.data.records import Task
from orchestra_jax.rewards.outcome import holds_evidence, score_answer

FACT = Task("t", "geography", "two_hop", "What is ...?", "New Delhi", "search", gold_document_ids=("a", "b"))
SUM = Task("s", "arithmetic", "large", "What is 500 + 734?", "1234", "enhance_reasoning", scorer="chain_sum")


@pytest.mark.parametrize("answer", ["New Delhi", "new delhi", "  NEW \n DELHI\t"])
def test_exact_ignores_case_and_white_space(answer):
    assert score_answer(FACT, answer) == 1.0


@pytest.mark.parametrize("answer", ["", " ", "NewDelhi", "Delhi", "New Delhi, India", "It is New Delhi"])
def test_exact_is_no_substring_match(answer):
    assert score_answer(FACT, answer) == 0.0


@pytest.mark.parametrize(("answer", "score"), [("1234", 1.0), (" 1,234.0\n", 1.0), ("+01234", 1.0), ("1235", 0.0)])
def test_the_named_scorer_judges(answer, score):
    assert score_answer(SUM, answer) == score


@pytest.mark.parametrize("answer", ["", "the sum is 1234", "12345", "nan", "\x00", "9" * 10_000])
def test_partial_credit_and_nonsense_score_zero(answer):
    assert score_answer(SUM, answer) == 0.0


def test_an_unknown_scorer_is_named():
    with pytest.raises(ValueError, match="scorer 'chain_sums' is unknown"):
        score_answer(dataclasses.replace(SUM, scorer="chain_sums"), "1")


@pytest.mark.parametrize(
    ("retrieved", "has_evidence"), [((), False), (("a",), False), (("b", "a"), True), (("c", "b", "a"), True)]
)
def test_search_evidence_is_all_gold_documents(retrieved, has_evidence):
    assert holds_evidence(FACT, retrieved, "New Delhi") is has_evidence


@pytest.mark.parametrize(("printed", "has_evidence"), [("1234\n", True), ("", False), ("1230\n", False)])
def test_computed_evidence_is_the_printed_answer(printed, has_evidence):
    assert holds_evidence(SUM, ("a", "b"), printed) is has_evidence
