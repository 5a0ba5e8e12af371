"""Outside calls recorded and replayed: the same results and receipts, and nobody is asked twice."""

import asyncio
import dataclasses
import json
import pathlib

import pytest

from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.recording import RecordedTool, Store
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason

TASK = Task("t", "geography", "one_hop", "", "", "search")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (), 0), 0, Evidence())


class Counter:
    """Says how often it was asked."""

    name, description, parameters_schema = "count", "Counts.", {"type": "object"}

    def __init__(self, status=CallStatus.OK):
        self.num_runs, self.status = 0, status

    async def run(self, arguments, context):
        self.num_runs += 1
        number = self.num_runs
        await asyncio.sleep(0)
        receipt = make_receipt(
            "count", service_s=0.1 + 0.2, queue_s=5.0, retry_s=1.0, attempt=2, fixed_cost_usd=0.1, status=self.status
        )
        evidence = Evidence(("a", "ü"), ("7",), "text")
        return ToolResult(f"run {number}", "ran", receipt, self.status, evidence, "answer", 3.0)


def run(tool, arguments, context=CONTEXT):
    return asyncio.run(tool.run(arguments, context))


def test_a_replay_is_the_recording_but_for_the_queue(tmp_path):
    recorded = run(RecordedTool(Counter(), Store(tmp_path, "record")), {"q": "ü", "n": 1})
    offline = Counter()
    replayed = run(RecordedTool(offline, Store(tmp_path, "replay")), {"n": 1, "q": "ü"})
    assert offline.num_runs == 0
    expected = dataclasses.replace(recorded.receipt, is_cache_hit=True, queue_s=0.0)
    assert replayed == dataclasses.replace(recorded, receipt=expected)
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["request"] == {"tool": "count", "arguments": {"q": "ü", "n": 1}}
    assert path.parent.name == path.stem[:2]


def test_recording_asks_once_what_went_well_and_again_what_failed(tmp_path):
    tool = Counter()
    recorded = RecordedTool(tool, Store(tmp_path, "record"))
    assert [run(recorded, {"q": 1}).text for _ in range(3)] == ["run 1"] * 3
    assert run(recorded, {"q": 2}).text == "run 2"
    broken = Counter(CallStatus.FAILED)
    recorded = RecordedTool(broken, Store(tmp_path, "record"))
    assert [run(recorded, {"q": 3}).text for _ in range(2)] == ["run 1", "run 2"]
    replayed = run(RecordedTool(Counter(), Store(tmp_path, "replay")), {"q": 3})
    assert (replayed.text, replayed.status) == ("run 2", CallStatus.FAILED)


def test_two_that_ask_the_same_at_once_are_one_call(tmp_path):
    tool = Counter()
    recorded = RecordedTool(tool, Store(tmp_path, "record"))

    async def go():
        return await asyncio.gather(*(recorded.run({"q": q}, CONTEXT) for q in (1, 1, 2)))

    first, same, other = asyncio.run(go())
    assert tool.num_runs == 2 and (first.text == same.text) and (first.text != other.text)
    assert [each.receipt.is_cache_hit for each in (first, same, other)] == [False, True, False]


def test_what_was_not_recorded_has_failed_for_that_reason(tmp_path):
    result = run(RecordedTool(Counter(), Store(tmp_path, "replay")), {"q": 1})
    assert (result.status, result.receipt.reason) == (CallStatus.FAILED, Reason.NOT_RECORDED)
    assert result.receipt.cost_usd == 0.0


def test_a_tool_with_a_state_is_known_by_its_place_too(tmp_path):
    recorded = RecordedTool(Counter(), Store(tmp_path, "record"), is_stateful=True)
    second = dataclasses.replace(CONTEXT, call_number=1)
    other = dataclasses.replace(CONTEXT, rollout_index=1)
    assert [run(recorded, {}, each).text for each in (CONTEXT, second, other, CONTEXT)] == [
        "run 1", "run 2", "run 3", "run 1",
    ]  # fmt: skip


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="record or replay, not 'off'"):
        Store(tmp_path, "off")
    with pytest.raises(ValueError, match="no recording at .*nothing"):
        Store(tmp_path / "nothing", "replay")
    store = Store(tmp_path, "record")
    store.save({"a": 1}, {"b": 2})
    (path,) = pathlib.Path(tmp_path).rglob("*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="is broken .* record it again"):
        store.load({"a": 1})
