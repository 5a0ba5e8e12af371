"""The end of a run, played by scripted policies whose worth is known: no model, no jax computation."""

import json
import re

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax import components as components_module
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.evaluation.evaluate import by_preference, compare, current_commit, evaluate_run
from orchestra_jax.evaluation.oracle import STATISTICS
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.run_directory import open_run_directory
from orchestra_jax.types import ToolCall

ENTRY = {"score", "utility", "accuracy", "cost_usd", "latency_s", "calls", "num_tasks"}
BASELINES = {
    "random",
    "strongest",
    "strongest_with_evidence",
    "cheapest",
    "cheapest_with_evidence",
    "best_fixed_route",
    "best_route_per_family",
    "price_blind",
    "preference_blind",
}


def make_config():
    config = RunConfig(engine="scripted")
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 4
    config.evaluation.num_per_preference = 40
    config.evaluation.num_clairvoyant_draws = 1
    return config


class RuleEngine(ScriptedEngine):
    """Its weights are a rule: (offers as (alias, price) in catalog order) -> the alias that answers at once."""

    def __init__(self, chat, rule, temperatures):
        super().__init__(self._turn)
        self._chat, self._rule, self._temperatures = chat, rule, temperatures

    def _turn(self, session_id, turn, prompt_tokens):
        text = chat_format.decode(self._chat, prompt_tokens)
        (prices,) = re.findall(r"^price (.*)$", text, re.MULTILINE)
        offers = sorted((alias, float(price)) for price, alias in re.findall(r"\$(\S+) (\S+)", prices))
        return chat_format.encode_turn(self._chat, "", [ToolCall("answer", {"model": self._rule(offers)})])

    async def generate(self, prompt_tokens, sampling, **names):
        self._temperatures.add((self._rule.__name__, sampling.temperature))
        return await super().generate(prompt_tokens, sampling, **names)

    async def update_weights(self, params, version):
        self._rule = params


def cheapest(offers):
    return min(reversed(offers), key=lambda offer: offer[1])[0]  # as the baseline: the last among equals


