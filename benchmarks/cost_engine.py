"""Whole steps of vLLM beside the model, and what a layer and an engine take of their own.

Part of `cost_fit.py` and `cost_compare.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.cost.activation import Activation
from leanmoe.cost.constants import Constants
from leanmoe.cost.deployment import Deployment
from leanmoe.cost.hardware import GPUS
from leanmoe.cost.model import read_model
from leanmoe.cost.routing import Curve, from_points
from leanmoe.cost.step import Batch, Parts, StepTime
from leanmoe.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.storage import read_json

FULL = ("stock", "empty plan", "stock, leanmoe")
"""Names of the full model in `vllm_gpu.py`'s results."""
CALIBRATED_ON = "qwen3-30b-a3b"
"""The run whose every second load gives a layer's and an engine's own times; others are a test."""


def gpu_of(hardware: str) -> str:
    """Our name of the GPU that a results file names."""
    for name in GPUS:
        if name in hardware.lower().replace(" ", ""):
            return name
    raise LeanMoeError(f"hardware {hardware!r} is none of {', '.join(GPUS)}")


class EngineRun:
    """A results file of `vllm_gpu.py`: its measured lines, and the model's prediction of each."""

    def __init__(self, path: Path, constants: Constants) -> None:
        self._found = read_json(path, "results")
        settings = self._found["settings"]
        self.model = read_model(self._found["config"], settings["shape"])
        self.gpu = GPUS[gpu_of(self._found["provenance"]["hardware"])]
        self.step = StepTime(self.model, Deployment(self.gpu), constants, "vllm-triton")
        self._context = int(settings["prompt"]) + int(settings["steps"]) / 2
        self.lines = [
            line
            for line in self._found["lines"]
            if line.get("step_ms") is not None and line.get("distinct") is not None
        ]
        self._loads = sorted({line["requests"] for line in self.lines})

    def is_fitted(self, line: dict[str, Any]) -> bool:
        """Whether a layer's and an engine's own times were fitted to the line."""
        every_second = self._loads[::2]
        return (
            self._found["settings"]["shape"] == CALIBRATED_ON
            and line["plan"] in FULL
            and line["requests"] in every_second
        )

    def parts(self, line: dict[str, Any]) -> Parts:
        """The step as predicted, from the experts that the run itself counted."""
        tokens = line["requests"]
        point = (float(tokens), float(line["distinct"]), float(line["activated"]))
        columns = float(self._slots(line))
        curve = from_points([point], self.model.shape.experts, "measured in the run", columns)
        activation = Activation(self.model, None, partial(_always, curve))
        return self.step.parts(Batch(tokens, self._context), activation)

    def _slots(self, line: dict[str, Any]) -> int:
        bands = self._found["plans"].get(line["plan"], [])
        here = (b for b in bands if b["up_to"] is None or line["requests"] <= b["up_to"])
        rules = next(here, {"rules": [{}]})["rules"]
        return int(rules[0].get("top_k", self.model.shape.top_k))


def _always(curve: Curve, _layer: int, _rule: Rule) -> Curve:
    return curve


def own_times(constants: Constants, results: Path) -> dict[str, float]:
    """A layer's, a step's and a sampled sequence's own seconds, as fields of `Rates`.

    What the fitted lines' captured steps leave over is shared by the layers; what lies between a
    captured step with its head and the time of a token is a straight line over the sequences.
    """
    (path,) = results.glob(f"*-vllm-{CALIBRATED_ON}.json")
    run = EngineRun(path, constants)
    layer, sequences, between = [], [], []
    for line in run.lines:
        if run.is_fitted(line):
            parts = run.parts(line)
            captured = line["step_ms"]["median"] * 1e-3
            layer.append(captured - (parts.total - parts.head - parts.engine))
            sequences.append(line["requests"])
            between.append(line["tpot_ms"]["median"] * 1e-3 - captured - parts.head)
    slope, start = np.polyfit(sequences, between, 1)
    found = {
        "layer_seconds": max(0.0, float(np.median(layer))) / run.model.shape.layers,
        "step_seconds": max(0.0, float(start)),
        "sampled_seconds": max(0.0, float(slope)),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}
