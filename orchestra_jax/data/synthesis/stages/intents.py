"""Stage 7, intents: brief and functions -> short purposes that a customer may call with."""

from __future__ import annotations

import json

from orchestra_jax.data.synthesis.records import Brief, FunctionSource
from orchestra_jax.data.synthesis.writer import Rejected, Writer

MAX_CHARS = 200
SYSTEM = "You plan test cases for a customer-service system. Answer with a JSON list of strings and nothing else."
PROMPT = (
    "Domain {name}: {description}\n\nFunctions:\n{functions}\n\nName {count} different purposes of a "
    "customer, one short "
    "sentence each, that need several of these functions one after the other and change something in the end."
)


async def make_intents(
    brief: Brief, functions: list[FunctionSource], count: int, writer: Writer
) -> list[str | Rejected]:
    shown = "\n".join(f"{each.name}({json.dumps(each.parameters_schema)}): {each.description}" for each in functions)
    prompt = PROMPT.format(name=brief.name, description=brief.description, functions=shown, count=count)
    written = await writer.ask_json("intents", SYSTEM, prompt)
    if not isinstance(written, list):
        raise Rejected("wrong form", "the intents are no list")
    results: list[str | Rejected] = []
    seen = set()
    for each in written[:count]:
        if not isinstance(each, str) or not 1 <= len(each.strip()) <= MAX_CHARS:
            results.append(Rejected("wrong form", f"an intent has 1 to {MAX_CHARS} characters, got {each!r}"))
        elif (words := " ".join(each.lower().split())) in seen:
            results.append(Rejected("repeated", f"the intent {each!r} came before"))
        else:
            seen.add(words)
            results.append(each.strip())
    return results
