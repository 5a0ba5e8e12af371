"""Gold replay and the no-op baselines of a tau2 domain, as one JSON line a task; run by the interpreter that has it.

python -m orchestra_jax.environments.tau2.replay retail [--checkout DIR] [--any_version]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence

from orchestra_jax.environments.tau2.session import Tau2Session
from orchestra_jax.environments.tau2.source import domain_of_command_line
from orchestra_jax.environments.tau2.toolkits import Tau2Domain


def replay_gold(domain: Tau2Domain, task_id: str) -> Tau2Session:
    """The golden actions, then the information in one sentence."""
    session = Tau2Session(domain, task_id)
    session.replay_gold()
    session.say("; ".join(session.task["evaluation_criteria"].get("communicate_info") or ["Done."]))
    return session


def do_nothing(domain: Tau2Domain, task_id: str, is_informed: bool) -> Tau2Session:
    """No call at all; `is_informed` says the information all the same."""
    session = Tau2Session(domain, task_id)
    information = session.task["evaluation_criteria"].get("communicate_info") if is_informed else None
    session.say("; ".join(information or ["Done."]))
    return session


def check(domain: Tau2Domain) -> Iterator[dict[str, object]]:
    """For each task its basis, and the reward of gold, of nothing, and of nothing but the information."""
    for task_id in domain.tasks:
        start_s = time.process_time()
        session = replay_gold(domain, task_id)
        reward, factors = session.reward()
        yield {
            "task_id": task_id,
            "num_calls": len(session.calls),
            "gold": reward,
            "factors": factors,
            "no_op": do_nothing(domain, task_id, is_informed=False).reward()[0],
            "informed_no_op": do_nothing(domain, task_id, is_informed=True).reward()[0],
            "cpu_s": time.process_time() - start_s,
        }


def main(arguments: Sequence[str]) -> None:
    domain = domain_of_command_line(arguments)
    print(json.dumps({"source": domain.source, "version": domain.version, "digest": domain.digest}))
    for line in check(domain):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
