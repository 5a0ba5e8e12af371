"""A domain of three orders and one shop for the tests of the core: small enough to compute by hand."""

from typing import Annotated

from pydantic import BaseModel

from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import FunctionRefused, make_function


class Line(BaseModel):
    item: str
    amount: int


class Order(BaseModel):
    order_id: str
    status: str
    lines: list[Line]


class Shop(BaseModel):
    is_open: bool
    notes: list[str]


class Data(BaseModel):
    orders: dict[str, Order]
    shop: Shop


def get_order(database, order_id: Annotated[str, "such as O1"]) -> Order:
    """Look an order up."""
    if order_id not in database.orders:
        raise FunctionRefused(f"there is no order {order_id}")
    return database.orders[order_id]


def cancel_order(database, order_id: Annotated[str, "such as O1"]) -> str:
    """Cancel an order that has not been shipped."""
    order = get_order(database, order_id)
    order.lines.clear()
    if order.status == "shipped":
        raise FunctionRefused(f"order {order_id} is shipped")
    order.status = "cancelled"
    return "done"


def add_note(database, text: str, count: int = 1) -> int:
    """Write a note into the shop's book."""
    database.shop.notes.extend([text] * count)
    return len(database.shop.notes)


def make_domain(*more) -> Domain:
    orders = {
        "O1": Order(order_id="O1", status="open", lines=[Line(item="tea", amount=2)]),
        "O2": Order(order_id="O2", status="shipped", lines=[Line(item="jam", amount=1)]),
        "O3": Order(order_id="O3", status="open", lines=[]),
    }
    data = Data(orders=orders, shop=Shop(is_open=True, notes=[]))
    writes = [make_function(each, is_write=True) for each in (cancel_order, add_note, *more)]
    return Domain("shop", "Be brief.", data, [make_function(get_order, is_write=False), *writes])
