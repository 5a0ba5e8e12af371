"""The search corpus: facts about countries and elements, in sentences of our own, or a user's own documents.

Each country and each element has several documents, and each document several facts, so that a question about one
attribute by way of another needs two of them (see `questions/facts.py`). Lists (by subregion, region, series, first
letter) and neighbours mention the same names without the facts that are asked for: they are what a poor query finds.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

from orchestra_jax.data.records import Document
from orchestra_jax.data.tables import Country, Element, read_countries, read_elements

Row = Country | Element


def document_id(row: Row, part: str) -> str:
    """The id of one of a row's documents. The parts are those of `_country_documents` and `_element_documents`."""
    if isinstance(row, Country):
        return f"country/{row.alpha3.lower()}/{part}"
    return f"element/{row.symbol.lower()}/{part}"


@functools.cache
def build_documents() -> tuple[Document, ...]:
    """The whole corpus of our own, the same on every machine that has the same tables."""
    documents = [document for country in read_countries() for document in _country_documents(country)]
    documents += [document for element in read_elements() for document in _element_documents(element)]
    documents += _lists()
    return tuple(documents)


def load_documents(path: str | pathlib.Path) -> tuple[Document, ...]:
    """A user's own corpus: a file of JSON lines {"id", "title", "text"}, or a folder of .txt files.

    A text file's id is its name, its title the name without the suffix. Raises ValueError with file, line and field.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        documents = [Document(file.name, file.stem, _read_text(file)) for file in files]
        for document in documents:
            if not document.text.strip():
                raise ValueError(f"{path / document.document_id} is empty: delete it or give it a text")
    elif path.is_file():
        lines = enumerate(
            _read_text(path).split("\n"), start=1
        )  # JSON allows the other line separators inside a string
        documents = [_parse_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    else:
        raise ValueError(f"the corpus {path} does not exist: name a file of JSON lines or a folder of .txt files")
    if not documents:
        raise ValueError(f"the corpus {path} holds no document")
    _check_ids(documents, path)
    return tuple(documents)


def _country_documents(country: Country) -> Iterator[Document]:
    name = country.name
    yield Document(
        document_id(country, "government"),
        f"Government of {name}",
        f"The capital of {name} is {country.capital}. The national government sits in {country.capital}, and foreign"
        f" embassies to {name} are found there.",
    )
    yield Document(
        document_id(country, "codes"),
        f"ISO country codes of {name}",
        f"In the ISO 3166 standard {name} has the three-letter ISO code {country.alpha3} and the ISO numeric code"
        f" {country.numeric_code}.",
    )
    calling = (
        f" Calls from abroad reach {name} by the calling code +{country.calling_code}." if country.calling_code else ""
    )
    yield Document(
        document_id(country, "communications"),
        f"Communications of {name}",
        f"The internet domain of {name} is {country.domain}.{calling}",
    )
    neighbours = f" Its land neighbours include {', '.join(country.neighbours)}." if country.neighbours else ""
    yield Document(
        document_id(country, "location"),
        f"Location of {name}",
        f"{name} lies in {country.subregion}, a part of the region {country.region}.{neighbours}",
    )


def _element_documents(element: Element) -> Iterator[Document]:
    name = element.name
    group = f"in group {element.group} and " if element.group else ""
    yield Document(
        document_id(element, "identity"),
        f"{name}: symbol and registry",
        f"The chemical symbol of {name.lower()} is {element.symbol}. Its CAS registry number is {element.cas_number}."
        f" {name} is counted among the {element.series.lower()}.",
    )
    yield Document(
        document_id(element, "atom"),
        f"{name}: the atom",
        f"The atomic number of {name.lower()} is {element.atomic_number}: an atom of {name.lower()} has"
        f" {element.atomic_number} protons. Its electron configuration is {element.electron_configuration}.",
    )
    yield Document(
        document_id(element, "place"),
        f"{name}: place in the periodic table",
        f"In the periodic table {name.lower()} stands in period {element.period}, {group}in the {element.block} block.",
    )


def _lists() -> Iterator[Document]:
    countries, elements = read_countries(), read_elements()
    yield from _grouped("Countries of the subregion", countries, lambda row: row.subregion)
    yield from _grouped("Countries of the region", countries, lambda row: row.region)
    yield from _grouped("Country names with the initial", countries, lambda row: row.name[0])
    yield from _grouped("Chemical series", elements, lambda row: row.series)
    yield from _grouped("Element names with the initial", elements, lambda row: row.name[0])


def _grouped(title: str, rows: Iterable[Row], key: Callable[[Row], str]) -> Iterator[Document]:
    names = collections.defaultdict(list)
    for row in rows:
        names[key(row)].append(row.name)
    for value, members in sorted(names.items()):
        identifier = f"list/{title}/{value}".lower().replace(" ", "-")
        yield Document(identifier, f"{title} {value}", f"To this list belong: {', '.join(members)}.")


def _parse_line(line: str, where: str) -> Document:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: want an object with id, title and text, got {line[:80]!r}")
    for name in ("id", "title", "text"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{where}: the field {name!r} must be a string, got {fields.get(name)!r}")
    for name in ("id", "text"):
        if not fields[name].strip():
            raise ValueError(f"{where}: the field {name!r} is empty")
    return Document(fields["id"], fields["title"], fields["text"])


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _check_ids(documents: Iterable[Document], path: pathlib.Path) -> None:
    counts = collections.Counter(document.document_id for document in documents)
    repeated = sorted(identifier for identifier, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"{path}: the field 'id' must differ between documents, but {repeated[0]!r} occurs twice")
