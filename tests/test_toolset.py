"""The toolset of a run: what the config adds to the three tools, and how it wraps them."""

import asyncio
import contextlib
import json
import pathlib
import sys

import pytest

from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.search.document_index import build_index
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.toolset import build_experts, build_toolbox, load_descriptions, load_limits, open_store
from orchestra_jax.types import CallStatus, Reason, ToolCall

MCP_SERVER = pathlib.Path(__file__).parent / "tools" / "mcp_server.py"
DOCUMENTS = (Document("a", "Cats", "tom is a cat"), Document("b", "Dogs", "rex is a dog"))
OFFER = Offer("expert-1", "gpt-5", False, 1.0, 1.0, 2.0)
TASK = Task(
    "t", "geography", "one_hop", "Which cat?", "tom", "search", ("a",), query="tom", poor_query="tom", wrong_answer="x"
)
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (OFFER,), 0), 0, Evidence())


@contextlib.contextmanager
def toolbox(config, account=None):
    with contextlib.ExitStack() as resources:
        yield build_toolbox(config, DOCUMENTS, None, account or Account(), resources)


def call(box, name, arguments):
    return asyncio.run(box.call(ToolCall(name, arguments), CONTEXT))


def test_by_default_there_are_the_three_tools_and_nothing_around_them():
    with toolbox(RunConfig()) as box:
        assert [type(tool).__name__ for tool in box.tools] == ["Search", "EnhanceReasoning", "Answer"]
        result = call(box, "search", {"model": "expert-1"})
        assert result.evidence.document_ids == ("a",) and result.receipt.queue_s == 0.0


def test_an_index_on_disk_takes_the_place_of_the_one_in_memory(tmp_path):
    build_index(tmp_path / "index", [Document("z", "Tom", "another tom")])
    config = RunConfig()
    config.tools.index_directory = str(tmp_path / "index")
    with toolbox(config) as box:
        assert call(box, "search", {"model": "expert-1"}).evidence.document_ids == ("z",)


def test_tools_of_a_server_and_of_the_web_are_added_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVILY_API_KEY", "k")
    (tmp_path / "mcp.json").write_text(
        json.dumps([{"command": [sys.executable, str(MCP_SERVER)], "prefix": "my_", "cost_usd": 0.25}])
    )
    (tmp_path / "limits.json").write_text(json.dumps({"my_add": {"timeout_s": 20, "max_attempts": 2}}))
    config = RunConfig()
    config.tools.mcp_path, config.tools.limits_path = str(tmp_path / "mcp.json"), str(tmp_path / "limits.json")
    config.tools.recording_directory = str(tmp_path / "store")
    config.tools.web_provider, config.experts.spend_cap_usd = "tavily", 1.0
    account = Account(1.0)
    with toolbox(config, account) as box:
        assert box.names[:5] == ("search", "enhance_reasoning", "answer", "web_search", "my_add")
        assert call(box, "my_add", {"a": 1, "b": 2}).text == "3"
        assert call(box, "my_add", {"a": 1, "b": 2}).receipt.is_cache_hit
        assert {type(tool).__name__ for tool in box.tools[3:]} == {"RecordedTool"}
        schemas = {tool.name: tool.parameters_schema for tool in box.tools}
    assert account.spent_usd == pytest.approx(0.25)  # what is replayed is paid once
    # Offline: no key, no server, no money.
    monkeypatch.delenv("TAVILY_API_KEY")
    monkeypatch.setattr("orchestra_jax.toolset.load_servers", None)
    config.tools.recording_mode, config.experts.spend_cap_usd = "replay", 0.0
    with toolbox(config, Account(0.0)) as box:
        assert {tool.name: tool.parameters_schema for tool in box.tools} == schemas
        replayed = call(box, "my_add", {"a": 1, "b": 2})
        assert (replayed.text, replayed.receipt.cost_usd) == ("3", 0.25)
        assert call(box, "my_add", {"a": 1, "b": 3}).receipt.reason == Reason.NOT_RECORDED
        assert call(box, "web_search", {"query": "x"}).receipt.reason == Reason.NOT_RECORDED
    (tmp_path / "mcp.json").write_text("[]")
    with pytest.raises(ValueError, match="were not recorded"), toolbox(config):
        pass


def test_faults_are_drawn_anew_for_each_attempt_that_the_limits_allow(tmp_path):
    (tmp_path / "limits.json").write_text(json.dumps({"search": {"timeout_s": 20, "max_attempts": 2}}))
    config = RunConfig()
    config.tools.limits_path, config.faults.busy_rate = str(tmp_path / "limits.json"), 1.0
    with toolbox(config) as box:
        result = call(box, "search", {"model": "expert-1"})
        assert (result.status, result.receipt.reason, result.receipt.attempt) == ("failed", Reason.RATE_LIMITED, 2)


def test_a_recorded_run_wraps_its_endpoints_and_no_simulated_expert(tmp_path):
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"gpt-5": {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}}))
    config = RunConfig()
    config.experts.endpoints_path, config.tools.recording_directory = str(path), str(tmp_path)
    experts = build_experts(config, Account(), open_store(config))
    assert isinstance(experts("gpt-5"), RecordedExpert) and isinstance(experts("gpt-5-mini"), SimulatedExperts)
    config.tools.recording_mode = "replay"
    with toolbox(config) as box:
        result = call(box, "answer", {"model": "expert-1"})
    assert (result.status, result.receipt.reason) == (CallStatus.FAILED, Reason.NOT_RECORDED)


def test_an_endpoint_that_the_toolbox_would_cut_is_named(tmp_path):
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"gpt-5": {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "timeout_s": 200}}))
    config = RunConfig()
    config.experts.endpoints_path = str(path)
    with pytest.raises(ValueError, match="'gpt-5' may take 200 s and episode.tool_timeout_s 150 would cut it"):
        build_experts(config, Account())
    config.episode.tool_timeout_s = 200.0
    build_experts(config, Account())


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        (load_limits, "[]", "the limits file .* is not understood"),
        (load_limits, '{"search": {}}', "is not understood: .*timeout_s"),
        (load_limits, '{"search": {"timeout_s": 0}}', "timeout_s must be positive"),
        (load_descriptions, '{"gpt-5": 3}', "holds no JSON object of texts by model"),
        (load_descriptions, "{", "cannot be read"),
    ],
)
def test_a_file_that_is_not_understood_is_named(read, text, told, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        read(str(tmp_path / "file.json"))
