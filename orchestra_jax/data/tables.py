"""Typed rows about countries and chemical elements, read from two PyPI packages: countryinfo and mendeleev.

Only what does not change with the years is read: no population, no currency, no atomic weight (revised every few
years), no discovery (disputed). Rows that would make a question ambiguous are left out, by rule or by name below.
mendeleev is never imported, its `elements.db` is opened in place: the release that installs beside reasoning-gym does
not load under a current SQLAlchemy.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import sqlite3

# By ISO code and reason. What is no sovereign state would make "the country whose ..." a trap.
LEFT_OUT_COUNTRIES = {
    "a dependency or region of another state": """ABW AIA ALA ASM ATA ATF BES BLM BMU BVT CCK COK CUW CXR CYM ESH FLK
        FRO GGY GIB GLP GRL GUF GUM HKG HMD IMN IOT JEY MAC MAF MNP MSR MTQ MYT NCL NFK NIU PCN PRI PYF REU SGS SHN SJM
        SPM SXM TCA TKL UMI VGB VIR WLF""".split(),
    "dissolved": "ANT SCG".split(),
    "renamed, or its capital moved, since the table was made": "BDI GNQ IDN KAZ MKD SWZ".split(),
    "more than one capital, or a disputed one": "BEN BOL CHL CIV ISR LKA MYS NRU PSE TWN YEM ZAF".split(),
}
# Where the place in the table is disputed: which of these belong to group 3, and to which block.
LEFT_OUT_ELEMENTS = ("La", "Ac", "Lu", "Lr")

_NAME = re.compile(r"[A-Z][A-Za-z -]*")


@dataclasses.dataclass(frozen=True)
class Country:
    """One sovereign state. `calling_code` is digits, or empty where countries share it; `neighbours` may be empty."""

    name: str
    capital: str
    alpha3: str  # ISO 3166-1: three letters
    numeric_code: str  # ISO 3166-1: three digits
    domain: str  # with its dot
    calling_code: str
    region: str
    subregion: str
    neighbours: tuple[str, ...]  # names, of the countries that are kept


@dataclasses.dataclass(frozen=True)
class Element:
    """One chemical element. Numbers are strings: they are answers. `group` is empty for the f block."""

    name: str
    symbol: str
    cas_number: str
    atomic_number: str
    period: str
    group: str
    block: str
    series: str
    electron_configuration: str

    @property
    def place(self) -> str:
        """Its cell of the periodic table, or empty for the f block, whose elements share one."""
        return f"period {self.period}, group {self.group}" if self.group else ""


@functools.cache
def read_countries() -> tuple[Country, ...]:
    """The countries, by name. Raises ValueError where countryinfo is not installed."""
    folder = _package_folder("countryinfo") / "data"
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    left_out = {code for codes in LEFT_OUT_COUNTRIES.values() for code in codes}
    users = {(code, row["ISO"]["alpha3"]) for row in rows for code in row.get("callingCodes") or ()}
    num_users = collections.Counter(code for code, _ in users)
    countries = {}
    for row in rows:
        names = (row.get("name"), row.get("capital"))
        if row["ISO"]["alpha3"] in left_out or not all(_is_name(name) for name in names):
            continue
        countries[row["ISO"]["alpha3"]] = row, _country(row, num_users)
    kept = {code: country.name for code, (_, country) in countries.items()}
    assert len(set(kept.values())) == len(kept), "two countries share a name"
    with_neighbours = (
        dataclasses.replace(country, neighbours=tuple(sorted(kept[code] for code in row["borders"] if code in kept)))
        for row, country in countries.values()
    )
    return tuple(sorted(with_neighbours, key=lambda country: country.name))


@functools.cache
def read_elements() -> tuple[Element, ...]:
    """The elements, by atomic number. Raises ValueError where mendeleev is not installed."""
    path = _package_folder("mendeleev") / "elements.db"
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT elements.name, symbol, cas, atomic_number, period, group_id, block, series.name,"
            " electronic_configuration FROM elements JOIN series ON series_id = series.id ORDER BY atomic_number"
        ).fetchall()
    finally:
        connection.close()
    elements = (Element(*("" if field is None else str(field) for field in row)) for row in rows)
    return tuple(
        element
        for element in elements
        if element.symbol not in LEFT_OUT_ELEMENTS
        and _is_name(element.name)
        and all(getattr(element, field.name) for field in dataclasses.fields(element) if field.name != "group")
    )


def _country(row: dict[str, object], num_users: collections.Counter[str]) -> Country:
    codes = row["callingCodes"]
    # Zones 1 and 7 are each one calling code that several countries share.
    is_own_code = len(codes) == 1 and codes[0].isdigit() and codes[0][0] not in "17" and num_users[codes[0]] == 1
    domains = [domain for domain in row["tld"] if domain.isascii()]
    assert len(domains) == 1, f"{row['name']} has the domains {domains}"
    return Country(
        name=row["name"],
        capital=row["capital"],
        alpha3=row["ISO"]["alpha3"],
        numeric_code=row["ISO"]["numeric"],
        domain=domains[0],
        calling_code=codes[0] if is_own_code else "",
        region=row["region"],
        subregion=row["subregion"],
        neighbours=(),
    )


def _is_name(name: object) -> bool:
    """Plain letters only: an accent or a full stop would make an exact match a matter of spelling."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _package_folder(package: str) -> pathlib.Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"the tasks read their tables from {package}, which is not installed: pip install {package}")
    return pathlib.Path(spec.origin).parent
