"""A real MCP server over stdio and over HTTP: listed, called, failing, gone."""

import asyncio
import json
import pathlib
import sys
import time

import pytest

from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.mcp import McpServer, load_servers
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall
from tests.ports import free_port

SERVER = pathlib.Path(__file__).with_name("mcp_server.py")
COMMAND = [sys.executable, str(SERVER)]
TASK = Task("t", "geography", "one_hop", "", "", "search")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (), 0), 0, Evidence())


@pytest.fixture(scope="module")
def server():
    with McpServer(COMMAND, prefix="my_", cost_usd=0.002, timeout_s=20.0) as made:
        yield made


def call(server, name, arguments):
    return asyncio.run(Toolbox(server.tools, 30.0).call(ToolCall(name, arguments), CONTEXT))


def test_tools_are_listed_with_their_schemas(server):
    assert [tool.name for tool in server.tools] == ["my_add", "my_fail", "my_environment", "my_nap", "my_die"]
    add = server.tools[0]
    assert add.description == "Adds two numbers." and set(add.parameters_schema["properties"]) == {"a", "b"}


def test_a_tool_is_called_from_one_event_loop_after_another(server):
    for a in range(3):
        result = call(server, "my_add", {"a": a, "b": 2})
        assert (result.text, result.status, result.receipt.cost_usd) == (str(a + 2), CallStatus.OK, 0.002)
        assert 0 < result.receipt.service_s < 20


def test_calls_run_side_by_side(server):
    async def go():
        box = Toolbox(server.tools, 30.0)
        return await asyncio.gather(*(box.call(ToolCall("my_nap", {"seconds": 0.5}), CONTEXT) for _ in range(4)))

    start_s = time.monotonic()
    assert [result.text for result in asyncio.run(go())] == ["awake"] * 4
    assert time.monotonic() - start_s < 4 * 0.5


def test_wrong_arguments_never_reach_the_server_and_its_errors_are_failures(server):
    refused = call(server, "my_add", {"a": "one", "b": 2})
    assert (refused.status, refused.receipt.reason) == (CallStatus.REFUSED, Reason.WRONG_ARGUMENTS)
    failed = call(server, "my_fail", {})
    assert (failed.status, failed.receipt.reason) == (CallStatus.FAILED, Reason.SERVER_ERROR)
    assert failed.receipt.cost_usd == 0.002


def test_only_named_variables_reach_the_server_and_their_values_no_result(monkeypatch):
    monkeypatch.setenv("SECRET_ONE", "one-that-is-given")
    monkeypatch.setenv("SECRET_TWO", "two-that-is-not")
    with McpServer(COMMAND, variables=["SECRET_ONE"]) as made:
        result = call(made, "environment", {})
    assert "SECRET_ONE=[key]" in result.text and "SECRET_TWO" not in result.text


def test_a_late_call_is_a_timeout_and_a_dead_server_a_failure():
    with McpServer(COMMAND, timeout_s=0.3) as made:
        late = call(made, "nap", {"seconds": 5.0})
        assert (late.status, late.receipt.reason) == (CallStatus.TIMEOUT, Reason.DEADLINE)
    gone = call(made, "add", {"a": 1, "b": 2})
    assert (gone.status, gone.receipt.reason) == (CallStatus.FAILED, Reason.NO_CONNECTION)


def test_a_server_that_dies_in_a_call_is_a_failure_then_and_afterwards():
    with McpServer(COMMAND, timeout_s=20.0) as made:
        start_s = time.monotonic()
        for name, arguments in (("die", {}), ("add", {"a": 1, "b": 2})):
            result = call(made, name, arguments)
            assert (result.status, result.receipt.reason) == (CallStatus.FAILED, Reason.NO_CONNECTION)
        assert time.monotonic() - start_s < 15


def test_calls_that_cost_money_stay_within_the_cap_of_the_run():
    account = Account(0.5)
    with McpServer(COMMAND, cost_usd=0.2, account=account) as made:
        results = [call(made, "add", {"a": a, "b": 0}) for a in range(3)]
    assert [result.receipt.reason for result in results] == [Reason.NONE, Reason.NONE, Reason.SPEND_CAP]
    assert account.spent_usd == pytest.approx(0.4) == sum(result.receipt.cost_usd for result in results)
    with pytest.raises(ValueError, match=r"costs \$0.2 and experts.spend_cap_usd is 0"):
        McpServer(COMMAND, cost_usd=0.2, account=Account(0.0))


def test_tools_are_listed_page_by_page():
    with McpServer([sys.executable, str(SERVER.with_name("mcp_pages.py"))]) as made:
        assert [tool.name for tool in made.tools] == ["first", "second", "third"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="has a command or a url"):
        McpServer()
    with pytest.raises(ValueError, match=r"variables \['NO_SUCH'\] .* are not set"):
        McpServer(COMMAND, variables=["NO_SUCH"])
    with pytest.raises(ValueError, match="a user or a query in its URL") as error:
        McpServer(url="http://127.0.0.1:1/mcp?key=sk-secret")
    assert "sk-secret" not in str(error.value)
    with pytest.raises(ValueError, match="does not start"):
        McpServer([sys.executable, "-c", "raise SystemExit(3)"])
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"command": COMMAND}))
    with pytest.raises(ValueError, match="holds no list of JSON objects"):
        load_servers(str(path))
    path.write_text(json.dumps([{"command": COMMAND, "kind": "x"}]))
    with pytest.raises(ValueError, match="is not understood: .*'kind'"):
        load_servers(str(path))


@pytest.mark.slow
def test_a_server_over_http():
    import subprocess

    port = free_port()
    process = subprocess.Popen([*COMMAND, str(port)])
    try:
        made = None
        for _ in range(60):
            try:
                made = McpServer(url=f"http://127.0.0.1:{port}/mcp")
                break
            except ValueError:
                time.sleep(0.5)
        assert made is not None
        with made:
            assert call(made, "add", {"a": 1, "b": 2}).text == "3"
    finally:
        process.kill()
        process.wait()
