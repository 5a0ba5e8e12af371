"""One episode of a tau2 task on our database, and its reward as tau2-bench computes it.

    reward = product over the task's reward basis of
        DB             both databases equal those behind the golden actions
        COMMUNICATE    each string stands in what the agent said, case and the agent's commas aside
        ACTION         each golden action was made, its compared arguments equal
        ENV_ASSERTION  each assertion holds on the databases as they are
    and 0 unless agent or user ended the conversation. NL_ASSERTION needs a judge: a task with some has no reward here.

Source: sierra-research/tau2-bench, src/tau2/evaluator. As there, a golden action that fails is passed over, and what a
failing tool has written until then stays.
"""

from __future__ import annotations

import asyncio
import importlib
import json

from pydantic import BaseModel

from orchestra_jax.environments.tau2.toolkits import Tau2Domain

DEFAULT_BASIS = ("DB", "COMMUNICATE")
COMMON = ("calculate", "transfer_to_human_agents")  # tools of every domain that touch no database


def needs_judge(task: dict) -> bool:
    """Whether the reward of a task of tau2's file has assertions in words."""
    criteria = task["evaluation_criteria"]
    return "NL_ASSERTION" in (criteria.get("reward_basis") or ()) and bool(criteria.get("nl_assertions"))


class Tau2Session:
    """ValueError for a task with what this adapter does not know: initial data, a message history."""

    def __init__(self, domain: Tau2Domain, task_id: str):
        self.domain, self.task = domain, domain.tasks[task_id]
        self.tools = domain.agent.open()
        self.user_tools = domain.user.open() if domain.user else None
        self.calls: list[dict] = []
        self.texts: list[str] = []
        initial = self.task.get("initial_state") or {}
        for part in ("initialization_data", "message_history"):
            if initial.get(part):
                raise ValueError(f"tau2 task {task_id} has {part}, which is not supported")
        self._settle()
        for action in initial.get("initialization_actions") or ():
            self._run(action["env_type"], action["func_name"], action["arguments"])

    def call(self, name: str, arguments: dict, side: str = "assistant") -> tuple[str, bool]:
        """The result as text, and whether the tool raised. What it raised is the result."""
        self.calls.append({"name": name, "arguments": arguments, "requestor": side})
        return self._run(side, name, arguments)

    def say(self, text: str) -> None:
        """The agent to the user."""
        self.texts.append(text)

    def reward(self, is_ended: bool = True) -> tuple[float | None, dict[str, float]]:
        """The product and its factors; None where a factor needs a judge."""
        criteria = self.task["evaluation_criteria"]
        basis = criteria.get("reward_basis") or DEFAULT_BASIS
        checks = {
            "DB": self._is_database_equal,
            "COMMUNICATE": self._is_communicated,
            "ACTION": self._is_acted,
            "ENV_ASSERTION": self._holds,
        }
        factors = {name: float(checks[name](criteria)) for name in basis if name in checks}
        if needs_judge(self.task):
            return None, factors
        product = float(is_ended)
        for factor in factors.values():
            product *= factor
        return product, factors

    def replay_gold(self) -> None:
        for action in self.task["evaluation_criteria"].get("actions") or ():
            self.call(action["name"], action["arguments"], action.get("requestor") or "assistant")

    def _run(self, side: str, name: str, arguments: dict) -> tuple[str, bool]:
        toolkit = self.tools if side == "assistant" else self.user_tools
        try:
            if hasattr(toolkit, name):
                result, has_raised = getattr(toolkit, name)(**arguments), False
            elif name in COMMON:
                result, has_raised = _run_common(name, arguments), False
            else:
                result, has_raised = f"Error: there is no tool {name}", True
        except Exception as error:  # a tool of the benchmark: what it raises is its result
            result, has_raised = f"Error: {error}", True
        text = _as_text(result)
        self._settle()
        return text, has_raised

    def _settle(self) -> None:
        """Keeps the two sides in step, and commits both databases."""
        if self.user_tools is not None:
            self.domain.sync(self)
            self.user_tools.db.commit()
        self.tools.db.commit()

    def _is_database_equal(self, criteria: dict) -> bool:
        gold = Tau2Session(self.domain, self.task["id"])
        gold.replay_gold()
        is_user_equal = self.user_tools is None or self.user_tools.db.is_equal(gold.user_tools.db)
        return is_user_equal and self.tools.db.is_equal(gold.tools.db)

    def _is_communicated(self, criteria: dict) -> bool:
        said = [text.lower().replace(",", "") for text in self.texts]
        return all(any(each.lower() in text for text in said) for each in criteria.get("communicate_info") or ())

    def _is_acted(self, criteria: dict) -> bool:
        return all(any(_is_match(action, call) for call in self.calls) for action in criteria.get("actions") or ())

    def _holds(self, criteria: dict) -> bool:
        for each in criteria.get("env_assertions") or ():
            toolkit = self.tools if each["env_type"] == "assistant" else self.user_tools
            if getattr(toolkit, each["func_name"])(**each["arguments"]) != each.get("assert_value", True):
                return False
        return True


def _is_match(action: dict, call: dict) -> bool:
    if (action["name"], action.get("requestor") or "assistant") != (call["name"], call["requestor"]):
        return False
    compared = action.get("compare_args")
    names = call["arguments"] if compared is None else compared
    return all(call["arguments"].get(name) == action["arguments"].get(name) for name in names)


def _run_common(name: str, arguments: dict) -> str:
    module = importlib.import_module("inspect_evals.tau2.common.tools")
    return asyncio.run(getattr(module, name)()(**arguments))


def _as_text(result: object) -> str:
    return result if isinstance(result, str) else json.dumps(result, default=_as_plain, ensure_ascii=False)


def _as_plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)
