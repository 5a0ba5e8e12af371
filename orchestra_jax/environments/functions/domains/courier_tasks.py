"""What customers of the parcel service want: the wishes that its tasks are put together from."""

from __future__ import annotations

from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.domains.courier import MAX_HOLD_DAYS, Parcel, draw_street
from orchestra_jax.environments.functions.domains.wish import Draw, Wish, generate_tasks, gold
from orchestra_jax.environments.functions.task import FunctionTask


def _take(draw: Draw, *statuses: str) -> Parcel:
    return draw.take("parcels", lambda each: each.status in statuses)


def new_street(draw: Draw) -> Wish:
    parcel, street = _take(draw, "waiting", "held"), draw_street(draw.rng)
    return Wish(
        f"Parcel {parcel.parcel_id} should be delivered to {street}.",
        f"street {parcel.parcel_id} {street}",
        (gold("change_street", parcel_id=parcel.parcel_id, street=street),),
        facts={f"street for {parcel.parcel_id}": street},
    )


def other_depot(draw: Draw) -> Wish:
    parcel = _take(draw, "waiting", "held")
    depot = draw.take("depots", lambda each: each.depot_id != parcel.depot_id)
    return Wish(
        f"Send parcel {parcel.parcel_id} to the depot {depot.depot_id}.",
        f"redirect {parcel.parcel_id} {depot.depot_id}",
        (gold("redirect", parcel_id=parcel.parcel_id, depot_id=depot.depot_id),),
    )


def later_day(draw: Draw) -> Wish:
    parcel, num_days = _take(draw, "waiting"), int(draw.rng.integers(1, 10))
    return Wish(
        f"Deliver parcel {parcel.parcel_id} {num_days} days later than planned.",
        f"later {parcel.parcel_id} {num_days}",
        (gold("set_day", parcel_id=parcel.parcel_id, day=parcel.delivery_day + num_days),),
    )


def keep_it(draw: Draw) -> Wish:
    parcel, num_days = _take(draw, "waiting"), int(draw.rng.integers(1, MAX_HOLD_DAYS + 1))
    return Wish(
        f"Keep parcel {parcel.parcel_id} for {num_days} days.",
        f"hold {parcel.parcel_id} {num_days}",
        (gold("hold", parcel_id=parcel.parcel_id, days=num_days),),
    )


def let_it_go(draw: Draw) -> Wish:
    parcel = _take(draw, "held")
    return Wish(
        f"Parcel {parcel.parcel_id} need not be held any longer.",
        f"release {parcel.parcel_id}",
        (gold("release", parcel_id=parcel.parcel_id),),
    )


def load_it(draw: Draw) -> Wish:
    parcel = _take(draw, "waiting")
    van = draw.take("vans", lambda each: _has_room(each, parcel) and each.depot_id == parcel.depot_id)
    return Wish(
        f"Parcel {parcel.parcel_id} goes with van {van.van_id}.",
        f"load {parcel.parcel_id} {van.van_id}",
        (gold("load", parcel_id=parcel.parcel_id, van_id=van.van_id),),
    )


def unload_it(draw: Draw) -> Wish:
    parcel = _take(draw, "loaded")
    draw.take_this("vans", parcel.van_id)
    return Wish(
        f"Parcel {parcel.parcel_id} must not go with its van.",
        f"unload {parcel.parcel_id}",
        (gold("unload", parcel_id=parcel.parcel_id),),
    )


def money_back(draw: Draw) -> Wish:
    """The postage stands in the record alone."""
    parcel = _take(draw, "lost")
    draw.take_this("customers", parcel.sender_id)
    return Wish(
        f"Parcel {parcel.parcel_id} is lost: the sender wants the postage back, no more and no less.",
        f"refund {parcel.parcel_id}",
        (gold("refund", parcel_id=parcel.parcel_id, amount_cents=parcel.postage_cents),),
    )


def new_phone(draw: Draw) -> Wish:
    customer, phone = draw.take("customers"), f"556-{int(draw.rng.integers(1000, 10000))}"
    return Wish(
        f"Customer {customer.customer_id} has a new telephone number: {phone}.",
        f"phone {customer.customer_id} {phone}",
        (gold("change_phone", customer_id=customer.customer_id, phone=phone),),
        facts={"telephone number": phone},
    )


def ask_weight(draw: Draw) -> Wish:
    parcel = draw.take("parcels")
    return Wish(
        f"Say how heavy parcel {parcel.parcel_id} is, as in '750 g'.",
        f"weight {parcel.parcel_id}",
        (gold("get_parcel", parcel_id=parcel.parcel_id),),
        (f"{parcel.weight_g} g",),
    )


def ask_credit(draw: Draw) -> Wish:
    customer = draw.take("customers")
    return Wish(
        f"Say how much credit customer {customer.customer_id} has, as in '90 cents'.",
        f"credit {customer.customer_id}",
        (gold("get_customer", customer_id=customer.customer_id),),
        (f"{customer.credit_cents} cents",),
    )


def ask_town(draw: Draw) -> Wish:
    depot = draw.take("depots")
    return Wish(
        f"Say in which town the depot {depot.depot_id} is.",
        f"town {depot.depot_id}",
        (gold("get_depot", depot_id=depot.depot_id),),
        (depot.town,),
    )


def ask_driver(draw: Draw) -> Wish:
    van = draw.take("vans")
    return Wish(
        f"Say who drives van {van.van_id}.",
        f"driver {van.van_id}",
        (gold("get_van", van_id=van.van_id),),
        (van.driver,),
    )


def change_van(draw: Draw) -> Wish:
    """Two calls whose order matters."""
    parcel = _take(draw, "loaded")
    old = draw.take_this("vans", parcel.van_id)
    new = draw.take("vans", lambda each: _has_room(each, parcel) and each.depot_id == old.depot_id)
    return Wish(
        f"Parcel {parcel.parcel_id} goes with van {new.van_id} and not with {old.van_id}.",
        f"unload {parcel.parcel_id} load {new.van_id}",
        (
            gold("unload", parcel_id=parcel.parcel_id),
            gold("load", parcel_id=parcel.parcel_id, van_id=new.van_id),
        ),
    )


def send_held(draw: Draw) -> Wish:
    """Three calls: a held parcel is released, gets another day, and waits at another street."""
    parcel, street, day = _take(draw, "held"), draw_street(draw.rng), int(draw.rng.integers(310, 360))
    return Wish(
        f"Do not hold parcel {parcel.parcel_id} any longer; it should come to {street} on day {day}.",
        f"release {parcel.parcel_id} street {street} day {day}",
        (
            gold("release", parcel_id=parcel.parcel_id),
            gold("set_day", parcel_id=parcel.parcel_id, day=day),
            gold("change_street", parcel_id=parcel.parcel_id, street=street),
        ),
        facts={f"street for {parcel.parcel_id}": street},
    )


def _has_room(van, parcel: Parcel) -> bool:
    return van.load_g + parcel.weight_g <= van.max_load_g


WISHES = (
    new_street, other_depot, later_day, keep_it, let_it_go, load_it, unload_it, money_back, new_phone, ask_weight,
    ask_credit, ask_town, ask_driver, change_van, send_held,
)  # fmt: skip


def generate_courier_tasks(domain: Domain, num_tasks: int, seed: int) -> list[FunctionTask]:
    """Difficulties 1 to 6 in turn."""
    return generate_tasks(domain, WISHES, range(1, 7), num_tasks, seed)
