"""A city library: members, books, branches; lending, returning, renewing, reserving, fines.

A shipped domain, written by hand. `make_library` draws its database from a seed; tasks are in library_tasks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel

from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import FunctionRefused, make_function

MAX_BOOKS = {"child": 2, "adult": 4}
MAX_RENEWALS = 2
LOAN_DAYS = 21
MAX_FINE_CENTS = 500

POLICY = f"""You work at the desk of a city library. Act only on what the user asks for, and only through the functions.
- A child's card holds at most {MAX_BOOKS["child"]} books at a time, an adult's {MAX_BOOKS["adult"]}.
- Nobody who owes more than {MAX_FINE_CENTS} cents may borrow: the fine is paid first, in full.
- Reference books do not leave the house. A book that is out can be reserved, one that is in cannot.
- A loan is renewed at most {MAX_RENEWALS} times, and not while somebody waits for the book.
- Tell the user what was asked for, in the words of the record."""


class Member(BaseModel):
    member_id: str
    name: str
    email: str
    card: Literal["child", "adult"]
    fine_cents: int
    book_ids: list[str]


class Book(BaseModel):
    book_id: str
    title: str
    author: str
    shelf: str
    branch_id: str
    is_reference: bool
    holder_id: str | None
    due_day: int | None
    num_renewals: int
    waiting_ids: list[str]


class Branch(BaseModel):
    branch_id: str
    name: str
    street: str
    closing_hour: int


class Library(BaseModel):
    members: dict[str, Member]
    books: dict[str, Book]
    branches: dict[str, Branch]


BookId = Annotated[str, "The book's number, such as B12."]
MemberId = Annotated[str, "The member's number, such as M7."]
BranchId = Annotated[str, "The branch's number, such as H2."]


def _book(database, book_id: str) -> Book:
    if book_id not in database.books:
        raise FunctionRefused(f"there is no book {book_id}")
    return database.books[book_id]


def _member(database, member_id: str) -> Member:
    if member_id not in database.members:
        raise FunctionRefused(f"there is no member {member_id}")
    return database.members[member_id]


def find_member(database, name: Annotated[str, "First and last name."]) -> list[str]:
    """The numbers of the members of this name."""
    return [member.member_id for member in database.members.values() if member.name.lower() == name.lower()]


def find_book(database, title: Annotated[str, "The whole title."]) -> list[str]:
    """The numbers of the books of this title."""
    return [book.book_id for book in database.books.values() if book.title.lower() == title.lower()]


def get_member(database, member_id: MemberId) -> Member:
    """The record of a member: card, fine, books."""
    return _member(database, member_id)


def get_book(database, book_id: BookId) -> Book:
    """The record of a book: shelf, branch, who has it, who waits for it."""
    return _book(database, book_id)


def get_branch(database, branch_id: BranchId) -> Branch:
    """The record of a branch: street and closing hour."""
    if branch_id not in database.branches:
        raise FunctionRefused(f"there is no branch {branch_id}")
    return database.branches[branch_id]


def lend(database, book_id: BookId, member_id: MemberId) -> str:
    """Lend a book that is in to a member."""
    book, member = _book(database, book_id), _member(database, member_id)
    if book.is_reference:
        raise FunctionRefused(f"{book_id} is a reference book")
    if book.holder_id is not None:
        raise FunctionRefused(f"{book_id} is out")
    if book.waiting_ids and book.waiting_ids[0] != member_id:
        raise FunctionRefused(f"{book_id} is kept for {book.waiting_ids[0]}")
    if member.fine_cents > MAX_FINE_CENTS:
        raise FunctionRefused(f"{member_id} owes {member.fine_cents} cents")
    if len(member.book_ids) >= MAX_BOOKS[member.card]:
        raise FunctionRefused(f"the card of {member_id} is full")
    book.holder_id, book.due_day, book.num_renewals = member_id, LOAN_DAYS, 0
    book.waiting_ids = [each for each in book.waiting_ids if each != member_id]
    member.book_ids.append(book_id)
    return "lent"


def take_back(database, book_id: BookId) -> str:
    """Take back a book that is out."""
    book = _book(database, book_id)
    if book.holder_id is None:
        raise FunctionRefused(f"{book_id} is in")
    _member(database, book.holder_id).book_ids.remove(book_id)
    book.holder_id, book.due_day, book.num_renewals = None, None, 0
    return "back"


def renew(database, book_id: BookId) -> str:
    """Renew the loan of a book that is out."""
    book = _book(database, book_id)
    if book.holder_id is None:
        raise FunctionRefused(f"{book_id} is in")
    if book.waiting_ids:
        raise FunctionRefused(f"somebody waits for {book_id}")
    if book.num_renewals >= MAX_RENEWALS:
        raise FunctionRefused(f"{book_id} was renewed {book.num_renewals} times")
    book.due_day, book.num_renewals = book.due_day + LOAN_DAYS, book.num_renewals + 1
    return "renewed"


def reserve(database, book_id: BookId, member_id: MemberId) -> str:
    """Reserve a book that is out for a member who does not have it."""
    book, member = _book(database, book_id), _member(database, member_id)
    if book.holder_id is None:
        raise FunctionRefused(f"{book_id} is in")
    if member_id in (book.holder_id, *book.waiting_ids):
        raise FunctionRefused(f"{member.member_id} has {book_id} or waits for it")
    book.waiting_ids.append(member_id)
    return "reserved"


def drop_reservation(database, book_id: BookId, member_id: MemberId) -> str:
    """Take a member off the list of those who wait for a book."""
    book = _book(database, book_id)
    if member_id not in book.waiting_ids:
        raise FunctionRefused(f"{member_id} does not wait for {book_id}")
    book.waiting_ids.remove(member_id)
    return "dropped"


def pay_fine(database, member_id: MemberId, amount_cents: Annotated[int, "At most what is owed."]) -> str:
    """Book a payment towards a member's fine."""
    member = _member(database, member_id)
    if not 0 < amount_cents <= member.fine_cents:
        raise FunctionRefused(f"{member_id} owes {member.fine_cents} cents")
    member.fine_cents -= amount_cents
    return f"{member.fine_cents} cents left"


