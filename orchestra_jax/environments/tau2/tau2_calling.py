"""tau2's airline and retail tasks under the rollout driver: the benchmark's policy, tools and reward.

The user is played by a model, or by the script of functions/user.py, which knows no more of a tau2 scenario than its
sentences. Telecom's user has tools of their own, which no user here can call: that domain can be replayed, not played.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario
from orchestra_jax.environments.functions.tools import CallPrice, TellUser
from orchestra_jax.environments.functions.user import Signal, User
from orchestra_jax.environments.tau2.server import Tau2Server
from orchestra_jax.tools.ledger import Totals, make_receipt
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import Toolbox, refused
from orchestra_jax.types import CallRecord, CallStatus, Message, Reason, ToolCall

PLAYED = ("airline", "retail")


@dataclasses.dataclass
class Tau2Episode:
    """The state of an episode; its database lives in the worker."""

    task: FunctionTask
    number: int
    max_calls: int
    said: list[Message]
    transcript: list[tuple[ToolCall, str]] = dataclasses.field(default_factory=list)
    signal: Signal = Signal.NONE


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
            text = self._server.ask(do="call", session=episode.number, name=self.name, arguments=arguments)["text"]
        except RuntimeError as error:
            receipt = make_receipt(self.name, **price, status=CallStatus.FAILED, reason=Reason.BROKEN_FUNCTION)
            return ToolResult(str(error), "failed", receipt, CallStatus.FAILED)
        episode.transcript.append((ToolCall(self.name, arguments), text))
        return ToolResult(text, text, make_receipt(self.name, **price))


class Tau2Calling:
    """An `Environment` (environment.py). ValueError for a domain that can only be replayed.

    `tasks` are the domain's, in the order of its file.
    """

    def __init__(self, domain: str, server_python: str, user: User, settings: FunctionSettings):
        if domain not in PLAYED:
            raise ValueError(f"tau2 domain {domain!r} is not one of {PLAYED}: it can be replayed, not played")
        self._server, self._settings = Tau2Server(domain, server_python), settings
        described = self._server.ask(do="describe")
        self.version, self.digest = described["version"], described["digest"]
        self._policy = described["policy"]
        self.tasks = tuple(read_task(domain, each) for each in described["tasks"])
        tools = [_Tool(self._server, schema, settings.price) for schema in described["schemas"]]
        self.toolbox = Toolbox([*tools, TellUser(user)], settings.tool_timeout_s)
        self.max_calls = settings.max_calls

    def open(self, instance: Instance) -> Tau2Episode:
        task = instance.task
        number = self._server.ask(do="open", task_id=task.task_id)["session"]
        episode = Tau2Episode(task, number, self.max_calls, [Message("user", task.scenario.reason_for_call)])
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
    except (RuntimeError, ValueError):  # the worker has ended, or was closed
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
