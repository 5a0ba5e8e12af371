"""A parcel service: customers, parcels, depots, vans; redirecting, rescheduling, holding, loading, refunds.

A shipped domain, written by hand. `make_courier` draws its database from a seed; tasks are in courier_tasks.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel

from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import FunctionRefused, make_function

MAX_HOLD_DAYS = 14
MAX_REFUND_SHARE = 2  # times the postage

POLICY = f"""You work in the office of a parcel service. Act only on what the customer asks for, through the functions.
- A parcel that is delivered or returned is not moved any more; one that is on a van cannot be redirected.
- A parcel is held at most {MAX_HOLD_DAYS} days, at the depot where it lies.
- A van takes no more than its load, and only parcels of its own depot.
- Postage is refunded for lost parcels: at most {MAX_REFUND_SHARE} times what was paid, into the customer's credit.
- Tell the customer what was asked for, in the words of the record."""


class Customer(BaseModel):
    customer_id: str
    name: str
    phone: str
    credit_cents: int
    parcel_ids: list[str]


class Stop(BaseModel):
    """One line of a parcel's way."""

    day: int
    depot_id: str
    event: str


class Parcel(BaseModel):
    parcel_id: str
    sender_id: str
    street: str
    weight_g: int
    postage_cents: int
    depot_id: str
    status: Literal["waiting", "held", "loaded", "delivered", "lost", "returned"]
    van_id: str | None
    delivery_day: int
    hold_days: int
    refund_cents: int
    way: list[Stop]


class Depot(BaseModel):
    depot_id: str
    town: str
    closing_hour: int


class Van(BaseModel):
    van_id: str
    depot_id: str
    driver: str
    max_load_g: int
    load_g: int
    parcel_ids: list[str]


class Courier(BaseModel):
    customers: dict[str, Customer]
    parcels: dict[str, Parcel]
    depots: dict[str, Depot]
    vans: dict[str, Van]


ParcelId = Annotated[str, "The parcel's number, such as P31."]
CustomerId = Annotated[str, "The customer's number, such as C5."]
DepotId = Annotated[str, "The depot's number, such as D2."]
VanId = Annotated[str, "The van's number, such as V3."]


def _entry(table, key: str, kind: str):
    if key not in table:
        raise FunctionRefused(f"there is no {kind} {key}")
    return table[key]


def _parcel(database, parcel_id: str, *allowed: str) -> Parcel:
    parcel = _entry(database.parcels, parcel_id, "parcel")
    if allowed and parcel.status not in allowed:
        raise FunctionRefused(f"{parcel_id} is {parcel.status}")
    return parcel


def find_customer(database, phone: Annotated[str, "As the customer says it."]) -> list[str]:
    """The numbers of the customers with this telephone number."""
    return [each.customer_id for each in database.customers.values() if each.phone == phone]


def list_vans(database, depot_id: DepotId) -> list[str]:
    """The vans of a depot."""
    return [van.van_id for van in database.vans.values() if van.depot_id == depot_id]


def get_customer(database, customer_id: CustomerId) -> Customer:
    """The record of a customer: credit and parcels."""
    return _entry(database.customers, customer_id, "customer")


def get_parcel(database, parcel_id: ParcelId) -> Parcel:
    """The record of a parcel: status, depot, weight, postage, way."""
    return _parcel(database, parcel_id)


def get_depot(database, depot_id: DepotId) -> Depot:
    """The record of a depot: town and closing hour."""
    return _entry(database.depots, depot_id, "depot")


def get_van(database, van_id: VanId) -> Van:
    """The record of a van: depot, driver, load."""
    return _entry(database.vans, van_id, "van")


def change_street(database, parcel_id: ParcelId, street: Annotated[str, "Street and number."]) -> str:
    """Deliver a parcel that is not on its way yet to another street."""
    parcel = _parcel(database, parcel_id, "waiting", "held")
    parcel.street = street
    return "changed"


def redirect(database, parcel_id: ParcelId, depot_id: DepotId) -> str:
    """Send a waiting or held parcel on to another depot."""
    parcel, depot = _parcel(database, parcel_id, "waiting", "held"), _entry(database.depots, depot_id, "depot")
    if parcel.depot_id == depot.depot_id:
        raise FunctionRefused(f"{parcel_id} is there already")
    parcel.depot_id, parcel.status, parcel.hold_days = depot.depot_id, "waiting", 0
    parcel.way.append(Stop(day=parcel.delivery_day, depot_id=depot.depot_id, event="redirected"))
    return "redirected"


def set_day(database, parcel_id: ParcelId, day: Annotated[int, "Day of the year, 1 to 366."]) -> str:
    """Deliver a waiting parcel on another day."""
    parcel = _parcel(database, parcel_id, "waiting")
    if not 1 <= day <= 366:
        raise FunctionRefused(f"{day} is no day of the year")
    parcel.delivery_day = day
    return "set"


def hold(database, parcel_id: ParcelId, days: Annotated[int, f"1 to {MAX_HOLD_DAYS}."]) -> str:
    """Keep a waiting parcel at its depot for some days."""
    parcel = _parcel(database, parcel_id, "waiting")
    if not 1 <= days <= MAX_HOLD_DAYS:
        raise FunctionRefused(f"{days} is not between 1 and {MAX_HOLD_DAYS}")
    parcel.status, parcel.hold_days = "held", days
    return "held"


def release(database, parcel_id: ParcelId) -> str:
    """Let a held parcel go on."""
    parcel = _parcel(database, parcel_id, "held")
    parcel.status, parcel.hold_days = "waiting", 0
    return "released"