def move_book(database, book_id: BookId, branch_id: BranchId) -> str:
    """Move a book that is in to another branch."""
    book, branch = _book(database, book_id), get_branch(database, branch_id)
    if book.holder_id is not None:
        raise FunctionRefused(f"{book_id} is out")
    if book.branch_id == branch.branch_id:
        raise FunctionRefused(f"{book_id} is there already")
    book.branch_id = branch.branch_id
    return "moved"


def change_email(database, member_id: MemberId, email: Annotated[str, "The new address."]) -> str:
    """Change a member's e-mail address."""
    member = _member(database, member_id)
    if "@" not in email:
        raise FunctionRefused(f"{email[:40]!r} is no e-mail address")
    member.email = email
    return "changed"


READS = (find_member, find_book, get_member, get_book, get_branch)
WRITES = (lend, take_back, renew, reserve, drop_reservation, pay_fine, move_book, change_email)


def _summary(function) -> Callable[[str], str]:
    """In one word: where a book stands, what a member owes; a write that went well is "done"."""
    if function is get_book:
        return lambda text: json.loads(text)["shelf"]
    if function is get_member:
        return lambda text: f"{json.loads(text)['fine_cents']} cents"
    return (lambda text: "done") if function in WRITES else str


FIRST_NAMES = ("Ada", "Bela", "Chidi", "Dora", "Emre", "Femi", "Greta", "Hana", "Ivo", "Jude", "Kira", "Luis")
LAST_NAMES = ("Adler", "Brandt", "Costa", "Dubois", "Eriksen", "Fischer", "Gomes", "Haddad", "Ito", "Jansen")
TITLE_WORDS = (
    ("Silent", "Broken", "Northern", "Hidden", "Second", "Paper", "Salt", "Winter"),
    ("River", "Garden", "Mirror", "Harbour", "Orchard", "Map", "Station", "Letter"),
)
BRANCHES = (("Old Town", "Mill Street"), ("Riverside", "Quay Road"), ("Hilltop", "Crown Lane"), ("Station", "Rail Row"))


def make_library(
    seed: int, num_members: int = 60, num_books: int = 150, num_branches: int = 4, name: str = "library"
) -> Domain:
    """The domain with a database drawn from `seed`. Numbers of entries begin with 1: B1, M1, H1."""
    rng = np.random.default_rng(seed)
    branches = {
        f"H{k + 1}": Branch(
            branch_id=f"H{k + 1}",
            name=BRANCHES[k % len(BRANCHES)][0],
            street=BRANCHES[k % len(BRANCHES)][1],
            closing_hour=int(rng.integers(16, 23)),
        )
        for k in range(num_branches)
    }
    members = {f"M{k + 1}": _draw_member(rng, f"M{k + 1}") for k in range(num_members)}
    books = {f"B{k + 1}": _draw_book(rng, f"B{k + 1}", list(branches)) for k in range(num_books)}
    for book in books.values():
        if not book.is_reference and rng.random() < 0.5:
            _put_out(rng, book, members)
    functions = [make_function(each, is_write=each in WRITES, summarize=_summary(each)) for each in (*READS, *WRITES)]
    return Domain(name, POLICY, Library(members=members, books=books, branches=branches), functions)


def _draw_member(rng: np.random.Generator, member_id: str) -> Member:
    first, last = (names[int(rng.integers(len(names)))] for names in (FIRST_NAMES, LAST_NAMES))
    fine_cents = int(rng.integers(1, 60)) * 20 if rng.random() < 0.4 else 0
    return Member(
        member_id=member_id,
        name=f"{first} {last}",
        email=f"{first}.{last}.{member_id}@example.org".lower(),
        card="child" if rng.random() < 0.25 else "adult",
        fine_cents=fine_cents,
        book_ids=[],
    )


def _draw_book(rng: np.random.Generator, book_id: str, branch_ids: list[str]) -> Book:
    first, second = (words[int(rng.integers(len(words)))] for words in TITLE_WORDS)
    author = f"{FIRST_NAMES[int(rng.integers(len(FIRST_NAMES)))]} {LAST_NAMES[int(rng.integers(len(LAST_NAMES)))]}"
    return Book(
        book_id=book_id,
        title=f"The {first} {second}",
        author=author,
        shelf=f"S{int(rng.integers(1, 41))}",
        branch_id=branch_ids[int(rng.integers(len(branch_ids)))],
        is_reference=bool(rng.random() < 0.05),
        holder_id=None,
        due_day=None,
        num_renewals=0,
        waiting_ids=[],
    )


def _put_out(rng: np.random.Generator, book: Book, members: dict[str, Member]) -> None:
    """Lends the book to somebody whose card has room, and at times has one other member wait for it."""
    ids = rng.permutation(list(members)).tolist()
    holder = next((members[each] for each in ids if len(members[each].book_ids) < MAX_BOOKS[members[each].card]), None)
    if holder is None:
        return
    holder.book_ids.append(book.book_id)
    book.holder_id, book.due_day = holder.member_id, int(rng.integers(1, LOAN_DAYS))
    book.num_renewals = int(rng.integers(MAX_RENEWALS + 1))
    if rng.random() < 0.3:
        book.waiting_ids.append(next(each for each in ids if each != holder.member_id))
