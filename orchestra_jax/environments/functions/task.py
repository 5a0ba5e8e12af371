"""A task of a domain: who asks for what, the calls that do it, and what the user must be told.

Source: ToolOrchestra section 3.3 (instruction, golden calls, short information) and appendix I; the fields of the
scenario are those of tau2-bench and of the ToolScale release.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GoldCall(_Record):
    name: str
    arguments: dict[str, object] = Field(default_factory=dict)


class UserScenario(_Record):
    """What the user knows and wants. `facts` is what a scripted user can say when it is asked, by topic ("email");
    `unknown` are topics that it is asked in vain. A model that plays the user reads the sentences."""

    reason_for_call: str
    known_info: str = ""
    unknown_info: str = ""
    task_instructions: str = ""
    persona: str = ""
    facts: dict[str, str] = Field(default_factory=dict)
    unknown: tuple[str, ...] = ()


class FunctionTask(_Record):
    """`communicate_info`: short strings, each of which the policy must say to the user. `difficulty` counts from 1."""

    task_id: str
    domain: str
    scenario: UserScenario
    gold_calls: tuple[GoldCall, ...]
    communicate_info: tuple[str, ...] = ()
    difficulty: int = 1

    @property
    def question(self) -> str:
        """What is asked, for reports that show tasks of any kind."""
        return self.scenario.reason_for_call

    @property
    def answer(self) -> str:
        """What it takes, for the same reports."""
        calls = [f"{call.name}({', '.join(map(str, call.arguments.values()))})" for call in self.gold_calls]
        return "; ".join([*calls, *self.communicate_info])