def load(database, parcel_id: ParcelId, van_id: VanId) -> str:
    """Put a waiting parcel onto a van of its depot."""
    parcel, van = _parcel(database, parcel_id, "waiting"), _entry(database.vans, van_id, "van")
    if parcel.depot_id != van.depot_id:
        raise FunctionRefused(f"{van_id} is at {van.depot_id}, {parcel_id} at {parcel.depot_id}")
    if van.load_g + parcel.weight_g > van.max_load_g:
        raise FunctionRefused(f"{van_id} is full")
    parcel.status, parcel.van_id = "loaded", van_id
    van.load_g += parcel.weight_g
    van.parcel_ids.append(parcel_id)
    return "loaded"


def unload(database, parcel_id: ParcelId) -> str:
    """Take a parcel off its van."""
    parcel = _parcel(database, parcel_id, "loaded")
    van = _entry(database.vans, parcel.van_id, "van")
    van.load_g -= parcel.weight_g
    van.parcel_ids.remove(parcel_id)
    parcel.status, parcel.van_id = "waiting", None
    return "unloaded"


def refund(database, parcel_id: ParcelId, amount_cents: Annotated[int, "Into the sender's credit."]) -> str:
    """Refund the postage of a lost parcel, once."""
    parcel = _parcel(database, parcel_id, "lost")
    if parcel.refund_cents:
        raise FunctionRefused(f"{parcel_id} was refunded")
    if not 0 < amount_cents <= MAX_REFUND_SHARE * parcel.postage_cents:
        raise FunctionRefused(f"the postage of {parcel_id} was {parcel.postage_cents} cents")
    parcel.refund_cents = amount_cents
    _entry(database.customers, parcel.sender_id, "customer").credit_cents += amount_cents
    return "refunded"


def change_phone(database, customer_id: CustomerId, phone: Annotated[str, "The new number."]) -> str:
    """Change a customer's telephone number."""
    _entry(database.customers, customer_id, "customer").phone = phone
    return "changed"


READS = (find_customer, list_vans, get_customer, get_parcel, get_depot, get_van)
WRITES = (change_street, redirect, set_day, hold, release, load, unload, refund, change_phone)

NAMES = ("Abel", "Bruno", "Carla", "Daria", "Elio", "Fatou", "Gita", "Hugo", "Ines", "Jana", "Kofi", "Lena", "Marta")
STREETS = ("Ash Road", "Birch Row", "Canal Street", "Dock Lane", "Elm Square", "Field Way", "Garden Street")
TOWNS = ("Altdorf", "Brenn", "Callow", "Denby", "Esker", "Farrow")


def draw_street(rng: np.random.Generator) -> str:
    return f"{STREETS[int(rng.integers(len(STREETS)))]} {int(rng.integers(1, 200))}"


def make_courier(
    seed: int, num_customers: int = 60, num_parcels: int = 200, num_depots: int = 6, name: str = "courier"
) -> Domain:
    """The domain with a database drawn from `seed`. Numbers of entries begin with 1: P1, C1, D1, V1."""
    rng = np.random.default_rng(seed)
    depots = {
        f"D{k + 1}": Depot(depot_id=f"D{k + 1}", town=TOWNS[k % len(TOWNS)], closing_hour=int(rng.integers(15, 23)))
        for k in range(num_depots)
    }
    customers = {
        f"C{k + 1}": Customer(
            customer_id=f"C{k + 1}",
            name=NAMES[int(rng.integers(len(NAMES)))],
            phone=f"555-{k + 1:04d}",
            credit_cents=int(rng.integers(0, 50)) * 10,
            parcel_ids=[],
        )
        for k in range(num_customers)
    }
    vans = {
        f"V{k + 1}": Van(
            van_id=f"V{k + 1}",
            depot_id=f"D{k // 2 + 1}",
            driver=NAMES[int(rng.integers(len(NAMES)))],
            max_load_g=200_000,
            load_g=0,
            parcel_ids=[],
        )
        for k in range(2 * num_depots)
    }
    parcels = {f"P{k + 1}": _draw_parcel(rng, f"P{k + 1}", customers, vans) for k in range(num_parcels)}
    functions = [make_function(each, is_write=each in WRITES) for each in (*READS, *WRITES)]
    return Domain(name, POLICY, Courier(customers=customers, parcels=parcels, depots=depots, vans=vans), functions)


def _draw_parcel(
    rng: np.random.Generator, parcel_id: str, customers: dict[str, Customer], vans: dict[str, Van]
) -> Parcel:
    """A parcel of some customer; one that is loaded lies on a van of its depot."""
    sender = customers[f"C{int(rng.integers(len(customers))) + 1}"]
    sender.parcel_ids.append(parcel_id)
    van = vans[f"V{int(rng.integers(len(vans))) + 1}"]
    statuses = ("waiting", "held", "loaded", "delivered", "lost", "returned")
    status = statuses[int(rng.choice(len(statuses), p=(0.4, 0.15, 0.2, 0.1, 0.1, 0.05)))]
    weight_g = int(rng.integers(1, 40)) * 250
    if status == "loaded":
        van.load_g += weight_g
        van.parcel_ids.append(parcel_id)
    day = int(rng.integers(10, 300))
    return Parcel(
        parcel_id=parcel_id,
        sender_id=sender.customer_id,
        street=draw_street(rng),
        weight_g=weight_g,
        postage_cents=int(rng.integers(8, 60)) * 25,
        depot_id=van.depot_id,
        status=status,
        van_id=van.van_id if status == "loaded" else None,
        delivery_day=day,
        hold_days=int(rng.integers(1, MAX_HOLD_DAYS + 1)) if status == "held" else 0,
        refund_cents=0,
        way=[Stop(day=day - 2, depot_id=van.depot_id, event="received")],
    )
