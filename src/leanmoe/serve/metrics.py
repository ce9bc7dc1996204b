"""What a plan does in a running service, in Prometheus' text format; needs no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

TOKENS = "vllm:generation_tokens_total"
"""The engine's own counter of tokens, from which their rate is taken."""


class TokenRate:
    """Tokens per second between one scrape and the next."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._at: float | None = None

    def per_second(self, tokens: float, now: float | None = None) -> float | None:
        """The rate since the last call with the counter's value then; None the first time."""
        now = time.monotonic() if now is None else now
        before, self._at = self._at, now
        added, self._tokens = tokens - self._tokens, tokens
        return None if before is None or now <= before else max(added, 0.0) / (now - before)


def counted_tokens(exposition: str, name: str = TOKENS) -> float:
    """The sum of a counter over its labels in Prometheus' text."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", exposition, re.MULTILINE)
    return sum(float(value) for value in values)


def exposition(
    plan: str,
    engine: str,
    step: Mapping[str, Any] | None,
    tokens_per_second: float | None,
) -> str:
    """Gauges of a step: its band, and per layer its distinct experts and the experts a token used.

    `step` is the JSON of a `StepReport` with its band, or None where nothing ran; `plan` is its
    file, empty where the full model is served.
    """
    labels = {"plan": plan or "none", "engine": engine}
    lines = _gauge("leanmoe_plan", "The plan at work.", [(labels, 1)])
    if tokens_per_second is not None:
        lines += _gauge(
            "leanmoe_generation_tokens_per_second",
            "Tokens generated a second since the last scrape.",
            [({}, tokens_per_second)],
        )
    if step is not None:
        up_to = "none" if step["up_to"] is None else str(step["up_to"])
        band = "full model" if step["band"] is None else str(step["band"])
        layers = [(n, layer) for n, layer in enumerate(step["layers"]) if layer is not None]
        lines += _gauge("leanmoe_step_rows", "Rows of the last step.", [({}, step["rows"])])
        lines += _gauge(
            "leanmoe_band", "The band of the last step.", [({"band": band, "up_to": up_to}, 1)]
        )
        lines += _gauge(
            "leanmoe_distinct_experts",
            "Distinct experts in a MoE layer, the last step.",
            [({"layer": str(n)}, layer["distinct"]) for n, layer in layers],
        )
        lines += _gauge(
            "leanmoe_activated_experts",
            "Experts that a token used in a MoE layer on average, the last step.",
            [({"layer": str(n)}, layer["activated"]) for n, layer in layers],
        )
    return "\n".join(lines) + "\n"


def _gauge(name: str, text: str, values: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    for labels, value in values:
        inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{inner}}} {value:g}" if inner else f"{name} {value:g}")
    return lines


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
