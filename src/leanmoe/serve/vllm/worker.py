"""What vLLM's workers answer about the plan: given to it as --worker-extension-cls."""

from __future__ import annotations

from typing import Any

from leanmoe.serve.vllm import patch


class PlanWorker:
    """Methods that vLLM adds to its workers and calls by `collective_rpc`."""

    def leanmoe_statistics(self) -> dict[str, Any] | None:
        """What the last step ran, per MoE layer; None without a plan or LEANMOE_STATISTICS=1."""
        model = patch.current()
        if model is None or model.statistics is None:
            return None
        found = model.statistics.read()
        band = model.plan.band_for(max(1, found["rows"]))
        number = None if band is None else model.plan.bands.index(band)
        return {**found, "band": number, "up_to": None if band is None else band.up_to}
