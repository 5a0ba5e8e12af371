"""What became of the records of a stage: how many were made, how many passed, why the others did not."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from orchestra_jax.data.synthesis.writer import Rejected

MAX_EXAMPLES = 3  # sentences kept for each reason


@dataclasses.dataclass
class StageReport:
    """Counts of one stage. `examples` are the first sentences by reason."""

    stage: str
    num_accepted: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def accept(self, count: int = 1) -> None:
        self.num_accepted += count

    def reject(self, rejected: Rejected) -> None:
        self.reasons[rejected.reason] += 1
        examples = self.examples.setdefault(rejected.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(str(rejected)[:300])

    @property
    def num_rejected(self) -> int:
        return sum(self.reasons.values())

    @property
    def share_accepted(self) -> float:
        num_records = self.num_accepted + self.num_rejected
        return self.num_accepted / num_records if num_records else 0.0


def render_report(reports: Sequence[StageReport], costs_usd: dict[str, float]) -> str:
    """The stages as a Markdown table: yield, dollars, and the reasons for what was rejected, commonest first.

    `costs_usd` are by the stage's name; a stage that asks nobody has none.
    """
    lines = ["| stage | made | kept | share | cost $ | rejected because |", "|---|---|---|---|---|---|"]
    for report in reports:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.most_common())
        num_records = report.num_accepted + report.num_rejected
        cost = costs_usd.get(report.stage, 0.0)
        lines.append(
            f"| {report.stage} | {num_records} | {report.num_accepted} | {report.share_accepted:.2f} | {cost:.4f} |"
            f" {reasons} |"
        )
    return "\n".join(lines)
