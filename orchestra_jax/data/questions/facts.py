"""Questions whose evidence is in the corpus: facts about countries and elements.

one_hop names its subject and asks for one attribute: one gold document. two_hop describes the subject by another
attribute, which stands in another document: both are gold. The good query names the subject even then, since a good
writer finds out who is meant; the poor one is made of words that no document holds.
A task whose good query misses a gold document among the first `NUM_RESULTS`, or whose poor query finds any document,
is not built.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from orchestra_jax.data import corpus
from orchestra_jax.data.records import Task
from orchestra_jax.data.tables import Country, Element, read_countries, read_elements
from orchestra_jax.tools.search.local_search import LocalSearch

NUM_RESULTS = 3  # what a query is judged by

POOR_QUERIES = (
    "please find more stuff",
    "need help please",
    "something useful about this topic",
    "answer to my question",
    "look up info",
    "interesting knowledge",
)


@dataclasses.dataclass(frozen=True)
class _Attribute:
    """One attribute of a row: the document that states it, how it is searched, asked, and used to describe its row.

    `wordings` is empty for what is never asked, `clue` for what never describes. `{}` is the subject, or the value.
    """

    part: str
    keywords: str
    wordings: tuple[str, ...]
    clue: str


_COUNTRY = {
    "capital": _Attribute(
        "government",
        "capital",
        ("What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?"),
        "the country whose capital is {}",
    ),
    "alpha3": _Attribute(
        "codes",
        "three-letter ISO code",
        (
            "What is the three-letter ISO code of {}?",
            "Give the three-letter ISO country code of {}.",
            "Which three letters are the ISO code of {}?",
        ),
        "the country whose three-letter ISO code is {}",
    ),
    "numeric_code": _Attribute(
        "codes",
        "ISO numeric code",
        (
            "What is the three-digit ISO numeric code of {}?",
            "Give the ISO numeric code, three digits, of {}.",
            "Which three digits are the ISO numeric code of {}?",
        ),
        "the country whose ISO numeric code is {}",
    ),
    "domain": _Attribute(
        "communications",
        "internet domain",
        (
            "What is the internet domain, dot included, of {}?",
            "Give the internet domain, with its dot, of {}.",
            "Which internet domain, dot included, is that of {}?",
        ),
        "the country whose internet domain is {}",
    ),
    "calling_code": _Attribute(
        "communications",
        "calling code",
        (
            "What is the calling code, digits only, of {}?",
            "Give the international calling code, digits only, of {}.",
            "Which calling code, digits only, is that of {}?",
        ),
        "the country whose calling code is +{}",
    ),
}

_ELEMENT = {
    "symbol": _Attribute(
        "identity",
        "chemical symbol",
        ("What is the chemical symbol of {}?", "Give the chemical symbol of {}.", "Which symbol is that of {}?"),
        "the element whose symbol is {}",
    ),
    "cas_number": _Attribute(
        "identity",
        "CAS registry number",
        (
            "What is the CAS number of {}?",
            "Give the CAS registry number of {}.",
            "Which CAS registry number is that of {}?",
        ),
        "the element whose CAS number is {}",
    ),
    "atomic_number": _Attribute(
        "atom",
        "atomic number protons",
        ("What is the atomic number of {}?", "Give the atomic number of {}.", "How many protons has an atom of {}?"),
        "the element whose atomic number is {}",
    ),
    "period": _Attribute(
        "place",
        "period in the periodic table",
        ("What is the period number of {}?", "Give the period, as a number, of {}.", "Which period is that of {}?"),
        "",
    ),
    "group": _Attribute(
        "place",
        "group in the periodic table",
        (
            "What is the group number, 1 to 18, of {}?",
            "Give the group, from 1 to 18, of {}.",
            "Which group, 1 to 18, is that of {}?",
        ),
        "",
    ),
    "block": _Attribute(
        "place",
        "block of the periodic table",
        (
            "What is the block (s, p, d or f) of {}?",
            "Give the block, one letter, of {}.",
            "Which block, s, p, d or f, is that of {}?",
        ),
        "",
    ),
    "place": _Attribute("place", "period and group in the periodic table", (), "the element whose place is {}"),
}


@dataclasses.dataclass(frozen=True)
class _Fact:
    row: Country | Element
    asked: str
    clue: str  # the attribute that describes the row, or empty where its name does


def generate(family: str, kind: str, tool: str, seed: int, is_ours: Callable[[str], bool]) -> Iterator[Task]:
    """The distinct tasks of one cell whose subject `is_ours`: every fact once, then once more in other words."""
    rows, attributes = _table(family)
    rng = random.Random(f"{family}/{kind}/{seed}")
    facts = [fact for fact in _facts(rows, attributes, kind) if is_ours(fact.row.name)]
    rng.shuffle(facts)
    for turn in range(max(len(attribute.wordings) for attribute in attributes.values())):
        for fact in facts:
            task = _task(family, kind, tool, fact, turn)
            if _is_searchable(task.query, task.gold_document_ids, task.poor_query):
                yield task


def _table(family: str) -> tuple[tuple[Country | Element, ...], dict[str, _Attribute]]:
    return {"geography": (read_countries(), _COUNTRY), "chemistry": (read_elements(), _ELEMENT)}[family]


def _facts(rows: tuple[Country | Element, ...], attributes: dict[str, _Attribute], kind: str) -> Iterator[_Fact]:
    asked = [name for name, attribute in attributes.items() if attribute.wordings]
    if kind == "one_hop":
        yield from (_Fact(row, name, "") for row in rows for name in asked if getattr(row, name))
        return
    clues = [name for name, attribute in attributes.items() if attribute.clue]
    counts = {name: collections.Counter(getattr(row, name) for row in rows) for name in clues}
    for row, clue, name in itertools.product(rows, clues, asked):
        described = getattr(row, clue)
        gives_away = row.name.casefold() in described.casefold() or getattr(row, name) in described.split()
        is_two_documents = attributes[clue].part != attributes[name].part
        if described and getattr(row, name) and counts[clue][described] == 1 and is_two_documents and not gives_away:
            yield _Fact(row, name, clue)


def _task(family: str, kind: str, tool: str, fact: _Fact, turn: int) -> Task:
    rows, attributes = _table(family)
    asked = attributes[fact.asked]
    answer = getattr(fact.row, fact.asked)
    name = fact.row.name if isinstance(fact.row, Country) else fact.row.name.lower()
    number = _stable_number(f"{fact.row.name}/{fact.asked}/{fact.clue}")
    subject, gold, keywords = name, [corpus.document_id(fact.row, asked.part)], asked.keywords
    if fact.clue:
        clue = attributes[fact.clue]
        subject = clue.clue.format(getattr(fact.row, fact.clue))
        gold.insert(0, corpus.document_id(fact.row, clue.part))
        keywords = f"{clue.keywords} and {asked.keywords}"
    question = asked.wordings[(number + turn) % len(asked.wordings)].format(subject)
    others = sorted({getattr(row, fact.asked) for row in rows} - {answer, ""})
    return Task(
        task_id=f"{family}-{kind}-{hashlib.sha256(question.encode()).hexdigest()[:12]}",
        family=family,
        kind=kind,
        question=question,
        answer=answer,
        evidence_tool=tool,
        gold_document_ids=tuple(gold),
        query=f"{name} {keywords}",
        poor_query=POOR_QUERIES[number % len(POOR_QUERIES)],
        wrong_answer=others[number % len(others)],
        metadata={"subject": fact.row.name},
    )


@functools.cache
def _search() -> LocalSearch:
    return LocalSearch(corpus.build_documents())


def _is_searchable(query: str, gold_document_ids: tuple[str, ...], poor_query: str) -> bool:
    found = {document.document_id for document, _ in _search().search(query, NUM_RESULTS)}
    return found.issuperset(gold_document_ids) and not _search().search(poor_query, NUM_RESULTS)


def _stable_number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
