"""What a run is fed with: tasks, preferences, offers, and the instances made of them. No jax, no I/O."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of the search corpus."""

    document_id: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A question with a checkable answer.

    `family` x `kind` says what makes the question hard, and both are visible in its wording. `evidence_tool` is the
    tool whose result can hold the evidence: for `search` the documents `gold_document_ids` must all be retrieved, for
    `enhance_reasoning` the printed output of the program must be `answer`.
    """

    task_id: str
    family: str
    kind: str
    question: str
    answer: str
    evidence_tool: str
    gold_document_ids: tuple[str, ...] = ()  # search tasks
    query: str = ""  # search tasks: what a good writer searches for
    poor_query: str = ""  # search tasks: what a failing writer searches for; retrieves no gold document
    program: str = ""  # computation tasks: prints the answer
    poor_program: str = ""  # computation tasks: what a failing writer writes; does not print the answer
    wrong_answer: str = ""  # what an expert answers that does not know: plausible, and scored 0
    scorer: str = "exact"  # "exact", or the name of the reasoning-gym data set whose scorer judges
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)  # what that scorer reads


@dataclasses.dataclass(frozen=True)
class Preference:
    """What a user wants, in words for the policy and in weights for the reward.

    `weights` are by objective name; those of the gated objectives (outcome, cost_usd, latency_s) sum to 1, the one of
    `disallowed_calls` is the price of breaking a rule, paid by wrong answers too.
    """

    name: str
    text: str
    weights: dict[str, float]

    @property
    def is_local_only(self) -> bool:
        return self.weights.get("disallowed_calls", 0.0) > 0


ROLES = ("search", "enhance_reasoning", "answer")  # what an expert is called for; `answer` ends the episode


@dataclasses.dataclass(frozen=True)
class Offer:
    """One expert as it is offered to one instance, for some roles.

    `latency_s` is an `answer` call's where the expert answers (other roles take a share), else that of its own role.
    """

    alias: str
    model: str
    is_local: bool
    input_usd_per_million_tokens: float
    output_usd_per_million_tokens: float
    latency_s: float
    roles: tuple[str, ...] = ROLES


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that one task may cost and take. Infinite: no limit."""

    cost_usd: float = math.inf
    latency_s: float = math.inf

    @property
    def is_limited(self) -> bool:
        return math.isfinite(self.cost_usd) or math.isfinite(self.latency_s)


@dataclasses.dataclass(frozen=True)
class Instance:
    """Task + preference + experts on offer with prices and latencies + budget: what the G rollouts of a group share.

    `task` may be any record with a task_id that the environment knows (environments.functions.task.FunctionTask).
    `seed` decides, with the expert and the rollout index, every draw of the simulated experts.
    """

    instance_id: str
    task: Task
    preference: Preference
    offers: tuple[Offer, ...]
    seed: int
    budget: Budget = Budget()

    def offer(self, alias: str) -> Offer | None:
        return next((offer for offer in self.offers if offer.alias == alias), None)
