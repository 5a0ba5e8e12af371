"""Who stands behind `call_expert`: a simulated adviser with a known skill, or a model behind an endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from orchestra_jax.environments.functions.tools import TELL_USER, AdviceRequest, render_transcript
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.expert import ExpertBound, ExpertReply
from orchestra_jax.seeds import derive_seed

ADVICE_TOKENS = (600, 60)  # input and output of a simulated reply

INSTRUCTIONS = (
    "You advise an agent that serves a user through functions. Read the rules, the functions and what has happened so "
    "far, and say which one call the agent should make next, with its arguments as JSON, or what it should tell the "
    "user if all is done. Reply in at most three sentences."
)


class SimulatedAdviser:
    """Knows the golden calls. With the skill of its model it names the first of them that was not made yet, else
    another function of the domain; the draw depends on instance, expert, rollout and progress alone."""

    def __init__(self, skills: Mapping[str, float]):
        self._skills = dict(skills)

    def bound(self, request: AdviceRequest) -> ExpertBound:
        return ExpertBound(*ADVICE_TOKENS, request.offer.latency_s)

    async def advise(self, request: AdviceRequest) -> ExpertReply:
        session, offer = request.session, request.offer
        made = [(call.name, call.arguments) for call, _ in session.transcript]
        left = [call for call in session.task.gold_calls if (call.name, call.arguments) not in made]
        right = " ".join([TELL_USER, *session.task.communicate_info])
        if left:
            right = f"{left[0].name} {json.dumps(left[0].arguments)}"
        rng = np.random.default_rng(derive_seed(request.seed, offer.alias, request.rollout_index, len(made)))
        is_right = rng.random() < self._skills[offer.model]
        others = [name for name in session.domain.functions_by_name if not right.startswith(name)]
        text = right if is_right else others[int(rng.integers(len(others)))]
        return ExpertReply(text, *ADVICE_TOKENS, offer.latency_s)


class EndpointAdviser:
    """A model that reads the domain's rules, its functions and the transcript. It is shown nothing of the gold."""

    def __init__(self, endpoint: EndpointExpert):
        self._endpoint = endpoint

    def bound(self, request: AdviceRequest) -> ExpertBound:
        return self._endpoint.bound_of(self._messages(request))

    async def advise(self, request: AdviceRequest) -> ExpertReply:
        return await self._endpoint.complete(self._messages(request))

    def _messages(self, request: AdviceRequest) -> list[dict[str, str]]:
        domain = request.session.domain
        schemas = "\n".join(json.dumps(function.schema["function"]) for function in domain.functions)
        system = f"{INSTRUCTIONS}\n\nRules:\n{domain.policy}\n\nFunctions:\n{schemas}"
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": render_transcript(request.session)},
        ]
