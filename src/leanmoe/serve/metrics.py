"""What a plan does in a running service, in Prometheus' text format; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def exposition(
    plan: str,
    engine: str,
    step: Mapping[str, Any] | None,
    generated: int | None = None,
    control: Mapping[str, Any] | None = None,
) -> str:
    """Gauges of a step: its band, and per layer its distinct experts and the experts a token used.

    `step` is the JSON of a `StepReport` with its band, or None where nothing ran; `plan` is its
    file, empty where the full model is served. `control` is what a scheduler says of levels and
    tiers, where there is one.
    """
    labels = {"plan": plan or "none", "engine": engine}
    lines = _gauge("leanmoe_plan", "The plan at work.", [(labels, 1)])
    if generated is not None:
        name = "leanmoe_generation_tokens_total"
        lines += [f"# HELP {name} Tokens generated.", f"# TYPE {name} counter"]
        lines.append(f"{name} {generated}")
    if control is not None:
        lines += _levels(control)
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


def _levels(control: Mapping[str, Any]) -> list[str]:
    """What is served now and what was: level, changes, and replies by tier."""
    labels = {"level": control["level"], "plan": control["plan"]}
    lines = _gauge("leanmoe_level", "The level of the own tier's replies.", [(labels, 1)])
    for what, count in (("level", control["changes"]), ("plan", control["epoch"])):
        name, text = f"leanmoe_{what}_changes_total", f"Changes of {what} since the start."
        lines += _counter(name, text, [({}, count)])
    for name, text in (
        ("reply_tokens", "Reply rows by tier."),
        ("degraded_tokens", "Reply rows at a faster level than their tier's, by load."),
    ):
        values = [({"tier": tier}, count) for tier, count in control[name].items()]
        lines += _counter(f"leanmoe_{name}_total", text, values)
    return lines


def _counter(name: str, text: str, values: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
    return [line.replace(" gauge", " counter") for line in _gauge(name, text, values)]


def _gauge(name: str, text: str, values: Sequence[tuple[Mapping[str, str], float]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    for labels, value in values:
        inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{inner}}} {value:g}" if inner else f"{name} {value:g}")
    return lines


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
