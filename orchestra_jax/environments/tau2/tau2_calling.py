"""tau2's tasks under the rollout driver: the benchmark's policy, tools and reward.

The user is played by a model, or by the script of functions/user.py, which knows no more of a tau2 scenario than its
sentences. Telecom's user has functions of their own, on a phone: they run in the worker too, on the user's database.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.function import FunctionBroken
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario
from orchestra_jax.environments.functions.tools import CallPrice, TellUser
from orchestra_jax.environments.functions.user import Signal, User, UserCall
from orchestra_jax.environments.tau2.server import Tau2Server
from orchestra_jax.environments.tau2.session import needs_judge
from orchestra_jax.tools.ledger import Totals, make_receipt
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import Toolbox, refused
from orchestra_jax.types import CallRecord, CallStatus, Message, Reason, ToolCall


@dataclasses.dataclass
class Tau2Episode:
    """The state of an episode; its database lives in the worker."""

    task: FunctionTask
    number: int
    max_calls: int
    said: list[Message]
    transcript: list[tuple[ToolCall, str]] = dataclasses.field(default_factory=list)
    signal: Signal = Signal.NONE
    user_tools: _UserTools | None = None


class _UserTools:
    """The user's functions of one episode, run in the worker: a `UserTools` (functions/user.py)."""

    def __init__(self, server: Tau2Server, schemas: Sequence[dict], number: int):
        self.schemas, self.calls = schemas, []
        self._server, self._number = server, number

    def run(self, call: ToolCall, num_said: int) -> str:
        result = call.error and f"Error: {call.error}"
        if not call.error:
            asked = {"session": self._number, "name": call.name, "arguments": call.arguments, "side": "user"}
            try:
                result = self._server.ask(do="call", **asked)["text"]
            except RuntimeError as error:
                raise FunctionBroken(str(error)) from error
        self.calls.append(UserCall(num_said, call, result))
        return result


class _Tool:
    """A function of the benchmark, run in the worker."""

    def __init__(self, server: Tau2Server, schema: dict, price: CallPrice):
        function = schema["function"]
        self.name, self.description = function["name"], function["description"]
        self.parameters_schema = function["parameters"]
        self._server, self._price = server, price

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        episode: Tau2Episode = context.state
        if context.call_number >= episode.max_calls:
            return refused(self.name, f"all {episode.max_calls} calls are spent", Reason.TOO_MANY_CALLS)
        price = {"service_s": self._price.latency_s, "fixed_cost_usd": self._price.cost_usd}
        try:
            asked = {"session": episode.number, "name": self.name, "arguments": arguments, "side": "assistant"}
            text = self._server.ask(do="call", **asked)["text"]
        except RuntimeError as error:
            receipt = make_receipt(self.name, **price, status=CallStatus.FAILED, reason=Reason.BROKEN_FUNCTION)
            return ToolResult(str(error), "failed", receipt, CallStatus.FAILED)
        episode.transcript.append((ToolCall(self.name, arguments), text))
        return ToolResult(text, text, make_receipt(self.name, **price))


class Tau2Calling:
    """An `Environment` (environment.py). ValueError for a domain that the interpreter cannot serve (server.py).

    `tasks` are the domain's whose reward needs no judge, in the order of its file; `judged_task_ids` are the others,
    `splits` the ids by name of a split. `user_schemas` are the functions of the domain's user, if there are any.
    """

    def __init__(
        self,
        domain: str,
        server_python: str,
        user: User,
        settings: FunctionSettings,
        checkout: str = "",
        is_any_version: bool = False,
    ):
        self._server, self._settings = Tau2Server(domain, server_python, checkout, is_any_version), settings
        described = self._server.ask(do="describe")
        self.source, self.version, self.digest = (described[name] for name in ("source", "version", "digest"))
        self.splits = described["splits"]
        self._policy, self.user_schemas = described["policy"], described["user_schemas"]
        self.tasks = tuple(read_task(domain, each) for each in described["tasks"] if not needs_judge(each))
        self.judged_task_ids = tuple(each["id"] for each in described["tasks"] if needs_judge(each))
        tools = [_Tool(self._server, schema, settings.price) for schema in described["schemas"]]
        self.toolbox = Toolbox([*tools, TellUser(user)], settings.tool_timeout_s)
        self.max_calls = settings.max_calls

    def open(self, instance: Instance) -> Tau2Episode:
        task = instance.task
        number = self._server.ask(do="open", task_id=task.task_id)["session"]
        episode = Tau2Episode(task, number, self.max_calls, [Message("user", task.scenario.reason_for_call)])
        if self.user_schemas:
            episode.user_tools = _UserTools(self._server, self.user_schemas, number)
        weakref.finalize(episode, _forget, self._server, number)  # one that is cut is never judged
        return episode

    def prompt(self, instance: Instance) -> tuple[Sequence[Message], Sequence[dict]]:
        schemas = [
            {
                "type": "function",
                "function": {
                    "name": each.name,
                    "description": each.description,
                    "parameters": each.parameters_schema,
                },
            }
            for each in self.toolbox.tools
        ]
        user = f"{instance.task.scenario.reason_for_call}\n{instance.preference.text}"
        return [Message("system", self._policy), Message("user", user)], schemas

    def is_evidence_present(self, instance: Instance, evidence: Evidence) -> bool:
        return False

    def observation(self, text: str, summary: str) -> str:
        return text

    def objectives(
        self, instance: Instance, calls: Sequence[CallRecord], answer: str | None, totals: Totals, state: Tau2Episode
    ) -> dict[str, float]:
        """`outcome` is tau2's reward. RuntimeError for a task whose reward needs a judge."""
        for message in state.said:
            if message.role == "assistant":
                self._server.ask(do="say", session=state.number, text=message.content)
        judged = self._server.ask(do="reward", session=state.number, is_ended=answer is not None)
        if judged["reward"] is None:
            raise RuntimeError(f"tau2 task {instance.task.task_id} needs a judge: leave it out")
        return {
            "outcome": judged["reward"],
            "cost_usd": totals.cost_usd,
            "latency_s": totals.latency_s,
            "disallowed_calls": 0.0,
            **{f"tau2/{name.lower()}": factor for name, factor in judged["factors"].items()},
        }

    def close(self) -> None:
        self._server.close()


def _forget(server: Tau2Server, number: int) -> None:
    try:
        server.ask(do="close", session=number)
    except RuntimeError:  # the worker has ended, or was closed
        pass


def read_task(domain: str, raw: dict) -> FunctionTask:
    """A task of tau2's file; instructions that are one text become the reason for the call."""
    instructions = raw["user_scenario"]["instructions"]
    if isinstance(instructions, str):
        instructions = {"reason_for_call": instructions}
    criteria = raw["evaluation_criteria"]
    names = ("reason_for_call", "known_info", "unknown_info", "task_instructions")
    actions = criteria.get("actions") or ()
    return FunctionTask(
        task_id=raw["id"],
        domain=domain,
        scenario=UserScenario(
            **{name: instructions.get(name) or "" for name in names}, persona=raw["user_scenario"].get("persona") or ""
        ),
        gold_calls=tuple(GoldCall(name=each["name"], arguments=each["arguments"]) for each in actions),
        communicate_info=tuple(criteria.get("communicate_info") or ()),
        difficulty=max(len(actions), 1),
    )
