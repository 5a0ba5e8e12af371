"""The experts that an orchestrator can call: which model stands behind which anonymous alias.

An alias keeps its model, as in the ToolOrchestra release; which experts are on offer, their price and their latency are
drawn per instance (`data/instances.py`).
"""

from __future__ import annotations

import dataclasses

from orchestra_jax.data.records import ROLES as ROLES


@dataclasses.dataclass(frozen=True)
class ExpertEntry:
    """One line of the catalog. `is_local`: its weights are open and run on the user's own machines."""

    alias: str
    model: str
    is_local: bool


EXPERTS = (
    ExpertEntry("expert-1", "gpt-5", is_local=False),
    ExpertEntry("expert-2", "gpt-5-mini", is_local=False),
    ExpertEntry("expert-3", "Qwen3-32B", is_local=True),
    ExpertEntry("expert-4", "Llama-3.3-70B-Instruct", is_local=True),
    ExpertEntry("expert-5", "Qwen2.5-Math-72B-Instruct", is_local=True),
    ExpertEntry("expert-6", "DeepSeek-R1", is_local=False),
)
