"""Stage 5, entry checks: what a schema cannot see is asked of a model, in three verdicts.

As in the paper: does it conform in type and meaning, do values agree across places, is it logical and natural.
"""

from __future__ import annotations

import json

from orchestra_jax.data.synthesis.records import DataModel, SubjectEntries
from orchestra_jax.data.synthesis.writer import Rejected, Writer

QUESTIONS = {
    "conforms": "does every value fit the type and the meaning of its field",
    "consistent": "do values agree wherever several places speak of the same thing",
    "natural": "is it all logical, and could it stand in a real system",
}
SYSTEM = (
    "You review test data. Answer with JSON alone, one verdict a question: "
    '{"conforms": {"is_ok": true, "reason": ""}, "consistent": {...}, "natural": {...}}'
)


async def check_entry(model: DataModel, made: SubjectEntries, checker: Writer) -> SubjectEntries:
    """The entries as they came. Rejected if one of the three verdicts is no."""
    asked = json.dumps({"questions": QUESTIONS, "schemas": model.entry_schemas, "entries": made.entries}, indent=1)
    verdicts = await checker.ask_json("entry checks", SYSTEM, asked)
    for name in QUESTIONS:
        verdict = verdicts.get(name) if isinstance(verdicts, dict) else None
        if not isinstance(verdict, dict) or not isinstance(verdict.get("is_ok"), bool):
            raise Rejected("no verdict", f"there is no verdict on {name!r}")
        if not verdict["is_ok"]:
            raise Rejected(f"not {name}", f"{made.subject}: {verdict.get('reason', '')}")
    return made
