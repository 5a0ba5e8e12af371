"""Faults on demand: any tool made to fail, slow down, be busy or change its price in the middle of an episode.

Each fault is drawn from (seed, instance, rollout, number of the call, attempt, tool) alone, so a run with faults
repeats itself. A failed call did the work and is charged; a busy one did none. A price change is announced in the
result of the call behind which it happens, holds for every later call of the episode, and happens once. On the virtual
clock a slow call only says that it took longer; `sleep_s` makes it so in earnest.
"""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np

from orchestra_jax.seeds import derive_seed
from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.tool import Evidence, PricedTool, Tool, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason


@dataclasses.dataclass
class FaultsConfig:
    """Rates are per call, the one of the price change per call behind which it can happen."""

    fail_rate: float = 0.0
    busy_rate: float = 0.0
    slow_rate: float = 0.0
    price_change_rate: float = 0.0
    slow_factor: float = 4.0
    price_factor: float = 3.0
    retry_after_s: float = 0.0  # what a busy tool asks for
    sleep_s: float = 0.0  # real seconds, of a slow call
    seed: int = 0

    @property
    def is_on(self) -> bool:
        return any((self.fail_rate, self.busy_rate, self.slow_rate, self.price_change_rate))


class FaultyTool:
    """A tool that does what `tool` does, but for the faults. ValueError for a rate outside [0, 1]."""

    def __init__(self, tool: Tool, config: FaultsConfig):
        for name in ("fail_rate", "busy_rate", "slow_rate", "price_change_rate"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"faults.{name} must be within 0 and 1, got {getattr(config, name)}")
        self.name, self.description, self.parameters_schema = tool.name, tool.description, tool.parameters_schema
        self._tool, self._config = tool, config

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        if not isinstance(self._tool, PricedTool):
            return Quote(0.0)
        return self._tool.quote(arguments, self._at_present_prices(context))

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        names = self._config.seed, context.instance.seed, context.rollout_index, context.call_number
        rng = np.random.default_rng(derive_seed("fault", *names, context.attempt, self.name))
        is_busy, is_failed, is_slow = rng.random(3) < (
            self._config.busy_rate,
            self._config.fail_rate,
            self._config.slow_rate,
        )
        if is_busy:
            return self._busy()
        result = await self._tool.run(arguments, self._at_present_prices(context))
        if is_slow:
            result = await self._slowed(result)
        if is_failed and result.status == CallStatus.OK:
            result = self._failed(result)
        return self._announced(result, context)

    def _changes_behind(self, context: ToolContext, call_number: int) -> bool:
        names = self._config.seed, context.instance.seed, context.rollout_index, call_number
        return np.random.default_rng(derive_seed("price", *names)).random() < self._config.price_change_rate

    def _has_changed(self, context: ToolContext) -> bool:
        return any(self._changes_behind(context, number) for number in range(context.call_number))

    def _at_present_prices(self, context: ToolContext) -> ToolContext:
        if not self._config.price_change_rate or not self._has_changed(context):
            return context
        factor = self._config.price_factor
        offers = tuple(
            dataclasses.replace(
                offer,
                input_usd_per_million_tokens=offer.input_usd_per_million_tokens * factor,
                output_usd_per_million_tokens=offer.output_usd_per_million_tokens * factor,
            )
            for offer in context.instance.offers
        )
        return dataclasses.replace(context, instance=dataclasses.replace(context.instance, offers=offers))

    def _announced(self, result: ToolResult, context: ToolContext) -> ToolResult:
        if not self._config.price_change_rate or self._has_changed(context):
            return result
        if not self._changes_behind(context, context.call_number):
            return result
        told = f"all prices are now times {self._config.price_factor:g}"
        return dataclasses.replace(result, text=f"{result.text}\n{told}", summary=f"{result.summary}\n{told}")

    def _busy(self) -> ToolResult:
        receipt = make_receipt(self.name, service_s=0.0, status=CallStatus.FAILED, reason=Reason.RATE_LIMITED)
        text = f"{self.name} is busy, try again"
        return ToolResult(text, "busy", receipt, CallStatus.FAILED, retry_after_s=self._config.retry_after_s)

    async def _slowed(self, result: ToolResult) -> ToolResult:
        await asyncio.sleep(self._config.sleep_s)
        service_s = result.receipt.service_s * self._config.slow_factor
        return dataclasses.replace(result, receipt=dataclasses.replace(result.receipt, service_s=service_s))

    def _failed(self, result: ToolResult) -> ToolResult:
        receipt = dataclasses.replace(result.receipt, status=CallStatus.FAILED, reason=Reason.INJECTED)
        return ToolResult(f"{self.name} failed", "failed", receipt, CallStatus.FAILED, Evidence())
