"""Stage 8, tasks: functions, entries and an intent -> a task in the form of environments/functions/task.py."""

from __future__ import annotations

import json

import jsonschema

from orchestra_jax.data.loaders.rows import STRING, TEXT, RowError, check_schema, list_schema, object_schema
from orchestra_jax.data.synthesis.records import Brief, FunctionSource, SubjectEntries
from orchestra_jax.data.synthesis.writer import Rejected, Writer
from orchestra_jax.environments.functions.success import is_told
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario

MAX_INFO_CHARS = 60
SYSTEM = "You write test cases for a customer-service agent that calls functions. Answer with JSON alone."
FORM_TEXT = (
    'Form: {"reason_for_call": "what the customer says first, in the second person", "known_info": "what the customer '
    'knows, ids included", "unknown_info": "what the customer is asked in vain", '
    '"task_instructions": "how the customer '
    'behaves, and what to insist on", "actions": [{"name": "...", "arguments": {...}}], '
    '"communicate_info": ["one short '
    'string that the agent must tell, such as a number, and that the customer does not know"]}\nThe '
    "actions are the exact "
    "calls, in order, that do what is asked and nothing else; they must run on the entries as they are."
)
PROMPT = (
    "Domain {name}.\n\nFunctions:\n{functions}\n\nEntries:\n{entries}\n\nThe customer's purpose: {intent}\n\n{form}"
)
FORM = object_schema(
    {
        "reason_for_call": TEXT,
        "known_info": STRING,
        "actions": list_schema(object_schema({"name": TEXT, "arguments": {"type": "object"}}), least=1),
        "communicate_info": list_schema({"type": "string", "minLength": 1, "maxLength": MAX_INFO_CHARS}),
    },
    {"unknown_info": STRING, "task_instructions": STRING},
)


async def make_task(
    brief: Brief, functions: list[FunctionSource], part: SubjectEntries, intent: str, number: int, writer: Writer
) -> FunctionTask:
    """A task about the entries of one subject."""
    prompt = PROMPT.format(
        name=brief.name,
        functions=show_functions(functions),
        entries=json.dumps(part.entries, indent=1),
        intent=intent,
        form=FORM_TEXT,
    )
    written = await writer.ask_json("tasks", SYSTEM, prompt, number)
    return read_task(written, f"{brief.name}/{number}", brief.name, 1, functions)


def show_functions(functions: list[FunctionSource]) -> str:
    return "\n".join(
        json.dumps({"name": each.name, "description": each.description, "parameters": each.parameters_schema})
        for each in functions
    )


def read_task(
    written: object, task_id: str, domain: str, difficulty: int, functions: list[FunctionSource]
) -> FunctionTask:
    """Rejected for a task that is not of the form, or calls what is not there with what does not fit."""
    try:
        check_schema(FORM, written, "the task")
    except RowError as error:
        raise Rejected("wrong form", str(error)) from error
    by_name = {each.name: each for each in functions}
    for number, action in enumerate(written["actions"]):
        if action["name"] not in by_name:
            raise Rejected(
                "unknown function", f"action {number} of {task_id} calls {action['name']!r}, which is not there"
            )
        schema = {**by_name[action["name"]].parameters_schema, "additionalProperties": False}
        error = next(jsonschema.Draft202012Validator(schema).iter_errors(action["arguments"]), None)
        if error is not None:
            raise Rejected("wrong arguments", f"action {number} of {task_id}, {action['name']}: {error.message}")
    for info in written["communicate_info"]:
        if is_told(info, [written["reason_for_call"], written["known_info"]]):
            raise Rejected("information given away", f"the customer of {task_id} says {info!r} and is to be told it")
    scenario = UserScenario(
        reason_for_call=written["reason_for_call"],
        known_info=written["known_info"],
        unknown_info=written.get("unknown_info", ""),
        task_instructions=written.get("task_instructions", ""),
    )
    return FunctionTask(
        task_id=task_id,
        domain=domain,
        scenario=scenario,
        gold_calls=tuple(GoldCall(name=each["name"], arguments=each["arguments"]) for each in written["actions"]),
        communicate_info=tuple(written["communicate_info"]),
        difficulty=difficulty,
    )
