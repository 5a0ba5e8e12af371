"""Stage 9, evolution: a task -> a harder one of the same form: more golden calls, entities or conditions."""

from __future__ import annotations

import json

from orchestra_jax.data.synthesis.records import Brief, FunctionSource, SubjectEntries
from orchestra_jax.data.synthesis.stages.tasks import FORM_TEXT, SYSTEM, read_task, show_functions
from orchestra_jax.data.synthesis.writer import Rejected, Writer
from orchestra_jax.environments.functions.task import FunctionTask

PROMPT = (
    "Domain {name}.\n\nFunctions:\n{functions}\n\nEntries:\n{entries}\n\nA test "
    "case:\n{task}\n\nMake it harder: a second "
    "wish, one more entity, a condition that decides which of two things is done. It still has one "
    "right outcome.\n{form}"
)


async def evolve_task(
    brief: Brief, functions: list[FunctionSource], part: SubjectEntries, task: FunctionTask, writer: Writer
) -> FunctionTask:
    """The harder task, of difficulty one more. Rejected also where it is no harder."""
    prompt = PROMPT.format(
        name=brief.name,
        functions=show_functions(functions),
        entries=json.dumps(part.entries, indent=1),
        task=task.model_dump_json(indent=1),
        form=FORM_TEXT,
    )
    written = await writer.ask_json("evolution", SYSTEM, prompt)
    harder = read_task(written, f"{task.task_id}/harder", task.domain, task.difficulty + 1, functions)
    gained = len(harder.gold_calls) - len(task.gold_calls), len(harder.communicate_info) - len(task.communicate_info)
    if gained[0] < 0 or max(gained) <= 0:
        raise Rejected(
            "no harder", f"{harder.task_id} has {len(harder.gold_calls)} golden calls, as many or fewer than before"
        )
    return harder
