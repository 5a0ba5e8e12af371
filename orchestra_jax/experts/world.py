"""The simulated world: who knows what, what a call consumes, and what money and time are worth.

Not measured from real models. The tables are made so that routing matters: every (family, kind) cell has its own order
of experts, the strongest one heads one kind of each family only, and evidence helps more where the question is harder.
`skill_tables(seed)` permutes the committed tables over experts and families, so that nothing hangs on one assignment.

The models of a pool (catalog.py) are simulated too: what one knows follows from the seed, its name and its price alone,
so it is the same in every pool,

    success with the evidence = 0.6 + 0.12 log10(output price in $ a million tokens) + uniform(-0.25, 0.25)

for each family and kind, within 0.3 and 0.97: the dearer model knows more on the whole, and not everywhere.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from orchestra_jax.data.questions import FAMILIES
from orchestra_jax.data.records import Offer
from orchestra_jax.experts.catalog import EXPERTS, ROLES, Listing, Pool
from orchestra_jax.seeds import derive_seed

NUM_KINDS = 2  # 0: small operands or one hop, 1: large operands or two hops
KIND_INDEX = {kind: index for kinds in FAMILIES.values() for index, kind in enumerate(kinds)}
FAMILY_INDEX = {family: index for index, family in enumerate(FAMILIES)}

# With the evidence at hand, the expert of rank r in a cell is right with this probability.
ANSWER_SUCCESS_BY_RANK = (0.97, 0.85, 0.73, 0.60, 0.45, 0.30)
# A good and a weak writer of search queries and programs.
GOOD_WRITER, WEAK_WRITER = 0.95, 0.40

# Of the models of a pool: success at $1, its rise with a factor of ten in price, how far a cell lies off, its limits.
POOL_SUCCESS, POOL_SUCCESS_PER_DECADE, POOL_SPREAD, POOL_SUCCESS_LIMITS = 0.6, 0.12, 0.25, (0.3, 0.97)
MAX_TREE_NODES = 50_000  # of the oracle's recursion (evaluation/oracle.py): minutes

# Experts by rank (best first; indices into EXPERTS) for each family and kind.
ANSWER_RANKING = {
    "arithmetic": ((0, 4, 2, 5, 1, 3), (4, 1, 0, 3, 5, 2)),
    "number_theory": ((5, 3, 4, 0, 2, 1), (0, 2, 5, 1, 4, 3)),
    "geography": ((3, 0, 1, 2, 5, 4), (0, 5, 3, 4, 2, 1)),
    "chemistry": ((0, 1, 3, 4, 2, 5), (2, 5, 4, 1, 3, 0)),
}
# The three good writers of each family.
GOOD_WRITERS = {"arithmetic": (1, 4, 2), "number_theory": (0, 4, 5), "geography": (0, 2, 3), "chemistry": (1, 3, 5)}


@dataclasses.dataclass
class WorldConfig:
    """What can be set about the world. Prices and latencies are levels, drawn independently per expert and instance."""

    seed: int = 0
    num_offered: int = 3
    price_levels_usd_per_million_tokens: tuple[float, ...] = (0.2, 5.0, 15.0)
    latency_levels_s: tuple[float, ...] = (2.0, 25.0, 60.0)
    writer_latency_share: float = 0.7  # of an answer's latency
    search_tokens: tuple[int, int] = (500, 200)  # input, output
    enhance_reasoning_tokens: tuple[int, int] = (500, 200)
    answer_tokens: tuple[int, int] = (1000, 500)
    evidence_tokens: int = 500  # further input of an answer that has evidence
    evidence_factor_by_kind: tuple[float, float] = (0.8, 0.6)  # success without evidence / success with it
    orchestrator_usd_per_million_tokens: float = 0.2  # Qwen3-8B's list price
    orchestrator_tokens_per_s: float = 200.0
    # What the oracle takes a turn of the orchestrator to be; the ledger charges the real tokens of each turn.
    orchestrator_nominal_context_tokens: int = 150
    orchestrator_nominal_turn_tokens: int = 20
    reference_cost_usd: float = 0.012
    reference_latency_s: float = 50.0
    max_calls: int = 2
    # A task's hard limits, drawn per instance; empty: there is none.
    budget_levels_usd: tuple[float, ...] = ()
    budget_levels_s: tuple[float, ...] = ()
    # Where the experts of an instance are drawn from, in training and in evaluation; without listings from EXPERTS, at
    # the levels above.
    training_pool: Pool = Pool()
    evaluation_pool: Pool = Pool()


@dataclasses.dataclass(frozen=True)
class SkillTables:
    """Success probabilities: F families, K kinds, E experts (order of `models`), V without and with the evidence."""

    answer_FKEV: np.ndarray  # [F, K, E, 2]
    writer_FE: np.ndarray  # [F, E]
    models: tuple[str, ...]


def pool_listings(config: WorldConfig) -> dict[str, Listing]:
    """The first listing of each model of the two pools; none without pools."""
    listings = (*config.training_pool.listings, *config.evaluation_pool.listings)
    return {listing.model: listing for listing in reversed(listings)}


def model_names(config: WorldConfig) -> tuple[str, ...]:
    """The models that can be on offer, in the order of every table's columns: sorted, or the catalog's."""
    return tuple(sorted(pool_listings(config))) or tuple(expert.model for expert in EXPERTS)


def expert_names(config: WorldConfig) -> tuple[str, ...]:
    """What the columns are called in a report: by alias, or by model where a pool deals the aliases out."""
    return model_names(config) if pool_listings(config) else tuple(expert.alias for expert in EXPERTS)


def check_pools(config: WorldConfig) -> None:
    """ValueError for one pool without the other, and for what the oracle cannot evaluate."""
    training, evaluation = config.training_pool, config.evaluation_pool
    if bool(training.listings) != bool(evaluation.listings):
        raise ValueError("world.training_pool and world.evaluation_pool go together: one has listings, give the other")
    if evaluation.is_shuffled:
        raise ValueError(
            "world.evaluation_pool has shuffled aliases, and the oracle takes it as known who stands behind an alias: "
            "set is_shuffled=False there"
        )
    writers = [listing for listing in evaluation.listings if listing.role != ROLES[-1]]
    num_choices = 2 * (len(writers) if evaluation.listings else len(ROLES[:-1]) * len(EXPERTS))
    num_nodes = sum(num_choices**depth for depth in range(config.max_calls))
    if num_nodes > MAX_TREE_NODES:
        raise ValueError(
            f"world.max_calls {config.max_calls} makes a tree of {num_nodes} nodes for the oracle, of at most "
            f"{MAX_TREE_NODES}: lower it, or offer fewer experts"
        )


def skill_tables(config: WorldConfig) -> SkillTables:
    """The committed tables for seed 0; for another seed the same ones with experts and families permuted.

    With pools those of their models (see the top of the file).
    """
    if pool_listings(config):
        return _pool_skill_tables(config)
    answer_FKE = np.zeros((len(FAMILIES), NUM_KINDS, len(EXPERTS)))
    writer_FE = np.full((len(FAMILIES), len(EXPERTS)), WEAK_WRITER)
    for f, family in enumerate(FAMILIES):
        for k, ranking in enumerate(ANSWER_RANKING[family]):
            answer_FKE[f, k, list(ranking)] = ANSWER_SUCCESS_BY_RANK
        writer_FE[f, list(GOOD_WRITERS[family])] = GOOD_WRITER
    if config.seed:
        rng = np.random.default_rng(config.seed)
        families, experts = rng.permutation(len(FAMILIES)), rng.permutation(len(EXPERTS))
        answer_FKE = answer_FKE[families][:, :, experts]
        writer_FE = writer_FE[families][:, experts]
    return _with_factor(config, answer_FKE, writer_FE)


def _pool_skill_tables(config: WorldConfig) -> SkillTables:
    listings = pool_listings(config)
    answer_FKE = np.zeros((len(FAMILIES), NUM_KINDS, len(listings)))
    writer_FE = np.zeros((len(FAMILIES), len(listings)))
    for e, model in enumerate(model_names(config)):
        rng = np.random.default_rng(derive_seed(config.seed, "skill", model))
        decades = np.log10(listings[model].output_usd_per_million_tokens)
        offset_FK = rng.uniform(-POOL_SPREAD, POOL_SPREAD, answer_FKE.shape[:2])
        answer_FKE[..., e] = np.clip(POOL_SUCCESS + POOL_SUCCESS_PER_DECADE * decades + offset_FK, *POOL_SUCCESS_LIMITS)
        writer_FE[:, e] = rng.choice([GOOD_WRITER, WEAK_WRITER], len(FAMILIES))
    return _with_factor(config, answer_FKE, writer_FE)


def _with_factor(config: WorldConfig, answer_FKE: np.ndarray, writer_FE: np.ndarray) -> SkillTables:
    without_evidence_FKE = answer_FKE * np.asarray(config.evidence_factor_by_kind)[None, :, None]
    return SkillTables(np.stack([without_evidence_FKE, answer_FKE], axis=-1), writer_FE, model_names(config))


def call_tokens(config: WorldConfig, role: str, has_evidence: bool) -> tuple[int, int]:
    """Input and output tokens that the expert consumes in a role ("search", "enhance_reasoning" or "answer")."""
    tokens = {
        "search": config.search_tokens,
        "enhance_reasoning": config.enhance_reasoning_tokens,
        "answer": config.answer_tokens,
    }
    num_input, num_output = tokens[role]
    return num_input + (config.evidence_tokens if role == "answer" and has_evidence else 0), num_output


def call_latency_s(config: WorldConfig, offer: Offer, role: str) -> float:
    """Seconds that a call takes on the virtual clock: a share where the offer's are those of an answer (records.py)."""
    is_of_answer = role != "answer" and "answer" in offer.roles
    return offer.latency_s * (config.writer_latency_share if is_of_answer else 1.0)
