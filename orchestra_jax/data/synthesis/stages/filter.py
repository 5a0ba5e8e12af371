"""Stage 10, filter: a task stays if its golden calls run, doing nothing does not solve it, and a solver once does.

Source: ToolOrchestra section 3.3: dropped are tasks whose golden calls fail, that nobody solves in pass@k (k = 8), and
that are solved without an action. Near-duplicates go in `duplicates.py`.
"""

from __future__ import annotations

import asyncio

from orchestra_jax.data.synthesis.solver import Solver
from orchestra_jax.data.synthesis.writer import Rejected
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.success import BadTask, judge, run_gold
from orchestra_jax.environments.functions.task import FunctionTask


async def filter_task(domain: Domain, task: FunctionTask, solver: Solver, num_attempts: int) -> FunctionTask:
    """The task as it came. Attempts stop at the first success; Rejected says which filter it did not pass."""
    try:
        gold = await asyncio.to_thread(run_gold, domain, task)
    except BadTask as error:
        raise Rejected("golden calls fail", str(error)) from error
    if judge(gold, task, domain.open_database(), ()).outcome:
        raise Rejected("solved without action", f"{task.task_id} is solved by doing and saying nothing")
    for number in range(num_attempts):
        played = await solver.attempt(domain, task, number)
        if judge(gold, task, played.database, played.texts_to_user).outcome:
            return task
    raise Rejected("never solved", f"{solver.name} solves {task.task_id} in none of {num_attempts} attempts")
