"""The tables of the simulated world: what its docstring promises."""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.data.questions import FAMILIES
from orchestra_jax.data.records import Offer
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.world import (
    ANSWER_SUCCESS_BY_RANK,
    FAMILY_INDEX,
    GOOD_WRITER,
    KIND_INDEX,
    WEAK_WRITER,
    WorldConfig,
    call_latency_s,
    call_tokens,
    skill_tables,
)

SEEDS = (0, 1, 2, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_cell_has_its_own_order_of_the_same_probabilities(seed):
    skills = skill_tables(WorldConfig(seed=seed))
    cells = skills.answer_FKEV[..., 1].reshape(-1, len(EXPERTS))
    assert all(sorted(cell, reverse=True) == list(ANSWER_SUCCESS_BY_RANK) for cell in cells)
    assert len({tuple(cell) for cell in cells}) == len(cells) == 8
    assert sorted(np.unique(skills.writer_FE)) == [WEAK_WRITER, GOOD_WRITER]
    assert (np.count_nonzero(skills.writer_FE == GOOD_WRITER, axis=1) == 3).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_strongest_expert_heads_one_kind_of_each_family_and_is_no_good_writer_everywhere(seed):
    skills = skill_tables(WorldConfig(seed=seed))
    strongest = skills.answer_FKEV[..., 1].mean(axis=(0, 1)).argmax()
    is_head_FK = skills.answer_FKEV[..., 1].argmax(axis=2) == strongest
    assert is_head_FK.sum() <= len(FAMILIES) and (is_head_FK.sum(axis=1) <= 1).all()
    assert not (skills.writer_FE[:, strongest] == GOOD_WRITER).all()


def test_evidence_helps_everybody_and_more_where_the_question_is_harder():
    config = WorldConfig()
    with_FKE, without_FKE = (skill_tables(config).answer_FKEV[..., v] for v in (1, 0))
    easy, hard = config.evidence_factor_by_kind
    np.testing.assert_allclose(without_FKE[:, 0], easy * with_FKE[:, 0])
    np.testing.assert_allclose(without_FKE[:, 1], hard * with_FKE[:, 1])
    assert hard < easy < 1


def test_another_seed_permutes_experts_and_families_alike_in_both_tables():
    base, other = (skill_tables(WorldConfig(seed=seed)) for seed in (0, 3))
    assert not np.array_equal(base.writer_FE, other.writer_FE)
    rng = np.random.default_rng(3)
    families, experts = rng.permutation(len(FAMILIES)), rng.permutation(len(EXPERTS))
    for f, family in enumerate(families):
        for e, expert in enumerate(experts):
            assert other.writer_FE[f, e] == base.writer_FE[family, expert]
            np.testing.assert_array_equal(other.answer_FKEV[f, :, e], base.answer_FKEV[family, :, expert])
    np.testing.assert_array_equal(skill_tables(WorldConfig(seed=3)).answer_FKEV, other.answer_FKEV)


def test_what_a_call_consumes():
    config = WorldConfig()
    assert call_tokens(config, "search", False) == call_tokens(config, "search", True) == (500, 200)
    assert call_tokens(config, "enhance_reasoning", True) == (500, 200)
    assert call_tokens(config, "answer", False) == (1000, 500)
    assert call_tokens(config, "answer", True) == (1500, 500)
    offer = Offer("expert-3", "m", True, 5.0, 5.0, latency_s=25.0)
    assert call_latency_s(config, offer, "answer") == 25.0
    assert call_latency_s(config, offer, "search") == pytest.approx(17.5)
    assert call_latency_s(dataclasses.replace(config, writer_latency_share=0.5), offer, "enhance_reasoning") == 12.5


def test_indices_cover_the_families_and_their_kinds():
    assert list(FAMILY_INDEX) == list(FAMILIES)
    assert all([KIND_INDEX[kind] for kind in kinds] == [0, 1] for kinds in FAMILIES.values())
