import collections
import itertools
import re

import pytest

from orchestra_jax.data.corpus import build_documents
from orchestra_jax.data.questions import EVIDENCE_TOOL, FAMILIES, build_tasks
from orchestra_jax.data.questions.facts import NUM_RESULTS
from orchestra_jax.data.tables import read_countries, read_elements
from orchestra_jax.rewards.outcome import holds_evidence, score_answer
from orchestra_jax.tools.sandbox.python_sandbox import ProgramStatus, PythonSandbox
from orchestra_jax.tools.search.local_search import LocalSearch

NUM_PER_CELL = {"train": 12, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def tasks_by_split():
    return {split: build_tasks(split, num, seed=0) for split, num in NUM_PER_CELL.items()}


@pytest.fixture(scope="module")
def tasks(tasks_by_split):
    return [task for split in tasks_by_split.values() for task in split]


def test_every_cell_has_its_number_and_ids_differ(tasks_by_split, tasks):
    for split, built in tasks_by_split.items():
        counts = collections.Counter((task.family, task.kind) for task in built)
        assert counts == {(family, kind): NUM_PER_CELL[split] for family in FAMILIES for kind in FAMILIES[family]}
    assert len({task.task_id for task in tasks}) == len(tasks)
    assert all(task.evidence_tool == EVIDENCE_TOOL[task.family] for task in tasks)


def test_gold_scores_one_wrong_and_empty_zero(tasks):
    for task in tasks:
        assert score_answer(task, task.answer) == 1.0, task
        assert score_answer(task, task.wrong_answer) == 0.0, task
        assert score_answer(task, "") == 0.0, task


def test_programs_print_the_answer_and_poor_programs_fail_in_the_open(tasks):
    computed = [task for task in tasks if task.evidence_tool == "enhance_reasoning"]
    with PythonSandbox(timeout_s=5.0) as sandbox:
        for task in computed:
            result = sandbox.run(task.program)
            assert (result.status, result.stdout.strip()) == (ProgramStatus.OK, task.answer), task
            assert holds_evidence(task, (), result.stdout)
            poor = sandbox.run(task.poor_program)
            assert poor.status == ProgramStatus.ERROR and re.match(r"\w+Error: ", poor.stderr_line), task
            assert not holds_evidence(task, (), poor.stdout)
    assert not any(task.query or task.gold_document_ids for task in computed)


def test_queries_retrieve_the_gold_and_poor_queries_nothing(tasks):
    search = LocalSearch(build_documents())
    for task in tasks:
        if task.evidence_tool != "search":
            continue
        found = [document.document_id for document, _ in search.search(task.query, NUM_RESULTS)]
        assert holds_evidence(task, found, ""), task
        assert task.poor_query and search.search(task.poor_query, NUM_RESULTS) == [], task
        assert len(set(task.gold_document_ids)) == {"one_hop": 1, "two_hop": 2}[task.kind]
        assert not task.program


def test_the_answer_stands_in_the_last_gold_document(tasks):
    texts = {document.document_id: document.text for document in build_documents()}
    for task in tasks:
        if task.gold_document_ids:
            assert task.answer in texts[task.gold_document_ids[-1]], task


def test_splits_share_no_subject_and_no_question(tasks_by_split):
    for first, second in itertools.combinations(tasks_by_split.values(), 2):
        assert not {task.question for task in first} & {task.question for task in second}
        assert not {task.metadata["subject"] for task in first} & {task.metadata["subject"] for task in second}


def test_splits_stay_disjoint_across_seeds(tasks_by_split):
    train = {task.metadata["subject"] for task in tasks_by_split["train"]}
    other = {task.metadata["subject"] for task in build_tasks("test", 40, seed=3)}
    assert not train & other


def test_same_arguments_same_tasks_other_seed_other_tasks(tasks_by_split):
    assert build_tasks("validation", NUM_PER_CELL["validation"], seed=0) == tasks_by_split["validation"]
    other = build_tasks("validation", NUM_PER_CELL["validation"], seed=1)
    assert {task.question for task in other} != {task.question for task in tasks_by_split["validation"]}


def test_questions_are_short_ascii_and_distinct(tasks):
    for task in tasks:
        assert len(task.question) < 110 and len(task.question.split()) <= 20 and task.question.isascii(), task
    assert len({task.question for task in tasks}) == len(tasks)


def test_the_kind_is_visible_in_the_wording(tasks):
    names = {row.name.casefold() for row in (*read_countries(), *read_elements())}
    for task in tasks:
        # A base's own number ("base-12") says nothing about the size of the operand.
        operands = re.findall(r"\b[0-9a-f]*\d[0-9a-f]*\b", re.sub(r"base[- ]\d+", "", task.question))
        match task.kind:
            case "small":
                assert max(map(len, operands)) <= 3, task
            case "large":
                assert min(map(len, operands)) >= 8, task
            case "one_hop":
                assert task.metadata["subject"].casefold() in task.question.casefold() and "whose" not in task.question
            case "two_hop":
                assert re.search(r"the (country|element) whose ", task.question), task
                assert task.metadata["subject"].casefold() not in task.question.casefold(), task
                assert task.metadata["subject"].casefold() in names


def test_each_cell_has_several_wordings(tasks_by_split):
    for family, kinds in FAMILIES.items():
        for kind in kinds:
            cell = [task.question for task in tasks_by_split["train"] if (task.family, task.kind) == (family, kind)]
            assert len({question.split()[0] for question in cell}) >= 2, (family, kind)


def test_validation_and_test_hold_a_hundred_tasks_a_cell():
    assert len(build_tasks("test", 100, seed=0)) == 800
    assert len(build_tasks("validation", 100, seed=0)) == 800


def test_user_mistakes_are_named():
    with pytest.raises(ValueError, match="'dev'"):
        build_tasks("dev", 1, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build_tasks("train", 0, seed=0)
    with pytest.raises(ValueError, match=r"has \d+ tasks in the split 'test': ask for at most \d+"):
        build_tasks("test", 600, seed=0)
