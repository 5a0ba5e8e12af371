"""What an expert is good at, in a paragraph that a model writes after seeing it work (ToolOrchestra section 3.1).

Sample tasks, let the expert answer them, score the answers, and have a writer describe the expert from task, reply and
verdict. The writer sees neither the model's name nor the expert's price.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.experts.expert import Expert, ExpertReply, ExpertRequest
from orchestra_jax.rewards.outcome import score_answer
from orchestra_jax.seeds import derive_seed
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus

NUM_TASKS = 10  # the paper's
MAX_REPLY_CHARS = 400
INSTRUCTION = (
    "You are shown tasks that an assistant was given, what it answered, and whether the answer was right. Describe in "
    "a paragraph of at most 120 words what the assistant is strong and weak at, by kind of task, so that somebody can "
    "decide when to ask it. Do not mention single tasks or this request."
)


class Writer(Protocol):
    """Whoever writes the description, such as an EndpointExpert."""

    async def complete(self, messages: Sequence[Mapping[str, str]]) -> ExpertReply: ...


@dataclasses.dataclass(frozen=True)
class Description:
    """`replies` are the expert's, then the writer's: what the description consumed."""

    text: str
    num_solved: int
    num_tasks: int
    replies: tuple[ExpertReply, ...]


async def describe(
    offer: Offer, expert: Expert, tasks: Sequence[Task], writer: Writer, seed: int, num_tasks: int = NUM_TASKS
) -> Description:
    """Describes the expert that stands behind `offer`.

    Raises:
      ValueError: fewer tasks than are to be sampled, or a writer that gives no description.
    """
    if not 1 <= num_tasks <= len(tasks):
        raise ValueError(f"{num_tasks} tasks are to be sampled of {len(tasks)}: give more tasks, or sample fewer")
    rng = np.random.default_rng(derive_seed(seed, "describe", offer.model))
    chosen = [tasks[index] for index in rng.choice(len(tasks), num_tasks, replace=False)]
    shown, replies, num_solved = [], [], 0
    for number, task in enumerate(chosen):
        instance = Instance(f"describe/{number}", task, _NO_PREFERENCE, (offer,), derive_seed(seed, task.task_id))
        reply = await expert.reply(ExpertRequest("answer", instance, offer, Evidence(), False, 0))
        replies.append(reply)
        is_solved = reply.status == CallStatus.OK and score_answer(task, reply.text) == 1.0
        num_solved += is_solved
        answer = reply.text[:MAX_REPLY_CHARS] if reply.status == CallStatus.OK else "(no answer)"
        shown.append(
            f"Task ({task.family}, {task.kind}): {task.question}\nAnswer: {answer}\n{'right' if is_solved else 'wrong'}"
        )
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "\n\n".join(shown)}]
    written = await writer.complete(messages)
    text = " ".join(written.text.rsplit("</think>", 1)[-1].split())
    if written.status != CallStatus.OK or not text:
        raise ValueError(f"the writer gave no description of {offer.model}: {written.reason or written.status}")
    return Description(text, num_solved, num_tasks, (*replies, written))


_NO_PREFERENCE = Preference("none", "", {"outcome": 1.0})