def first(offers):
    return offers[0][0]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Summary, run directory and temperatures of a run whose training ended in `cheapest`, from a start of `first`."""
    config, temperatures = make_config(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            components_module.ENGINES,
            "scripted",
            lambda config, parts, params, version: RuleEngine(parts.chat, params, temperatures),
        )
        directory = open_run_directory(tmp_path_factory.mktemp("run"), {})
        summary = evaluate_run(config, build_components(config), cheapest, first, directory)
    return summary, directory.path, temperatures


def test_the_summary_has_its_form(evaluated):
    summary, _, _ = evaluated
    assert set(summary) == {
        "seed", "commit", "wall_s", "peak_rss_bytes", "policies", "comparisons", "obedience", "price_response",
        "trained_costs_usd",
    }  # fmt: skip
    for name, costs_usd in summary["trained_costs_usd"].items():
        assert len(costs_usd) == 40
        assert np.mean(costs_usd) == pytest.approx(summary["policies"]["trained"][name]["cost_usd"])
    assert set(summary["policies"]) == {"trained", "warm_start", "optimal", "clairvoyant"} | BASELINES
    for name, policy in summary["policies"].items():
        assert set(policy) == set(PREFERENCES)
        for entry in policy.values():
            assert set(entry) == ENTRY | ({"realised"} if name in ("trained", "warm_start") else set())
            assert set(entry["calls"]) == {"search", "enhance_reasoning", "answer"} | {each.alias for each in EXPERTS}
            assert entry["num_tasks"] == 40
    assert set(summary["comparisons"]) == BASELINES
    assert set(summary["obedience"]) == {"cheap", "fast", "outcome", "cheap_against_outcome"}
    assert 2**25 < summary["peak_rss_bytes"] < 2**37
    json.dumps(summary, allow_nan=False)


def test_a_played_rule_is_worth_what_the_recursion_says(evaluated):
    """`cheapest` without a look at anything else is one of the baselines, whose value is exact."""
    policies = evaluated[0]["policies"]
    for preference, entry in policies["trained"].items():
        baseline = policies["cheapest"][preference]
        assert {name: entry[name] for name in ENTRY - {"calls"}} == pytest.approx(
            {name: baseline[name] for name in ENTRY - {"calls"}}
        )
        assert entry["calls"] == pytest.approx(baseline["calls"])
        realised = entry["realised"]
        assert realised["latency_s"] == pytest.approx(entry["latency_s"], abs=0.2)  # tokens of the turn
        assert realised["accuracy"] == pytest.approx(entry["accuracy"], abs=0.3)
    assert evaluated[0]["comparisons"]["cheapest"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert evaluated[0]["comparisons"]["cheapest"]["p_value"] > 0.05


def test_too_few_draws_for_a_comparison_lose_nothing(caplog):
    names = ["cheap"] * 3
    zeros_IS = np.zeros((3, len(STATISTICS)))
    statistics = {name: zeros_IS for name in ("trained", "random", "optimal", "cheapest")}
    assert compare(statistics, names, ["cheapest"], seed=0) == {}
    assert "evaluate on more tasks" in caplog.text


def test_bounds_and_the_warm_start_stand_where_they_belong(evaluated):
    policies = evaluated[0]["policies"]
    for preference in PREFERENCES:
        assert policies["random"][preference]["score"] == 0.0 and policies["optimal"][preference]["score"] == 1.0
        assert policies["clairvoyant"][preference]["score"] >= 1.0
    assert policies["warm_start"]["cheap"]["cost_usd"] > policies["trained"]["cheap"]["cost_usd"]
    # It plays the same draws alike under every preference: it cannot obey one.
    assert {entry["move"] for entry in evaluated[0]["obedience"].values()} == {0.0}


def test_the_trained_policy_is_greedy_and_the_warm_start_samples(evaluated):
    assert evaluated[2] == {("cheapest", 0.0), ("first", 1.0)}


def test_a_policy_that_reads_prices_leaves_the_expert_whose_price_rises(evaluated):
    response = evaluated[0]["price_response"]
    assert response["num_pairs"] > 50
    assert 0.3 < response["move"] <= 1.0 and response["p_value"] < 0.01 and response["optimal_move"] > 0.1


def test_pictures_and_trajectories_are_for_reading(evaluated):
    path = evaluated[1]
    assert (path / "cost_accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (path / "sample_trajectories.txt").read_text()
    assert text.count("question    ") == 2 * len(PREFERENCES)
    assert "<tool_call>" in text and "answer(model=expert-" in text


def test_one_preference_of_the_users_own_is_evaluated_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(
        components_module.ENGINES,
        "scripted",
        lambda config, parts, params, version: RuleEngine(parts.chat, params, set()),
    )
    config = make_config()
    config.data.weights = (0.5, 0.0, 0.5)
    summary = evaluate_run(config, build_components(config), cheapest, first, open_run_directory(tmp_path, {}))
    assert set(summary["policies"]["trained"]) == {"balanced"}
    assert summary["obedience"] == summary["price_response"] == {}  # nothing to compare with, no price that counts


def test_statistics_by_preference_and_their_comparison():
    statistics_IS = np.zeros((4, len(STATISTICS)))
    statistics_IS[:, 0] = [1, 2, 3, 4]
    names = ["a", "a", "b", "b"]
    assert {name: rows[:, 0].tolist() for name, rows in by_preference(statistics_IS, names).items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 4.0],
    }
    statistics = {"trained": 3.0, "optimal": 4.0, "random": 0.0, "plain": 1.0}
    tables = {name: np.full((4, len(STATISTICS)), value) for name, value in statistics.items()}
    compared = compare(tables, names, ["plain"], seed=0)["plain"]
    assert compared["difference"] == compared["low"] == compared["high"] == 0.5
    assert compared["p_value"] < 0.01


def test_the_commit_is_that_of_the_code_wherever_it_runs(tmp_path, monkeypatch):
    current_commit.cache_clear()
    here = current_commit()
    monkeypatch.chdir(tmp_path)
    current_commit.cache_clear()
    assert current_commit() == here
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert current_commit() == here  # what a run began with
    current_commit.cache_clear()
    assert current_commit() == "unknown"
    current_commit.cache_clear()
