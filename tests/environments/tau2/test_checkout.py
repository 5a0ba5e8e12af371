"""A checkout of tau2-bench: read, pinned, replayed and played like the package.

The checkouts of most tests are laid out here, by tau2-bench's own layout. One has two orders and a few lines of code,
the other inspect-evals' retail data and tools. ORCHESTRA_TAU2_CHECKOUT names a real one, whose code's imports
ORCHESTRA_TAU2_PYTHON must have.
"""

import asyncio
import json
import os
import subprocess
import sys
import textwrap

import pytest

from orchestra_jax.data.records import Instance, Preference
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.user import ScriptedUser
from orchestra_jax.environments.tau2.server import Tau2Server
from orchestra_jax.environments.tau2.tau2_calling import Tau2Calling
from orchestra_jax.environments.tau2.toolkits import base_tasks
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.types import CallStatus
from tests.environments.tau2.test_tau2_replay import PYTHON, needs_tau2, run

CHECKOUT = os.environ.get("ORCHESTRA_TAU2_CHECKOUT", "")
REPLAY = ["-m", "orchestra_jax.environments.tau2.replay"]
# Of 1.0.1: tasks, those that need no judge, those that nothing solves, those that the information alone solves. Gold
# solves all that need no judge.
EXPECTED = {"airline": (50, 50, 23, 24), "retail": (114, 74, 6, 6), "telecom": (114, 114, 0, 0)}

DATA_MODEL = """
    import json
    from pydantic import BaseModel

    class Order(BaseModel):
        order_id: str
        status: str

    class RetailDB(BaseModel):
        orders: dict[str, Order]

        @classmethod
        def load(cls, path):
            return cls.model_validate(json.load(open(path)))
"""
TOOLS = """
    from tau2.domains.retail.data_model import RetailDB

    class Tool:
        def __init__(self, method):
            name = {"type": "string"}
            self.openai_schema = {"type": "function", "function": {
                "name": method.__name__, "description": method.__doc__,
                "parameters": {"type": "object", "properties": {"order_id": name}, "required": ["order_id"]}}}

    class RetailTools:
        db: RetailDB
        seen: list = []

        def __init__(self, db):
            raise AssertionError("episodes are not made by the constructor")

        @property
        def tools(self):
            return [self.cancel]

        def get_tools(self):
            return {each.__name__: Tool(each) for each in self.tools}

        def cancel(self, order_id):
            "Cancel an order."
            self.seen.append(order_id)
            if self.db.orders[order_id].status != "pending":
                raise ValueError("not pending")
            self.db.orders[order_id].status = "cancelled"
            return f"call {len(self.seen)}"
"""
SPLITS = {"base": ["1", "3", "4"], "train": ["1", "3"], "test": ["4"]}


def task(task_id, order_id, **criteria):
    actions = [{"action_id": "a", "name": "cancel", "arguments": {"order_id": order_id}}]
    return {
        "id": task_id,
        "user_scenario": {"instructions": {"reason_for_call": f"Cancel {order_id}."}},
        "evaluation_criteria": {"actions": actions, "reward_basis": ["DB", "NL_ASSERTION"], **criteria},
    }


TASKS = [
    task("1", "O1", nl_assertions=None),
    task("2", "O2"),
    task("3", "O1", nl_assertions=["It is polite."]),
    task("4", "O2"),
]


