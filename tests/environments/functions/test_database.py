"""The episode's database: what a call takes is a copy, what it keeps is what differs, what is shared cannot change."""

import pytest

from orchestra_jax.environments.functions.database import Base, Database
from orchestra_jax.environments.functions.frozen import freeze, is_same, thaw
from tests.environments.functions.small_domain import Line, Order, make_domain


def test_an_episode_changes_its_own_database_only():
    domain = make_domain()
    mine, other = domain.open_database(), domain.open_database()
    mine.orders["O1"].status = "cancelled"
    mine.commit()
    assert mine.orders["O1"].status == "cancelled"
    assert other.orders["O1"].status == domain.data.orders["O1"].status == "open"
    assert list(mine.changes) == [("orders", "O1")] and not other.changes


def test_reading_changes_nothing_and_touches():
    database = make_domain().open_database()
    assert database.orders["O2"].lines[0].amount == 1
    assert "O3" in database.orders and len(database.orders) == 3  # neither looks into an entry
    assert [order.status for order in database.orders.values()] == ["open", "shipped", "open"]
    database.commit()
    assert database.touched == {("orders", "O2")} and database.changes == {}


def test_a_rolled_back_call_leaves_no_trace():
    database = make_domain().open_database()
    database.orders["O1"].lines.append(Line(item="x", amount=1))
    database.rollback()
    assert len(database.orders["O1"].lines) == 1 and not database.touched


def test_what_is_put_back_is_no_change():
    domain = make_domain()
    database = domain.open_database()
    for status in ("cancelled", "open"):
        database.orders["O1"].status = status
        database.commit()
    assert database.changes == {} and database.is_equal(domain.open_database())


def test_insert_and_delete():
    domain = make_domain()
    first, second = domain.open_database(), domain.open_database()
    first.orders["O9"] = Order(order_id="O9", status="open", lines=[])
    assert list(first.orders) == ["O1", "O2", "O3", "O9"]
    first.commit()
    assert not first.is_equal(second)
    del first.orders["O9"]
    first.commit()
    assert first.is_equal(second)
    del first.orders["O1"]
    assert list(first.orders) == ["O2", "O3"] and first.orders.get("O1") is None
    first.commit()
    assert first.changes == {("orders", "O1"): None}
    with pytest.raises(KeyError):
        first.orders["O1"]
    with pytest.raises(KeyError):
        del first.orders["O1"]


def test_a_scan_hands_out_what_cannot_be_written():
    database = make_domain().open_database()
    order = next(iter(database.orders.values()))
    for write in (
        lambda: setattr(order, "status", "x"),
        lambda: order.lines.append(None),
        lambda: order.lines.__setitem__(0, None),
        lambda: setattr(order.lines[0], "amount", 3),
    ):
        with pytest.raises(TypeError, match="shared by all episodes"):
            write()
    assert isinstance(order, Order) and order.model_dump()["lines"] == [{"item": "tea", "amount": 2}]


def test_a_field_that_is_no_table_is_one_entry():
    domain = make_domain()
    database = domain.open_database()
    database.shop.notes.append("late")
    database.commit()
    assert database.shop.notes == ["late"] and domain.data.shop.notes == []
    assert ("shop", "") in database.touched


def test_an_entry_that_breaks_the_data_model_is_refused_by_name():
    database = make_domain().open_database()
    database.orders["O3"].status = "cancelled"
    database.orders["O1"].lines[0].amount = "many"
    with pytest.raises(ValueError, match=r"orders O1\.lines\.0\.amount: .*'many'"):
        database.commit()
    assert database.changes == {}  # of the whole call


def test_plain_json_needs_no_data_model():
    database = Database(Base({"tables": {"T1": {"seats": 4}}}))
    database.table("tables")["T1"]["seats"] = 5
    database.commit()
    assert database.changes == {("tables", "T1"): {"seats": 5}}
    with pytest.raises(ValueError, match="there is no table 'chairs': the tables are"):
        database.table("chairs")
    with pytest.raises(ValueError, match="a set: JSON has none"):
        Base({"tables": {"T1": {1, 2}}})


def test_numbers_are_compared_as_json_writes_them():
    assert is_same({"a": [1, 2.0]}, {"a": [1, 2.0]})
    assert not is_same(1, 1.0) and not is_same(1, True) and not is_same([1, 2], [2, 1])
    value = {"a": [Line(item="x", amount=1)]}
    assert is_same(value, freeze(value)) and is_same(thaw(freeze(value)), value)
    assert not is_same(value, {"a": [Line(item="x", amount=2)]})
