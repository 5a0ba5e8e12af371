"""Serves one tau2 domain over standard input and output, a JSON object a line; run by the interpreter that has it.

    {"do": "describe"}                                   -> {"source", "version", "digest", "policy", "schemas",
                                                             "user_schemas", "tasks", "splits"}
    {"do": "open", "task_id"}                            -> {"session"}
    {"do": "call", "session", "name", "arguments",
     "side": "assistant" or "user"}                      -> {"text", "has_raised"}
    {"do": "say", "session", "text"}                     -> {}
    {"do": "reward", "session", "is_ended"}              -> {"reward", "factors"}
    {"do": "close", "session"}                           -> {}

A mistake is answered with {"error": sentence}.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence

from orchestra_jax.environments.tau2.session import Tau2Session
from orchestra_jax.environments.tau2.source import domain_of_command_line
from orchestra_jax.environments.tau2.toolkits import Tau2Domain


class Sessions:
    """The episodes of one domain, by number."""

    def __init__(self, domain: Tau2Domain):
        self._domain, self._open = domain, {}
        self._numbers = itertools.count()

    def answer(self, request: dict) -> dict[str, object]:
        """KeyError for what is not there."""
        if request["do"] == "describe":
            domain = self._domain
            return {
                "source": domain.source,
                "version": domain.version,
                "digest": domain.digest,
                "policy": domain.policy,
                "schemas": domain.schemas("assistant"),
                "user_schemas": domain.schemas("user"),
                "tasks": list(domain.tasks.values()),
                "splits": domain.splits,
            }
        if request["do"] == "open":
            number = next(self._numbers)
            self._open[number] = Tau2Session(self._domain, request["task_id"])
            return {"session": number}
        session = self._open[request["session"]]
        if request["do"] == "call":
            text, has_raised = session.call(request["name"], request["arguments"], request["side"])
            return {"text": text, "has_raised": has_raised}
        if request["do"] == "say":
            session.say(request["text"])
            return {}
        if request["do"] == "reward":
            reward, factors = session.reward(request["is_ended"])
            return {"reward": reward, "factors": factors}
        del self._open[request["session"]]
        return {}


def serve(arguments: Sequence[str]) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a tool prints must not get between the answers
    try:
        sessions = Sessions(domain_of_command_line(arguments))
    except (ValueError, ImportError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = sessions.answer(json.loads(line))
        except (KeyError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