def lay_out(root, files, tools=TOOLS, data_model=DATA_MODEL, version="9.9.9"):
    """A checkout of the retail domain with these data files, by name."""
    data, code = root / "data" / "tau2" / "domains" / "retail", root / "src" / "tau2" / "domains" / "retail"
    for folder in (data, code):
        folder.mkdir(parents=True)
    for name, content in files.items():
        (data / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (root / "pyproject.toml").write_text(f'[project]\nname = "tau2"\nversion = "{version}"\n')
    # As in tau2-bench, the package's own __init__ wants what the tools do not.
    (root / "src" / "tau2" / "__init__.py").write_text("import a_package_for_voices\n")
    for name, text in (("data_model", data_model), ("tools", tools)):
        (code / f"{name}.py").write_text(textwrap.dedent(text))
    return str(root)


@pytest.fixture
def checkout(tmp_path):
    db = {"orders": {name: {"order_id": name, "status": "pending"} for name in ("O1", "O2")}}
    files = {"db.json": db, "tasks.json": TASKS, "split_tasks.json": SPLITS, "policy.md": b"Be brief."}
    return lay_out(tmp_path / "tau2-bench", files)


def test_a_checkout_is_replayed_with_its_version_and_without_its_command_line(checkout):
    source, *lines = run(REPLAY, "retail", "--checkout", checkout, "--any_version", python=sys.executable)
    assert (source["source"], source["version"], len(source["digest"])) == ("tau2-bench", "9.9.9", 12)
    # The base split alone; an assertion in words needs a judge, none at all does not.
    assert [(line["task_id"], line["gold"], line["no_op"]) for line in lines] == [
        ("1", 1.0, 0.0),
        ("3", None, None),
        ("4", 1.0, 0.0),
    ]


def test_a_checkout_is_played_each_episode_on_values_of_its_own(checkout):
    environment = Tau2Calling(
        "retail", sys.executable, ScriptedUser(), FunctionSettings(False, 5), checkout, is_any_version=True
    )
    one, four = environment.tasks
    assert (one.task_id, four.task_id, environment.judged_task_ids) == ("1", "4", ("3",))
    instance = Instance("1", one, Preference("any", "Any.", {}), (), 0)
    messages, schemas = environment.prompt(instance)
    assert messages[0].content == "Be brief." and [each["function"]["name"] for each in schemas] == [
        "cancel",
        "tell_user",
    ]
    tool = environment.toolbox.tools[0]

    def cancel(episode):
        context = ToolContext(instance, 0, Evidence(), state=episode)
        return asyncio.run(tool.run({"order_id": "O1"}, context))

    first, second = environment.open(instance), environment.open(instance)
    assert (cancel(first).text, cancel(first).text, cancel(second).text) == ("call 1", "Error: not pending", "call 1")
    environment.close()
    assert cancel(second).status == CallStatus.FAILED  # the worker has ended


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("data/tau2/domains/retail/tasks.json", "is no checkout of tau2-bench with retail: there is no .*tasks.json"),
        ("pyproject.toml", "there is no .*pyproject.toml"),
        ("", "tau2-bench 9.9.9 has retail data .*, pinned are 1.0.1 and 3217cce4864f: .* or ask for any version"),
    ],
)
def test_what_is_no_checkout_or_another_version_is_said(checkout, lost, told):
    if lost:
        os.remove(os.path.join(checkout, lost))
    with pytest.raises(ValueError, match=told):
        Tau2Server("retail", sys.executable, checkout)


def test_code_that_cannot_be_imported_names_the_mend(tmp_path):
    files = {"db.json": {"orders": {}}, "tasks.json": [], "policy.md": b""}
    made = lay_out(tmp_path / "tau2-bench", files, tools="import a_package_that_is_not_there\n")
    with pytest.raises(ValueError, match="No module named 'a_package_that_is_not_there'. Install the checkout into"):
        Tau2Server("retail", sys.executable, made, is_any_version=True)


def test_without_splits_all_tasks_count():
    raw = json.dumps(TASKS)
    assert list(base_tasks(raw, {})) == ["1", "2", "3", "4"]
    assert list(base_tasks(raw, SPLITS)) == ["1", "3", "4"]


PACKAGED_DATA = """
import gzip, importlib.resources, sys
for name in sys.argv[1:]:
    path = importlib.resources.files("inspect_evals") / "tau2" / "data" / "domains" / "retail" / name
    raw = path.read_bytes()
    sys.stdout.buffer.write((gzip.decompress(raw) if name.endswith(".gz") else raw) + b"\\0")
"""
PACKAGED_TOOLS = """
    import inspect
    from inspect_evals.tau2.retail.RetailAgentTools import RetailAgentTools

    methods = {name: each for name, each in vars(RetailAgentTools).items() if inspect.isfunction(each)}
    RetailTools = type("RetailTools", (), methods)
"""


@needs_tau2
@pytest.mark.slow
def test_the_packages_data_laid_out_as_a_checkout_scores_as_the_package(tmp_path):
    names = {"db.json.gz": "db.json", "tasks.json": "tasks.json", "split_tasks.json": "split_tasks.json"}
    names["policy.txt"] = "policy.md"
    read = subprocess.run([PYTHON, "-c", PACKAGED_DATA, *names], capture_output=True, check=True).stdout.split(b"\0")
    made = lay_out(
        tmp_path / "tau2-bench",
        dict(zip(names.values(), read)),
        tools=PACKAGED_TOOLS,
        data_model="    from inspect_evals.tau2.retail.data_model import RetailDB\n",
    )
    keys = ("task_id", "gold", "no_op", "informed_no_op")
    _, *expected = run(REPLAY, "retail")
    _, *lines = run(REPLAY, "retail", "--checkout", made, "--any_version")
    assert len(lines) == 114
    assert [[each[key] for key in keys] for each in lines] == [[each[key] for key in keys] for each in expected]


@pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="ORCHESTRA_TAU2_CHECKOUT names no checkout of tau2-bench 1.0.1")
@pytest.mark.slow
@pytest.mark.parametrize("domain", EXPECTED)
def test_gold_scores_one_on_every_task_of_a_real_checkout(domain):
    source, *lines = run(REPLAY, domain, "--checkout", CHECKOUT)
    assert source["version"] == "1.0.1"
    judged = [line for line in lines if line["gold"] is not None]
    assert [line["task_id"] for line in judged if line["gold"] != 1.0] == []
    solved = (sum(line[name] == 1.0 for line in judged) for name in ("no_op", "informed_no_op"))
    assert (len(lines), len(judged), *solved) == EXPECTED[domain]
