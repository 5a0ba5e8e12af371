"""The five preferences of the default world: words for the prompt, weights for the reward.

The weights are sharp on purpose: with mild ones a policy that ignores the preference is almost optimal (docs/log.md).
"""

from __future__ import annotations

from orchestra_jax.data.records import Preference


def _weights(outcome: float, cost_usd: float, latency_s: float, disallowed_calls: float = 0.0) -> dict[str, float]:
    return {"outcome": outcome, "cost_usd": cost_usd, "latency_s": latency_s, "disallowed_calls": disallowed_calls}


PREFERENCES = {
    preference.name: preference
    for preference in (
        Preference("outcome", "The right answer comes first.", _weights(0.90, 0.05, 0.05)),
        Preference("cheap", "Keep it cheap.", _weights(0.05, 0.95, 0.0)),
        Preference("fast", "I need it fast.", _weights(0.05, 0.0, 0.95)),
        Preference("balanced", "Balance quality, cost and time.", _weights(0.20, 0.40, 0.40)),
        Preference("local", "Use local experts only.", _weights(0.30, 0.35, 0.35, 1.5)),
    )
}
