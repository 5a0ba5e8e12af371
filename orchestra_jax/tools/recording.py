"""Outside calls in a content-addressed store: what was asked, what came back, one file for each.

The address of a call is the SHA-256 of its request as canonical JSON, so a store can be copied, merged and looked into:

    <directory>/<first two hex digits>/<sha256>.json = {"request": {...}, "reply": {...}}

"record" asks what is not there yet, and again what had failed; "replay" asks nobody, and a call that is not there has
failed for that reason. What is replayed is charged as it was recorded, and marked as a cache hit. Of several that ask
for the same at once, one asks outside and the others wait for what it brings: a replay could not tell them apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from orchestra_jax.run_directory import json_value
from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.ledger import make_receipt, read_receipt
from orchestra_jax.tools.tool import Evidence, PricedTool, Tool, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason

MODES = ("record", "replay")


class Store:
    """A directory of recorded calls. ValueError for an unknown mode, or a replay from a directory that is not there."""

    def __init__(self, directory: str | os.PathLike, mode: str):
        if mode not in MODES:
            raise ValueError(f"a store is opened to {' or '.join(MODES)}, not {mode!r}")
        self._directory = pathlib.Path(directory)
        self.is_replay = mode == "replay"
        self._turns: weakref.WeakValueDictionary[pathlib.Path, asyncio.Lock] = weakref.WeakValueDictionary()
        if self.is_replay and not self._directory.is_dir():
            raise ValueError(f"no recording at {directory}: record one first, or give its directory")

    def turn(self, request: dict[str, object]) -> asyncio.Lock:
        """To be held from before the look into the store until the reply is saved."""
        return self._turns.setdefault(self._path(request), asyncio.Lock())

    def load(self, request: dict[str, object]) -> dict[str, object] | None:
        """What was recorded for this request; None if nothing was. ValueError for a file that is broken."""
        path = self._path(request)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return held["reply"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the recording {path} is broken ({error}): delete the file and record it again"
            ) from error

    def save(self, request: dict[str, object], reply: dict[str, object]) -> None:
        """Written whole or not at all, also where several processes record the same call."""
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        draft.write_text(json.dumps({"request": request, "reply": reply}, ensure_ascii=False), encoding="utf-8")
        os.replace(draft, path)

    def _path(self, request: dict[str, object]) -> pathlib.Path:
        text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._directory / digest[:2] / f"{digest}.json"


class RecordedTool:
    """A tool whose results come from a store, or go into it.

    A call is known by the tool and the arguments alone; with `is_stateful` also by instance, rollout and number within
    the episode, for tools that change what they work on.
    """

    def __init__(self, tool: Tool, store: Store, is_stateful: bool = False):
        self.name, self.description, self.parameters_schema = tool.name, tool.description, tool.parameters_schema
        self._tool, self._store, self._is_stateful = tool, store, is_stateful

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return self._tool.quote(arguments, context) if isinstance(self._tool, PricedTool) else Quote(0.0)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        request: dict[str, object] = {"tool": self.name, "arguments": arguments}
        if self._is_stateful:
            request["at"] = [context.instance.instance_id, context.rollout_index, context.call_number]
        async with self._store.turn(request):
            held = self._store.load(request)
            if held is not None and (self._store.is_replay or held["status"] == CallStatus.OK):
                return _read_result(held)
            if self._store.is_replay:
                receipt = make_receipt(
                    self.name, service_s=0.0, status=CallStatus.FAILED, attempt=0, reason=Reason.NOT_RECORDED
                )
                return ToolResult("this call was not recorded", "not recorded", receipt, CallStatus.FAILED)
            result = await self._tool.run(arguments, context)
            self._store.save(request, json_value(result, "result"))
            return result


class ReplayedTool:
    """What a replay knows of a tool that is not there: how it was described. It stands behind a `RecordedTool`."""

    def __init__(self, name: str, description: str, parameters_schema: dict[str, object], cost_usd: float):
        self.name, self.description, self.parameters_schema = name, description, parameters_schema
        self._cost_usd = cost_usd

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return Quote(self._cost_usd)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        raise AssertionError(f"{self.name} is replayed and has nobody to ask")


class ListedTool(Tool, Protocol):
    """A tool of a server, each call of which costs the same."""

    cost_usd: float


def recorded_listing(
    request: dict[str, object], store: Store, make: Callable[[], Sequence[ListedTool]]
) -> Sequence[Tool]:
    """The tools that `make` finds outside, their descriptions recorded; from a replay, tools by these descriptions.

    ValueError for a replay in which they were not recorded.
    """
    if not store.is_replay:
        tools = make()
        described = [[tool.name, tool.description, tool.parameters_schema, tool.cost_usd] for tool in tools]
        store.save(request, {"tools": json_value(described, "tools")})
        return tools
    held = store.load(request)
    if held is None:
        raise ValueError(f"the tools of {request} were not recorded: record them, or take the file they are of")
    return [ReplayedTool(*described) for described in held["tools"]]


def _read_result(held: dict[str, object]) -> ToolResult:
    receipt = dataclasses.replace(read_receipt(held["receipt"]), is_cache_hit=True, queue_s=0.0)
    evidence = held["evidence"]
    return ToolResult(
        held["text"],
        held["summary"],
        receipt,
        CallStatus(held["status"]),
        Evidence(tuple(evidence["document_ids"]), tuple(evidence["printed"]), evidence["text"]),
        held["answer"],
        held["retry_after_s"],
    )
