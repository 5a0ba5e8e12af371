"""The environment of function-calling tasks: prompt, tools, and the objectives of an episode.

Two renderings, as for question answering. `compact`: the wish, the preference and the number of calls; results in one
word. `qwen3`: the domain's policy and all schemas in the system turn, results in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.session import Session
from orchestra_jax.environments.functions.success import Gold, judge, run_gold
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.environments.functions.tools import Adviser, CallExpert, CallPrice, FunctionTool, TellUser
from orchestra_jax.environments.functions.user import User
from orchestra_jax.environments.question_answering import render_budget, render_offers
from orchestra_jax.rewards.objectives import count_tool_calls
from orchestra_jax.tools.ledger import Totals
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.tool import Evidence, Tool
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallRecord, Message

NUM_CACHED_GOLDS = 65_536  # then all are forgotten
DELEGATION = (
    "Where you are not sure what to do, call an expert: a strong one for what is hard, a weak and cheap one for what "
    "is easy. Talk to the user through tell_user alone; the episode ends when the user is content."
)


@dataclasses.dataclass(frozen=True)
class FunctionSettings:
    is_compact: bool
    max_calls: int  # of any episode
    num_spare_calls: int = 2  # of a task, beside its golden calls and the one that tells the user
    price: CallPrice = CallPrice()
    tool_timeout_s: float = 30.0


class FunctionCalling:
    """An `Environment` (environment.py) over domains by name, which must have the same functions.

    `wrap` may put something between a tool and the toolbox, such as faults; `limits` are those of tools by name.
    ValueError without domains, or for domains whose functions differ.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        user: User,
        settings: FunctionSettings,
        advisers: Callable[[str], Adviser] | None = None,
        wrap: Callable[[Tool], Tool] = lambda tool: tool,
        limits: Mapping[str, Limits] | None = None,
    ):
        signatures = {str([function.schema for function in domain.functions]) for domain in domains.values()}
        if len(signatures) != 1:
            raise ValueError(f"the domains {sorted(domains)} must be one or more with the same functions")
        self.domains, self._settings = dict(domains), settings
        functions = next(iter(domains.values())).functions
        tools = [FunctionTool(function, settings.price) for function in functions]
        tools += [TellUser(user)] + ([CallExpert(advisers)] if advisers else [])
        self.toolbox = Toolbox([wrap(tool) for tool in tools], settings.tool_timeout_s, limits)
        self.max_calls = settings.max_calls
        self._has_experts = advisers is not None
        self._golds: dict[str, Gold] = {}

    def open(self, instance: Instance) -> Session:
        task = self._task(instance)
        domain = self.domains[task.domain]
        said = [Message("user", task.scenario.reason_for_call)]
        return Session(task, domain, domain.open_database(), self._num_calls(task), said)

    def prompt(self, instance: Instance) -> tuple[Sequence[Message], Sequence[dict]]:
        task = self._task(instance)
        parts = [task.scenario.reason_for_call, instance.preference.text, f"calls {self._num_calls(task)}"]
        if instance.budget.is_limited:
            parts.append(render_budget(instance.budget))
        if self._has_experts:
            parts.append(render_offers(instance.offers))
        user = Message("user", "\n".join(parts))
        if self._settings.is_compact:
            return [user], []
        system = "\n".join([self.domains[task.domain].policy, DELEGATION])
        schemas = [
            {
                "type": "function",
                "function": {"name": each.name, "description": each.description, "parameters": each.parameters_schema},
            }
            for each in self.toolbox.tools
        ]
        return [Message("system", system), user], schemas

    def is_evidence_present(self, instance: Instance, evidence: Evidence) -> bool:
        return False

    def observation(self, text: str, summary: str) -> str:
        return summary if self._settings.is_compact else text

    def objectives(
        self,
        instance: Instance,
        calls: Sequence[CallRecord],
        answer: str | None,
        totals: Totals,
        state: Session,
    ) -> dict[str, float]:
        """`answer` is None unless the user ended the conversation: then nothing is worth anything."""
        task = self._task(instance)
        success = judge(self._gold(task), task, state.database, state.texts_to_user)
        return {
            "outcome": 0.0 if answer is None else success.outcome,
            "cost_usd": totals.cost_usd,
            "latency_s": totals.latency_s,
            "disallowed_calls": 0.0,
            "database_equal": float(success.is_database_equal),
            "information_told": float(success.is_information_told),
            "entries_touched": float(success.is_all_touched),
            **count_tool_calls(calls, self.toolbox.names),
        }

    def _num_calls(self, task: FunctionTask) -> int:
        return min(self.max_calls, len(task.gold_calls) + 1 + self._settings.num_spare_calls)

    def _task(self, instance: Instance) -> FunctionTask:
        """ValueError for a task of another environment or domain."""
        task = instance.task
        if not isinstance(task, FunctionTask) or task.domain not in self.domains:
            raise ValueError(f"{instance.instance_id} is no task of the domains {sorted(self.domains)}")
        return task

    def _gold(self, task: FunctionTask) -> Gold:
        if task.task_id not in self._golds:
            if len(self._golds) == NUM_CACHED_GOLDS:
                self._golds.clear()
            self._golds[task.task_id] = run_gold(self.domains[task.domain], task)
        return self._golds[task.task_id]
