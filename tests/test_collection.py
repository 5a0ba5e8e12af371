"""Dynamic resampling: homogeneous groups are replaced by groups that were really played, and no others are."""

import dataclasses

import numpy as np

from orchestra_jax.collection import collect
from orchestra_jax.grpo.filters import FilterReason
from orchestra_jax.grpo.scoring import ScoringSettings, score_groups
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

OBJECTIVES = (Objective("outcome", "maximize", 0.0, 1.0),)
EMPTY = Trajectory(
    "", 0, *[np.zeros(0)] * 4, 0, calls=(), receipts=(), status=EpisodeStatus.ANSWERED, answer="", objectives={}
)  # fmt: skip


class World:
    """Draws batches of three instances, numbered; `mixed` says which of them have a right and a wrong answer."""

    def __init__(self, mixed, failing=()):
        self.mixed, self.failing, self.num_drawn, self.played = mixed, failing, 0, []

    def draw(self):
        self.num_drawn += 3
        return list(range(self.num_drawn - 3, self.num_drawn))

    def play(self, instances, round_number):
        self.played.append((round_number, list(instances)))
        return [self.group(number) for number in instances]

    def group(self, number):
        status = EpisodeStatus.TOOL_FAILURE if number in self.failing else EpisodeStatus.ANSWERED
        outcomes = (1.0, 0.0) if number in self.mixed else (1.0, 1.0)
        rollouts = [dataclasses.replace(EMPTY, status=status, objectives={"outcome": each}) for each in outcomes]
        return TrajectoryGroup(f"{number}", {"outcome": 1.0}, tuple(rollouts))

    def collect(self, max_resamples):
        score = lambda groups: score_groups(groups, OBJECTIVES, ScoringSettings())  # noqa: E731
        return collect(self.draw, self.play, score, max_resamples)


def test_homogeneous_groups_are_played_again_with_fresh_instances():
    world = World(mixed={1, 4, 6})
    found = world.collect(max_resamples=5)
    # 0 and 2 say nothing; 3 and 4 come, of which 4 stays; 6 takes the place of 3. 5, 7 and 8 are passed over.
    assert world.played == [(0, [0, 1, 2]), (1, [3, 4]), (2, [6])]
    assert found.instances == [6, 1, 4] and [group.instance_id for group in found.groups] == ["6", "1", "4"]
    assert found.scored.kept == (0, 1, 2) and found.num_resampled == 3
    assert found.scored.advantages_KG.shape == (3, 2)
    assert [group.instance_id for group in found.first_groups] == ["0", "1", "2"]


def test_rounds_are_limited_and_what_is_left_is_dropped_as_ever():
    found = World(mixed=set()).collect(max_resamples=2)
    assert found.num_resampled == 6 and found.scored.dropped == {FilterReason.HOMOGENEOUS: 3}
    world = World(mixed={1})
    assert world.collect(max_resamples=0).scored.kept == (1,) and world.played == [(0, [0, 1, 2])]


def test_what_infrastructure_broke_is_not_played_again():
    world = World(mixed={0, 1}, failing={2})
    found = world.collect(max_resamples=3)
    assert len(world.played) == 1 and found.scored.dropped == {FilterReason.TOO_FEW_VALID: 1}
