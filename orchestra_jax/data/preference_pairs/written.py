"""Preference pairs that a model writes and another one checks (ToolOrchestra section 3.3).

A pair passes three checks: its form, its words against its vector in the eyes of the checker, and that it is no repeat.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from orchestra_jax.data.preference_pairs.pair import OBJECTIVES, PreferencePair, ToolListing, check_pair
from orchestra_jax.data.synthesis.report import StageReport
from orchestra_jax.data.synthesis.writer import Rejected, Writer

WRITE = (
    "You invent users of an assistant that calls tools. Given the tools with price, seconds and place, write what one "
    "such user asks for besides the task itself (one or two sentences, in the user's own voice, never naming a number "
    "from the vector), and the vector that says the same: one weight between 0 and 1 for each tool "
    "(how welcome a call of "
    "it is) and for outcome, cost_usd and latency_s (how much a right answer, a small bill, a short "
    "wait count). Answer "
    'with JSON alone: {"instruction": "...", "weights": {"<tool>": 0.0, "outcome": 0.0, "cost_usd": '
    '0.0, "latency_s": 0.0}}'
)
CHECK = (
    "You are given what a user asks for, the tools with price, seconds and place, and a vector of "
    "weights between 0 and "
    "1. Say whether the vector means what the user says: no tool weighed high that the user rules "
    "out, none weighed low "
    "that the user asks for, and money and time weighed as the user speaks of them. Answer with JSON alone: "
    '{"is_consistent": true or false, "reason": "one sentence"}'
)


async def write_pairs(
    tools: Sequence[ToolListing], num_pairs: int, writer: Writer, checker: Writer
) -> tuple[list[PreferencePair], StageReport]:
    """Up to `num_pairs` pairs, in the order of their samples, and what became of the others."""
    report = StageReport("preference pairs")
    results = await asyncio.gather(
        *(_write_pair(tools, number, writer, checker) for number in range(num_pairs)), return_exceptions=True
    )
    pairs: dict[str, PreferencePair] = {}
    for result in results:
        if isinstance(result, Rejected):
            report.reject(result)
        elif isinstance(result, BaseException):
            raise result
        elif (words := " ".join(result.text.lower().split())) in pairs:
            report.reject(Rejected("repeated", f"these words came before: {result.text[:80]!r}"))
        else:
            pairs[words] = result
            report.accept()
    return list(pairs.values()), report


async def _write_pair(tools: Sequence[ToolListing], number: int, writer: Writer, checker: Writer) -> PreferencePair:
    shown = json.dumps([vars(tool) for tool in tools], indent=1)
    written = await writer.ask_json("preference", WRITE, f"Tools:\n{shown}\nThis is user number {number + 1}.", number)
    if not isinstance(written, dict) or not isinstance(written.get("instruction"), str):
        raise Rejected("wrong form", "there is no instruction in words")
    if not isinstance(written.get("weights"), dict):
        raise Rejected("wrong form", "there are no weights by name")
    pair = PreferencePair("written", written["instruction"].strip(), written["weights"])
    if told := check_pair(pair, tools):
        raise Rejected("wrong vector", told)
    asked = json.dumps({"user": pair.text, "tools": [vars(tool) for tool in tools], "weights": pair.weights}, indent=1)
    verdict = await checker.ask_json("preference check", CHECK, asked)
    if not isinstance(verdict, dict) or not isinstance(verdict.get("is_consistent"), bool):
        raise Rejected("no verdict", "the checker gave no verdict")
    if not verdict["is_consistent"]:
        raise Rejected("inconsistent", f"the checker says: {verdict.get('reason', '')}")
    order = [*(tool.name for tool in tools), *OBJECTIVES]
    return PreferencePair("written", pair.text, {name: float(pair.weights[name]) for name in order})
