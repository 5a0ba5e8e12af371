"""The warm start of the quickstart: it speaks the grammar, calls whom it may, and has not chosen anything yet."""

import collections

import numpy as np
import pytest

from orchestra_jax import training
from orchestra_jax.components import build_components, build_engine
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.environments.question_answering import restate
from orchestra_jax.evaluation.evaluate import play
from orchestra_jax.evaluation.oracle import STATISTICS, evaluate, make_charges, optimal_policy, random_policy
from orchestra_jax.evaluation.trajectory_value import expected_statistics
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.types import CallStatus, EpisodeStatus

NUM_PER_PREFERENCE = 200


@pytest.mark.slow
def test_the_warm_start_speaks_the_grammar_and_still_explores(tmp_path):
    config = RunConfig()
    parts = build_components(config)
    progress = training.warm_start(config, parts, training.open_run_directory(tmp_path / "run", {}))
    tasks = build_tasks("validation", 60, seed=0)
    instances = evaluation_instances(tasks, parts.preferences, config.world, NUM_PER_PREFERENCE, seed=2_000_000)
    engine = build_engine(config, parts, progress.state.params, version=0)
    trajectories = play(config, parts, engine, instances, temperature=1.0)

    calls = [record for each in trajectories for record in each.calls]
    num_without_call = sum(each.status in (EpisodeStatus.MALFORMED, EpisodeStatus.TOKEN_LIMIT) for each in trajectories)
    share = sum(record.status == CallStatus.OK for record in calls) / (len(calls) + num_without_call)
    print(f"{share:.4f} of {len(calls) + num_without_call} turns are well formed and on offer")
    assert share >= 0.99  # .9911, .9906 and .9903 with seeds 0, 1, 2, standard error .0023 (docs/log.md)
    assert np.mean([each.status == EpisodeStatus.ANSWERED for each in trajectories]) >= 0.985
    restated = [
        restate(instance) in parts.chat.tokenizer.decode(each.tokens[each.num_prompt_tokens :])
        for instance, each in zip(instances, trajectories)
    ]
    assert np.mean(restated) >= 0.98

    charges, column = make_charges(instances, config.world), STATISTICS.index("utility")
    utility, lowest, highest = (
        statistics_IS[:, column].mean()
        for statistics_IS in (
            expected_statistics(charges, trajectories),
            evaluate(charges, random_policy)[0],
            evaluate(charges, optimal_policy)[0],
        )
    )
    assert abs(utility - lowest) < 0.05 * (highest - lowest)  # routes at random

    # Entropy of the first call, a tool and one of the experts on offer by its place: by preference, in nats.
    counts = collections.defaultdict(collections.Counter)
    for instance, each in zip(instances, trajectories):
        aliases = [offer.alias for offer in instance.offers]
        call = each.calls[0].call if each.calls else None
        if call and call.arguments.get("model") in aliases:
            counts[instance.preference.name][call.name, aliases.index(call.arguments["model"])] += 1
    for counter in counts.values():
        share = np.array(list(counter.values())) / counter.total()
        assert -(share * np.log(share)).sum() > 0.95 * np.log(len(ROLES) * config.world.num_offered)
