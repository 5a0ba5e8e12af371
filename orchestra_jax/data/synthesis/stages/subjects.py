"""Stage 1, subjects: brief -> what the entries of the database shall be about, so that they differ."""

from __future__ import annotations

from orchestra_jax.data.synthesis.records import Brief
from orchestra_jax.data.synthesis.writer import Rejected, Writer

MAX_CHARS = 80
SYSTEM = "You plan test data for a customer-service system. Answer with a JSON list of strings and nothing else."
PROMPT = (
    "Domain {name}: {description}\n\nName {count} different subjects that records of this domain can "
    "be about (kinds of "
    "customers, goods, places, situations), each in a few words. No two alike."
)


async def make_subjects(brief: Brief, count: int, writer: Writer) -> list[str | Rejected]:
    prompt = PROMPT.format(name=brief.name, description=brief.description, count=count)
    written = await writer.ask_json("subjects", SYSTEM, prompt)
    if not isinstance(written, list):
        raise Rejected("wrong form", "the subjects are no list")
    results: list[str | Rejected] = []
    seen = set()
    for each in written[:count]:
        if not isinstance(each, str) or not 1 <= len(each.strip()) <= MAX_CHARS:
            results.append(Rejected("wrong form", f"a subject has 1 to {MAX_CHARS} characters, got {each!r}"))
        elif (words := " ".join(each.lower().split())) in seen:
            results.append(Rejected("repeated", f"the subject {each!r} came before"))
        else:
            seen.add(words)
            results.append(each.strip())
    return results
