"""What people want at the desk of the library: the wishes that its tasks are put together from."""

from __future__ import annotations

from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.domains.library import MAX_BOOKS, MAX_FINE_CENTS, MAX_RENEWALS, Book, Member
from orchestra_jax.environments.functions.domains.wish import Draw, NothingFits, Wish, generate_tasks, gold
from orchestra_jax.environments.functions.task import FunctionTask


def _is_in(book: Book) -> bool:
    return book.holder_id is None and not book.is_reference and not book.waiting_ids


def _is_out(book: Book) -> bool:
    return book.holder_id is not None


def _has_room(member: Member) -> bool:
    return len(member.book_ids) < MAX_BOOKS[member.card]


def _may_borrow(member: Member) -> bool:
    return member.fine_cents <= MAX_FINE_CENTS and _has_room(member)


def want_book(draw: Draw) -> Wish:
    """Lend it, or reserve it where it is out: the policy has to look or to try."""
    book = draw.take("books", lambda each: _is_in(each) or (_is_out(each) and not each.waiting_ids))
    member = draw.take("members", lambda each: _may_borrow(each) and each.member_id != book.holder_id)
    name = "lend" if book.holder_id is None else "reserve"
    return Wish(
        f"Lend book {book.book_id} to member {member.member_id}; if it is out, reserve it for them.",
        f"want {book.book_id} {member.member_id}",
        (gold(name, book_id=book.book_id, member_id=member.member_id),),
    )


def lend_book(draw: Draw) -> Wish:
    book, member = draw.take("books", _is_in), draw.take("members", _may_borrow)
    return Wish(
        f"Member {member.member_id} takes book {book.book_id} along.",
        f"lend {book.book_id} {member.member_id}",
        (gold("lend", book_id=book.book_id, member_id=member.member_id),),
    )


def bring_back(draw: Draw) -> Wish:
    book = draw.take("books", _is_out)
    draw.take_this("members", book.holder_id)
    return Wish(
        f"Book {book.book_id} is brought back.", f"return {book.book_id}", (gold("take_back", book_id=book.book_id),)
    )


def extend_loan(draw: Draw) -> Wish:
    book = draw.take("books", lambda each: _is_out(each) and not each.waiting_ids and each.num_renewals < MAX_RENEWALS)
    return Wish(
        f"The loan of book {book.book_id} should be extended.",
        f"renew {book.book_id}",
        (gold("renew", book_id=book.book_id),),
    )


def reserve_book(draw: Draw) -> Wish:
    book = draw.take("books", _is_out)
    member = draw.take("members", lambda each: each.member_id not in (book.holder_id, *book.waiting_ids))
    return Wish(
        f"Put member {member.member_id} on the list for book {book.book_id}.",
        f"reserve {book.book_id} {member.member_id}",
        (gold("reserve", book_id=book.book_id, member_id=member.member_id),),
    )


def ask_shelf(draw: Draw) -> Wish:
    book = draw.take("books")
    return Wish(
        f"Say on which shelf book {book.book_id} stands.",
        f"where {book.book_id}",
        (gold("get_book", book_id=book.book_id),),
        (f"{book.shelf}",),
    )


def ask_closing(draw: Draw) -> Wish:
    branch = draw.take("branches")
    return Wish(
        f"Say when branch {branch.branch_id} closes, as in 'closes at 17'.",
        f"closing {branch.branch_id}",
        (gold("get_branch", branch_id=branch.branch_id),),
        (f"closes at {branch.closing_hour}",),
    )


def ask_fine(draw: Draw) -> Wish:
    member = draw.take("members", lambda each: each.fine_cents > 0)
    return Wish(
        f"Say how many cents member {member.member_id} owes, as in '120 cents'.",
        f"fine {member.member_id}",
        (gold("get_member", member_id=member.member_id),),
        (f"{member.fine_cents} cents",),
    )


def settle_fine(draw: Draw) -> Wish:
    member = draw.take("members", lambda each: each.fine_cents > 0)
    return Wish(
        f"Member {member.member_id} pays all that they owe.",
        f"settle {member.member_id}",
        (gold("pay_fine", member_id=member.member_id, amount_cents=member.fine_cents),),
    )


def change_address(draw: Draw) -> Wish:
    member = draw.take("members")
    email = f"new{int(draw.rng.integers(10, 100))}.{member.member_id.lower()}@example.net"
    return Wish(
        f"Member {member.member_id} has a new e-mail address: {email}.",
        f"email {member.member_id} {email}",
        (gold("change_email", member_id=member.member_id, email=email),),
        facts={"e-mail address": email},
    )


def move_to_branch(draw: Draw) -> Wish:
    book = draw.take("books", lambda each: each.holder_id is None)
    branch = draw.take("branches", lambda each: each.branch_id != book.branch_id)
    return Wish(
        f"Book {book.book_id} should go to branch {branch.branch_id}.",
        f"move {book.book_id} {branch.branch_id}",
        (gold("move_book", book_id=book.book_id, branch_id=branch.branch_id),),
    )


def pay_and_borrow(draw: Draw) -> Wish:
    """Two calls whose order matters: the fine is in the way."""
    member = draw.take("members", lambda each: each.fine_cents > MAX_FINE_CENTS and _has_room(each))
    book = draw.take("books", _is_in)
    return Wish(
        f"Member {member.member_id} pays the whole fine and takes book {book.book_id} along.",
        f"settle {member.member_id} lend {book.book_id}",
        (
            gold("pay_fine", member_id=member.member_id, amount_cents=member.fine_cents),
            gold("lend", book_id=book.book_id, member_id=member.member_id),
        ),
    )


def swap_books(draw: Draw) -> Wish:
    """Two calls whose order matters: the card is full."""
    member = draw.take("members", lambda each: each.fine_cents <= MAX_FINE_CENTS and not _has_room(each))
    old, new = draw.take_this("books", draw.choose(member.book_ids)), draw.take("books", _is_in)
    return Wish(
        f"Member {member.member_id} brings book {old.book_id} back and takes {new.book_id} instead.",
        f"return {old.book_id} lend {new.book_id} {member.member_id}",
        (
            gold("take_back", book_id=old.book_id),
            gold("lend", book_id=new.book_id, member_id=member.member_id),
        ),
    )


def hand_over(draw: Draw) -> Wish:
    """A book comes back and goes to the one who waits for it, who is known by the record alone."""
    book = draw.take("books", lambda each: _is_out(each) and len(each.waiting_ids) == 1)
    draw.take_this("members", book.holder_id)
    member = draw.take_this("members", book.waiting_ids[0])
    if not _may_borrow(member):
        raise NothingFits("members")
    return Wish(
        f"Book {book.book_id} is brought back; lend it to the one who waits for it, and say who that is, as in 'M1'.",
        f"pass {book.book_id}",
        (
            gold("take_back", book_id=book.book_id),
            gold("lend", book_id=book.book_id, member_id=member.member_id),
        ),
        (member.member_id,),
    )


WISHES = (
    want_book, lend_book, bring_back, extend_loan, reserve_book, ask_shelf, ask_closing, ask_fine, settle_fine,
    change_address, move_to_branch, pay_and_borrow, swap_books, hand_over,
)  # fmt: skip

# Those that name nothing but numbers of books and members: what a policy with a small vocabulary can read and write.
SHORT_WISHES = (lend_book, bring_back, extend_loan, reserve_book, ask_shelf, want_book)


def generate_library_tasks(domain: Domain, num_tasks: int, seed: int) -> list[FunctionTask]:
    """Difficulties 1 to 6 in turn."""
    return generate_tasks(domain, WISHES, range(1, 7), num_tasks, seed)
