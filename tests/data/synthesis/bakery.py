"""What a model writes for a bakery, by hand, good and bad: each stage of the pipeline is given something to reject.

`Bakery.respond(stage, user)` is the text of a reply. Requests of one text get the replies of their list in turn.
"""

import collections
import json

from orchestra_jax.data.synthesis import solver
from orchestra_jax.data.synthesis.stages import (
    data_model,
    entries,
    entry_checks,
    evolution,
    functions,
    intents,
    schema,
    subjects,
)

SYSTEMS = {
    module.SYSTEM: module.__name__.rsplit(".", 1)[-1]
    for module in (subjects, schema, data_model, entries, entry_checks, functions, intents, evolution)
}

SUBJECTS = ["birthday cakes", "weddings", "Birthday  cakes", 7, "office parties", "Sunday breakfast"]
TABLES = [
    {
        "name": "cakes",
        "description": "what is sold",
        "id_field": "cake_id",
        "fields": {"cake_id": "string", "price_usd": "number", "num_left": "integer"},
    },
    {
        "name": "orders",
        "description": "what was ordered",
        "id_field": "order_id",
        "fields": {
            "order_id": "string",
            "cake_id": "an id of cakes",
            "amount": "integer",
            "state": "open or cancelled",
        },
    },
]
MODEL = {
    "tables": {
        "cakes": {
            "type": "object",
            "properties": {
                "cake_id": {"type": "string"},
                "price_usd": {"type": "number", "minimum": 0},
                "num_left": {"type": "integer", "minimum": 0},
            },
            "required": ["cake_id", "price_usd", "num_left"],
        },
        "orders": {
            "type": "object",
            "properties": {
                "order_id": {"type": "string"},
                "cake_id": {"type": "string"},
                "amount": {"type": "integer", "minimum": 1},
                "state": {"enum": ["open", "cancelled"]},
            },
            "required": ["order_id", "cake_id", "amount", "state"],
        },
    },
    "references": [{"table": "orders", "field": "cake_id", "to": "cakes"}],
}


def make_entries(prefix, cake_of_order="C1"):
    cake = {"cake_id": f"{prefix}C1", "price_usd": 4.0, "num_left": 9}
    orders = {
        f"{prefix}{name}": {
            "order_id": f"{prefix}{name}",
            "cake_id": f"{prefix}{cake_of_order}",
            "amount": amount,
            "state": "open",
        }
        for name, amount in (("O1", 2), ("O2", 3))
    }
    return {"cakes": {cake["cake_id"]: cake}, "orders": orders}


ENTRIES = {
    "birthday cakes": make_entries("S1-"),
    "weddings": make_entries("S2-", cake_of_order="C7"),  # an id that is not there
    "office parties": make_entries("S3-"),  # the checker will not have it
    "Sunday breakfast": make_entries("S4-"),
}


def make_function(name, source, arguments, is_write=False, examples=()):
    kinds = {"amount": "integer"}
    properties = {argument: {"type": kinds.get(argument, "string")} for argument in arguments}
    return {
        "name": name,
        "description": f"To {name.replace('_', ' ')}.",
        "parameters": {"type": "object", "properties": properties, "required": list(arguments)},
        "is_write": is_write,
        "source": source,
        "examples": list(examples) or [{}],
    }


GET_ORDER = make_function(
    "get_order",
    "def get_order(database, order_id):\n"
    "    if order_id not in database['orders']:\n"
    "        raise Refused('there is no such order')\n"
    "    order = database['orders'][order_id]\n"
    "    return {**order, 'total_usd': order['amount'] * database['cakes'][order['cake_id']]['price_usd']}\n",
    ["order_id"],
    examples=[{"order_id": "S1-O1"}, {"order_id": "S1-O77"}],
)
CANCEL_ORDER = make_function(
    "cancel_order",
    "def cancel_order(database, order_id):\n"
    "    if order_id not in database['orders']:\n"
    "        raise Refused('there is no such order')\n"
    "    database['orders'][order_id]['state'] = 'cancelled'\n"
    "    return 'done'\n",
    ["order_id"],
    is_write=True,
    examples=[{"order_id": "S1-O1"}],
)
CHANGE_AMOUNT = make_function(
    "change_amount",
    "def change_amount(database, order_id, amount):\n"
    "    order = database['orders'][order_id]\n"
    "    order['amount'] = amount\n"
    "    return order\n",
    ["order_id", "amount"],
    is_write=True,
    examples=[{"order_id": "S4-O1", "amount": 4}],
)
COUNT_CAKES = make_function("count_cakes", "def count_cakes(database):\n    return len(database['cakes'])\n", [])
# By the reason for which each is rejected.
BAD_FUNCTIONS = {
    "reads": make_function("reads", "def reads(database):\n    return open('/etc/passwd').read()\n", []),
    "connects": make_function(
        "connects", "def connects(database):\n    import socket\n    socket.create_connection(('127.0.0.1', 9))\n", []
    ),
    "loops": make_function("loops", "def loops(database):\n    while True:\n        pass\n", []),
    "leaves": make_function("leaves", "def leaves(database):\n    import os\n    os._exit(0)\n", []),
    "no_json": make_function("no_json", "def no_json(database):\n    return {1, 2}\n", []),
    "writes": make_function("writes", "def writes(database):\n    database['cakes']['S1-C1']['num_left'] = 0\n", []),
    "breaks_model": make_function(
        "breaks_model",
        "def breaks_model(database):\n    database['cakes']['S1-C1']['num_left'] = -1\n",
        [],
        is_write=True,
    ),
}
ROUNDS = {
    "S1-": {
        "functions": [
            GET_ORDER,
            CANCEL_ORDER,
            COUNT_CAKES,
            *BAD_FUNCTIONS.values(),
            make_function("draw", "def draw(database):\n    import random\n    return random.random()\n", []),
            make_function("other", "def other(database, order_id):\n    return 1\n", ["cake_id"]),
            make_function("second", "import os\ndef second(database):\n    return 1\n", []),
            make_function("broken", "def broken(database:\n    return 1\n", []),
            {**GET_ORDER, "name": "unwilling", "examples": [{"order_id": "none"}]}
            | {"source": GET_ORDER["source"].replace("get_order", "unwilling")},
            {"name": "half"},
        ]
    },
    "S4-": {"functions": [{**GET_ORDER, "examples": [{"order_id": "S4-O1"}]}, CHANGE_AMOUNT]},
}

