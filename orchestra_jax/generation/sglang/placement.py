"""Which server a request goes to: the one that holds its prefix. Knows no HTTP.

A session stays where its last turn was. A new one goes where the same prompt went before, so that the rollouts of one
prompt share its prefill, unless that server has `SLACK` more requests under way than the least busy one. What is
remembered holds until the weights change, and the caches with them.
"""

from __future__ import annotations

from collections.abc import Sequence

SLACK = 4


class Placement:
    def __init__(self):
        self._by_session: dict[str, str] = {}
        self._by_prompt: dict[int, str] = {}

    def choose(self, session_id: str, tokens: Sequence[int], load_by_url: dict[str, int]) -> str:
        """One of the servers in `load_by_url`, which holds how many requests are under way at each."""
        prompt = hash(tuple(tokens))
        least = min(load_by_url, key=load_by_url.get)
        chosen = self._by_session.get(session_id)
        if chosen not in load_by_url:
            chosen = self._by_prompt.get(prompt)
            if chosen not in load_by_url or load_by_url[chosen] > load_by_url[least] + SLACK:
                chosen = least
        self._by_session[session_id] = self._by_prompt[prompt] = chosen
        return chosen

    def forget(self) -> None:
        self._by_session.clear()
        self._by_prompt.clear()
