"""Makes an instance of a task: which experts are on offer, at which price and latency, under which preference.

Price level and latency are drawn independently per expert. Published prices and latencies are correlated, and then one
policy could please every preference at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.data.records import Budget, Instance, Offer, Preference, Task
from orchestra_jax.experts.catalog import EXPERTS, ROLES, Pool
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.seeds import derive_seed

NO_POOL = Pool()


def draw_offers(config: WorldConfig, seed: int) -> tuple[Offer, ...]:
    """`num_offered` experts in catalog order, at least one of them local, each with its own price level and latency."""
    rng = np.random.default_rng(seed)
    local = [index for index, expert in enumerate(EXPERTS) if expert.is_local]
    first = _one_of(rng, local)
    others = [index for index in range(len(EXPERTS)) if index != first]
    chosen = sorted([first, *rng.choice(others, size=config.num_offered - 1, replace=False).tolist()])
    offers = []
    for index in chosen:
        price = float(_one_of(rng, config.price_levels_usd_per_million_tokens))
        latency_s = float(_one_of(rng, config.latency_levels_s))
        expert = EXPERTS[index]
        offers.append(Offer(expert.alias, expert.model, expert.is_local, price, price, latency_s))
    return tuple(offers)


def _one_of(rng: np.random.Generator, values: Sequence):
    """What `rng.choice(values)` draws, in a fifth of its time."""
    return values[int(rng.integers(len(values)))]


def draw_pool_offers(pool: Pool, seed: int) -> tuple[Offer, ...]:
    """Offers of a pool for one instance, role after role in the pool's order: a subset, aliases, prices, latencies.

    A model has one price factor and one latency factor in all its roles.
    """
    rng = np.random.default_rng(derive_seed(seed, "pool"))
    models = list(dict.fromkeys(listing.model for listing in pool.listings))
    price_factors = dict(zip(models, rng.choice(pool.price_factors, len(models))))
    latency_factors = dict(zip(models, rng.choice(pool.latency_factors, len(models))))
    offers = []
    for role in ROLES:
        listings = [listing for listing in pool.listings if listing.role == role]
        least = min(pool.least_offered or len(listings), len(listings))
        size = int(rng.integers(least, len(listings) + 1))
        chosen = sorted(rng.choice(len(listings), size, replace=False).tolist())
        aliases = [listings[index].alias for index in chosen]
        aliases = rng.permutation(aliases).tolist() if pool.is_shuffled else aliases
        for index, alias in zip(chosen, aliases):
            listing = listings[index]
            price, latency = float(price_factors[listing.model]), float(latency_factors[listing.model])
            offers.append(
                Offer(
                    alias,
                    listing.model,
                    listing.is_local,
                    listing.input_usd_per_million_tokens * price,
                    listing.output_usd_per_million_tokens * price,
                    listing.latency_s * latency,
                    (role,),
                )
            )
    return tuple(offers)


def draw_budget(config: WorldConfig, seed: int) -> Budget:
    """The limits of a task, each drawn from its levels; none where there are no levels."""
    if not (config.budget_levels_usd or config.budget_levels_s):
        return Budget()
    rng = np.random.default_rng(derive_seed(seed, "budget"))
    limits = {
        name: float(rng.choice(levels))
        for name, levels in (("cost_usd", config.budget_levels_usd), ("latency_s", config.budget_levels_s))
        if levels
    }
    return Budget(**limits)


def make_instance(task: Task, preference: Preference, config: WorldConfig, seed: int, pool: Pool = NO_POOL) -> Instance:
    """The instance of `task` under `preference` for a draw `seed`; its offers come from a pool if it has listings.

    The offers depend on the seed and the task alone: the same draw under another preference differs in nothing else.
    """
    draw = derive_seed(seed, task.task_id)
    return Instance(
        instance_id=f"{task.task_id}/{preference.name}/{seed}",
        task=task,
        preference=preference,
        offers=draw_pool_offers(pool, draw) if pool.listings else draw_offers(config, draw),
        seed=draw,
        budget=draw_budget(config, draw),
    )
