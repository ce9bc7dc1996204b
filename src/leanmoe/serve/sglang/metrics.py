"""Which plan is at work, in SGLang's own /metrics.

SGLang's processes share their metrics through files, which prometheus_client writes where
`--enable-metrics` is given. What a step ran stays on the device, and SGLang has no way to ask its
processes for it: so nothing else of a plan is shown.
"""

from __future__ import annotations

from typing import Any

from leanmoe.core.errors import LeanMoeError


def show_plan(path: str, server_args: Any) -> None:
    """Adds the gauge `leanmoe_plan` to this process's metrics, where SGLang keeps any."""
    if not getattr(server_args, "enable_metrics", False):
        return
    try:
        from prometheus_client import Gauge
    except ImportError as error:
        raise LeanMoeError(
            "--enable-metrics needs prometheus_client, which is not installed here"
        ) from error
    gauge = Gauge("leanmoe_plan", "The plan at work.", ["plan", "engine"], multiprocess_mode="max")
    gauge.labels(plan=path, engine="sglang").set(1)
