"""The experts that an orchestrator can call: which model stands behind which anonymous alias.

`EXPERTS` are those of the simulated world. An alias keeps its model, as in the ToolOrchestra release; which experts are
on offer, their price and their latency are drawn per instance (`data/instances.py`).

A `Pool` is a list of real models by role, with the prices and latencies that are published for them, and how instances
are drawn from it (configs/catalog.py holds the paper's). A model that fills several roles has an alias in each.
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


@dataclasses.dataclass(frozen=True)
class Listing:
    """A model in a role of a pool. `latency_s` is the average of its calls in this role.

    `is_published`: price and latency are the release's; else they are our assumption.
    """

    role: str
    alias: str
    model: str
    input_usd_per_million_tokens: float
    output_usd_per_million_tokens: float
    latency_s: float
    is_local: bool
    is_published: bool = True


@dataclasses.dataclass(frozen=True)
class Pool:
    """Listings, and how an instance is drawn from them.

    Of each role between `least_offered` and all listings are on offer; `is_shuffled` deals the aliases of a role out
    anew; every price and every latency is its published value times a factor, drawn for each model. A pool without
    listings is none: the world's own EXPERTS are drawn from.
    """

    listings: tuple[Listing, ...] = ()
    least_offered: int = 0  # of each role; 0: all of them, always
    is_shuffled: bool = False
    price_factors: tuple[float, ...] = (1.0,)
    latency_factors: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        aliases = [listing.alias for listing in self.listings]
        if len(set(aliases)) < len(aliases):
            raise ValueError(f"the aliases of a pool must differ, got {sorted(aliases)}")
        if unknown := sorted({listing.role for listing in self.listings} - set(ROLES)):
            raise ValueError(f"roles {unknown} of a pool are not among {ROLES}")
        for name in ("price_factors", "latency_factors"):
            if not getattr(self, name) or not all(factor > 0 for factor in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} of a pool must be positive, and at least one")
        for role in ROLES if self.listings else ():
            models = [listing.model for listing in self.listings if listing.role == role]
            if not models or len(set(models)) < len(models):
                raise ValueError(f"a pool lists one model or more for {role!r}, and none twice, got {models}")
