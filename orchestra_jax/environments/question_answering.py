"""Question answering with delegation: the prompt, the tools, and the objectives of the default world.

The same instance is rendered in two ways. `compact`: question, preference and the experts on offer, under 100 tokens
with the small tokenizer; the results of calls are one-line summaries. `qwen3`: the tools as JSON schemas with the
experts in the argument's description, as in the ToolOrchestra release, and the results in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestra_jax.data.records import Budget, Instance, Offer
from orchestra_jax.experts.delegation import PARAMETERS_SCHEMA, is_evidence_present
from orchestra_jax.experts.judge import Judge, Verdict
from orchestra_jax.rewards.objectives import Objective, count_tool_calls
from orchestra_jax.rewards.outcome import score_answer
from orchestra_jax.tools.ledger import Totals
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallRecord, CallStatus, Message, ToolCall

SYSTEM_TEXT = (
    "You are an orchestrator. You do not answer yourself: you call tools, each done by an expert that you choose, "
    "until `answer` ends the task. Mind what the user prefers."
)

MIN_WEIGHT_TO_LIST = 0.1  # of price or time, for a thought to restate that list


def reference_objectives(reference_cost_usd: float, reference_latency_s: float) -> tuple[Objective, ...]:
    """The objectives of the default world, in the order of every objective vector."""
    return (
        Objective("outcome", "maximize", 0.0, 1.0),
        Objective("cost_usd", "minimize", 0.0, reference_cost_usd),
        Objective("latency_s", "minimize", 0.0, reference_latency_s),
        Objective("disallowed_calls", "minimize", 0.0, 1.0, is_gated=False),
    )


def price_list(offers: Sequence[Offer], has_place: bool) -> str:
    """The experts on offer from the cheapest to the dearest, each behind its price per million tokens (and place).

    An alias stands behind its price, so that a causal model knows the price where it reads the alias.
    """
    words = ["price"]
    for offer in sorted(offers, key=lambda offer: offer.output_usd_per_million_tokens):
        words += ["local" if offer.is_local else "remote"] if has_place else []
        words += [f"${offer.output_usd_per_million_tokens:g}", offer.alias]
    return " ".join(words)


def latency_list(offers: Sequence[Offer]) -> str:
    """The experts on offer from the fastest to the slowest, each behind the seconds of an answer."""
    ordered = sorted(offers, key=lambda offer: offer.latency_s)
    return " ".join(["time", *(f"{offer.latency_s:g}s {offer.alias}" for offer in ordered)])


def render_offers(offers: Sequence[Offer]) -> str:
    """Who is on offer, in two lines: by price and by latency.

    One row an expert, with price and latency side by side, holds the same and is much slower to learn to read
    (docs/log.md): in an ordered list the place of an alias already says something of its price.
    """
    return f"{price_list(offers, has_place=True)}\n{latency_list(offers)}"


def render_budget(budget: Budget) -> str:
    """The limits of the task in one line; empty without any."""
    limits = [f"${budget.cost_usd:g}"] if math.isfinite(budget.cost_usd) else []
    limits += [f"{budget.latency_s:g}s"] if math.isfinite(budget.latency_s) else []
    return " ".join(["budget", *limits]) if limits else ""


def render_user_text(instance: Instance, has_table: bool) -> str:
    """Question, preference, budget and, if asked, the offers: last, so as to be read in the light of the others."""
    lines = [instance.task.question, instance.preference.text]
    if instance.budget.is_limited:
        lines.append(render_budget(instance.budget))
    if has_table:
        lines.append(render_offers(instance.offers))
    return "\n".join(lines)


def tool_schemas(toolbox: Toolbox, instance: Instance, descriptions: Mapping[str, str] | None = None) -> list[dict]:
    """The tools in the OpenAI function format.

    The `model` of a delegating tool is restricted to the aliases that are on offer for it; `descriptions`, by model,
    say what the models behind them are good at. Any other tool shows its own parameters.
    """
    schemas = []
    for tool in toolbox.tools:
        parameters = tool.parameters_schema
        if parameters is PARAMETERS_SCHEMA:
            offers = [offer for offer in instance.offers if tool.name in offer.roles]
            parameters = {**parameters, "properties": {"model": _model_schema(offers, descriptions or {})}}
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        schemas.append({"type": "function", "function": function})
    return schemas


def _model_schema(offers: Sequence[Offer], descriptions: Mapping[str, str]) -> dict[str, object]:
    known = [f"{offer.alias}: {descriptions[offer.model]}" for offer in offers if offer.model in descriptions]
    timed = "an answer" if all("answer" in offer.roles for offer in offers) else "a call"
    description = (
        f"The expert that does the work. Who is on offer, by price per million tokens and by time of {timed}:\n"
        f"{render_offers(offers)}"
    )
    return {
        **PARAMETERS_SCHEMA["properties"]["model"],
        "description": "\n".join([description, *known]),
        "enum": [offer.alias for offer in offers],
    }


def restate(instance: Instance) -> str:
    """The thinking of a demonstration: what the prompt says and never what to choose.

    Who is on offer, in the lists that the preference speaks of (by their aliases alone if it minds neither price nor
    time); then family, kind and preference, next to the call that they bear on.
    """
    weights = instance.preference.weights
    lists = []
    if weights["cost_usd"] >= MIN_WEIGHT_TO_LIST:
        lists.append(price_list(instance.offers, has_place=False))
    if weights["latency_s"] >= MIN_WEIGHT_TO_LIST:
        lists.append(latency_list(instance.offers))
    who = lists or [offer.alias for offer in instance.offers]
    return " ".join([*who, instance.task.family, instance.task.kind, instance.preference.name])


class QuestionAnswering:
    """An `Environment` (environment.py). `is_compact` chooses between the two renderings.

    `descriptions` of models (experts/descriptions.py) stand in the tools' schemas, beside the aliases. Without a
    `judge` the outcome is computed (rewards/outcome.py).
    """

    def __init__(
        self,
        toolbox: Toolbox,
        max_calls: int,
        is_compact: bool,
        descriptions: Mapping[str, str] | None = None,
        judge: Judge | None = None,
    ):
        self.toolbox = toolbox
        self.max_calls = max_calls
        self._is_compact = is_compact
        self._descriptions = dict(descriptions or {})
        self._judge = judge

    def open(self, instance: Instance) -> None:
        """Calls change nothing that outlives them."""

    def prompt(self, instance: Instance) -> tuple[Sequence[Message], Sequence[dict]]:
        user = Message("user", render_user_text(instance, has_table=self._is_compact))
        if self._is_compact:
            return [user], []
        return [Message("system", SYSTEM_TEXT), user], tool_schemas(self.toolbox, instance, self._descriptions)

    def is_evidence_present(self, instance: Instance, evidence: Evidence) -> bool:
        return is_evidence_present(instance, evidence)

    def observation(self, text: str, summary: str) -> str:
        return summary if self._is_compact else text

    def objectives(
        self, instance: Instance, calls: Sequence[CallRecord], answer: str | None, totals: Totals, state: None = None
    ) -> dict[str, float]:
        disallowed = sum(is_disallowed(instance, each.call) for each in calls if each.status == CallStatus.OK)
        return {
            "outcome": 0.0 if answer is None else score_answer(instance.task, answer),
            "cost_usd": totals.cost_usd,
            "latency_s": totals.latency_s,
            "disallowed_calls": float(disallowed),
            **count_tool_calls(calls, self.toolbox.names),
        }

    async def judge(self, instance: Instance, answer: str) -> Verdict:
        if self._judge is None:
            return Verdict(score_answer(instance.task, answer))
        return await self._judge.judge(instance.task, answer)


def is_disallowed(instance: Instance, call: ToolCall) -> bool:
    """Whether the call used an expert that the preference rules out."""
    offer = instance.offer(str(call.arguments.get("model")))
    return instance.preference.is_local_only and offer is not None and not offer.is_local
