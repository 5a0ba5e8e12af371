import json

import pytest

from orchestra_jax.data import corpus
from orchestra_jax.data.tables import read_countries, read_elements


def test_ids_differ_and_every_row_has_several_documents():
    documents = corpus.build_documents()
    assert len({document.document_id for document in documents}) == len(documents)
    ids = [document.document_id for document in documents]
    for row in (*read_countries(), *read_elements()):
        prefix = corpus.document_id(row, "")
        assert sum(identifier.startswith(prefix) for identifier in ids) == (4 if hasattr(row, "capital") else 3)


def test_documents_state_the_facts_of_their_row_and_only_there():
    texts = {document.document_id: document.text for document in corpus.build_documents()}
    for country in read_countries():
        stating = [key for key, text in texts.items() if f"capital of {country.name} is" in text]
        assert stating == [corpus.document_id(country, "government")]
        assert country.capital in texts[stating[0]]
        assert country.domain in texts[corpus.document_id(country, "communications")]
        assert country.numeric_code in texts[corpus.document_id(country, "codes")]
    for element in read_elements():
        assert element.cas_number in texts[corpus.document_id(element, "identity")]
        assert f"period {element.period}" in texts[corpus.document_id(element, "place")]


def test_lists_mention_entities_without_the_asked_facts():
    lists = [document for document in corpus.build_documents() if document.document_id.startswith("list/")]
    assert len(lists) > 40
    numbers = {element.cas_number for element in read_elements()} | {row.domain for row in read_countries()}
    assert not any(number in document.text for document in lists for number in numbers)
    assert any("Iron" in document.text for document in lists)


def test_corpus_is_deterministic_and_ascii():
    corpus.build_documents.cache_clear()
    first = corpus.build_documents()
    corpus.build_documents.cache_clear()
    assert corpus.build_documents() == first
    assert all((document.title + document.text).isascii() for document in first)


def test_load_json_lines(tmp_path):
    path = tmp_path / "notes.jsonl"
    rows = [{"id": "a", "title": "A", "text": "one\u2028line"}, {"id": "b", "title": "", "text": "two", "more": 1}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    loaded = corpus.load_documents(path)
    assert [(row.document_id, row.title, row.text) for row in loaded] == [("a", "A", "one\u2028line"), ("b", "", "two")]


def test_load_folder_of_texts(tmp_path):
    (tmp_path / "second.txt").write_text("two")
    (tmp_path / "first.txt").write_text("one")
    (tmp_path / "other.md").write_text("not read")
    loaded = corpus.load_documents(str(tmp_path))
    assert [(row.document_id, row.title, row.text) for row in loaded] == [
        ("first.txt", "first", "one"),
        ("second.txt", "second", "two"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "title": "t"}', r"line 2: the field 'text'"),
        ('{"id": 7, "title": "t", "text": "x"}', r"line 2: the field 'id' must be a string, got 7"),
        ('{"id": "b", "title": "t", "text": " "}', r"line 2: the field 'text' is empty"),
        ("[1]", r"line 2: want an object"),
        ("{oops", r"line 2: not JSON"),
        ('{"id": "a", "title": "t", "text": "x"}', r"'id' must differ .* 'a'"),
    ],
)
def test_a_broken_file_is_named_with_line_and_field(tmp_path, line, message):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"id": "a", "title": "t", "text": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        corpus.load_documents(path)
    assert str(path) in str(caught.value)


def test_empty_missing_and_undecodable_corpora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no document"):
        corpus.load_documents(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        corpus.load_documents(tmp_path / "nowhere")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bytes.txt is not UTF-8"):
        corpus.load_documents(tmp_path)
    (tmp_path / "bytes.txt").write_text(" \n")
    with pytest.raises(ValueError, match="bytes.txt is empty"):
        corpus.load_documents(tmp_path)
