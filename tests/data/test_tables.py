import subprocess
import sys

import pytest

from orchestra_jax.data import tables


def test_country_fields_of_a_known_row():
    france = next(row for row in tables.read_countries() if row.name == "France")
    assert (france.capital, france.alpha3, france.numeric_code) == ("Paris", "FRA", "250")
    assert (france.domain, france.calling_code, france.subregion) == (".fr", "33", "Western Europe")
    assert {"Spain", "Belgium", "Monaco"} <= set(france.neighbours)


def test_element_fields_of_a_known_row():
    iron = next(row for row in tables.read_elements() if row.symbol == "Fe")
    assert (iron.name, iron.atomic_number, iron.period, iron.group, iron.block) == ("Iron", "26", "4", "8", "d")
    assert (iron.cas_number, iron.place) == ("7439-89-6", "period 4, group 8")


def test_place_is_empty_for_the_f_block_and_unique_elsewhere():
    elements = tables.read_elements()
    assert all((element.place == "") == (element.block == "f") for element in elements)
    places = [element.place for element in elements if element.place]
    assert len(set(places)) == len(places)


def test_names_are_plain_and_codes_identify():
    countries, elements = tables.read_countries(), tables.read_elements()
    assert len(countries) > 150 and len(elements) == 118 - len(tables.LEFT_OUT_ELEMENTS)
    for row in (*countries, *elements):
        assert row.name.isascii() and "\n" not in row.name
    for field in ("name", "capital", "alpha3", "numeric_code", "domain"):
        assert len({getattr(row, field) for row in countries}) == len(countries), field
    for field in ("name", "symbol", "cas_number", "atomic_number"):
        assert len({getattr(row, field) for row in elements}) == len(elements), field
    calling_codes = [row.calling_code for row in countries if row.calling_code]
    assert len(set(calling_codes)) == len(calling_codes)


@pytest.mark.parametrize("name", ["Hong Kong", "Swaziland", "Bolivia", "Serbia and Montenegro", "Brazil"])
def test_ambiguous_countries_are_left_out(name):
    assert name not in {row.name for row in tables.read_countries()}  # Brazil: its capital has an accent


@pytest.mark.parametrize("name", ["United Kingdom", "Canada", "Russia", "Jamaica"])
def test_a_shared_calling_code_is_left_empty(name):
    assert next(row for row in tables.read_countries() if row.name == name).calling_code == ""


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mendeleev"):
        tables.read_elements.__wrapped__()


def test_mendeleev_is_not_imported():
    program = (
        "import sys; from orchestra_jax.data import tables; tables.read_elements(); print('mendeleev' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