INTENTS = [f"Purpose number {number}." for number in range(8)] + ["purpose number 0.", ""]


def make_task(reason, known, actions, info=()):
    calls = [{"name": name, "arguments": arguments} for name, arguments in actions]
    return {"reason_for_call": reason, "known_info": known, "actions": calls, "communicate_info": list(info)}


KEPT = make_task(
    "You want to cancel the order of two cakes for the birthday on Friday.",
    "Your order is S1-O1.",
    [("cancel_order", {"order_id": "S1-O1"})],
)
TASKS = [
    KEPT,
    make_task("You want tea.", "You are thirsty.", [("pour_tea", {})]),
    make_task("You wonder how many kinds there are.", "You know nothing.", [("count_cakes", {})]),
    make_task(
        "You need five cakes for breakfast.",
        "Your order is S4-O1.",
        [("change_amount", {"order_id": "S4-O1", "amount": 5})],
    ),
    make_task("You want the old order gone.", "Your order is S1-O9.", [("cancel_order", {"order_id": "S1-O9"})]),
    {**KEPT, "known_info": "Your order is S1-O1, you think."},
    make_task("You paid 8 dollars.", "Order S1-O1.", [("get_order", {"order_id": "S1-O1"})], ["8"]),
    make_task("You ask for the total.", "Your order is S4-O2.", [("get_order", {"order_id": "S4-O2"})], ["12"]),
]
HARDER = make_task(
    "You want the first order cancelled and the second one raised to six cakes.",
    "Your orders are S1-O1 and S1-O2.",
    [("cancel_order", {"order_id": "S1-O1"}), ("change_amount", {"order_id": "S1-O2", "amount": 6})],
)


def call(name, **arguments):
    return {"call": {"name": name, "arguments": arguments}}


DONE = {"done": True}
# By the beginning of what the customer says: attempts, each a list of steps.
SOLUTIONS = {
    KEPT["reason_for_call"]: [
        [{"say": "I cannot do that."}, DONE],
        [call("get_order", order_id="S1-O1"), call("cancel_order", order_id="S1-O1"), DONE],
    ],
    TASKS[3]["reason_for_call"]: [[call("change_amount", order_id="S4-O1", amount=4), DONE]] * 2,
    TASKS[7]["reason_for_call"]: [[call("get_order", order_id="S4-O2"), {"say": "That is $12."}, DONE]],
    HARDER["reason_for_call"]: [
        [call("cancel_order", order_id="S1-O1"), call("change_amount", order_id="S1-O2", amount=6), DONE]
    ],
}


class Bakery:
    def __init__(self):
        self.num_asked = collections.Counter()
        self._attempts = collections.Counter()

    def respond(self, system, user):
        """The text of a reply to one request."""
        if system.startswith(solver.SYSTEM):
            return json.dumps(self._solve(user))
        stage = SYSTEMS[system]
        count = self.num_asked[stage, user]
        self.num_asked[stage, user] += 1
        reply = getattr(self, f"_{stage}")(user, count)
        return reply if isinstance(reply, str) else json.dumps(reply)

    def _subjects(self, user, count):
        return SUBJECTS

    def _schema(self, user, count):
        bad_id = [{**TABLES[0], "id_field": "number"}]
        good = f"<think>Two tables [will do].</think>Here they are:\n```json\n{json.dumps({'tables': TABLES})}\n```"
        return ["Two tables will do.", {"tables": bad_id}, good][count]

    def _data_model(self, user, count):
        missing = {**MODEL, "tables": {"cakes": MODEL["tables"]["cakes"]}}
        dangling = {**MODEL, "references": [{"table": "orders", "field": "cake", "to": "cakes"}]}
        return [missing, dangling, MODEL][count]

    def _entries(self, user, count):
        return next(made for subject, made in ENTRIES.items() if f"concerning: {subject}." in user)

    def _entry_checks(self, user, count):
        yes = {"is_ok": True, "reason": ""}
        consistent = {"is_ok": False, "reason": "a price differs"} if "S3-" in user else yes
        return {"conforms": yes, "consistent": consistent, "natural": yes}

    def _functions(self, user, count):
        return next(made for prefix, made in ROUNDS.items() if prefix + "O1" in user.split("Some entries")[1])

    def _intents(self, user, count):
        return INTENTS

    def _evolution(self, user, count):
        """Tasks and evolution have one system text."""
        if "Make it harder" not in user:
            return next(task for intent, task in zip(INTENTS, TASKS) if f"purpose: {intent}\n" in user)
        if KEPT["known_info"] in user:
            return HARDER
        if TASKS[7]["reason_for_call"] in user:
            return "I could not think of anything."
        return KEPT

    def _solve(self, user):
        steps_done = user.count("\nYou: ")
        reason = next(reason for reason in SOLUTIONS if f"Customer: {reason}\n" in user)
        if steps_done == 0:
            self._attempts[reason] += 1
        return SOLUTIONS[reason][self._attempts[reason] - 1][steps_done]
