"""Whole steps of vLLM beside the model, and what a layer and an engine take of their own.

Part of `fit`, `compare` and `several_gpus`.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vllm.layout import SINGLE, Layout
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.models.shape import read_shape
from leanmoe.plan import Rule
from leanmoe.predict.constants import Constants
from leanmoe.predict.experts.curves import Activation, Curve, from_points
from leanmoe.predict.hardware.gpus import GPUS, Gpu
from leanmoe.predict.kernels.small_steps import SmallSteps
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import Parts, StepBatch, StepTime

FULL = ("stock", "empty plan", "stock, leanmoe")
"""Names of the full model in `vllm.one_gpu`'s results."""
CALIBRATED_ON = "qwen3-30b-a3b"
"""Every second load of the run of all its layers gives a layer's and an engine's own times; all
other runs are a test."""
KERNELS = {"vllm": "vllm-triton", "leanmoe": "leanmoe"}
"""By whose kernels computed the experts."""
SMALL_STEPS = {each.value: each for each in SmallSteps} | {
    "auto": SmallSteps.GROUP,
    "drop": SmallSteps.GROUP,  # the same but for larger steps, whose rows are not modelled apart
}


def gpu_of(hardware: str) -> str:
    """Our name of the GPU that a results file names."""
    for name in GPUS:
        if name in hardware.lower().replace(" ", ""):
            return name
    raise LeanMoeError(f"hardware {hardware!r} is none of {', '.join(GPUS)}")


def runs_in(results: Path) -> list[Path]:
    """Results files of `vllm.one_gpu`, oldest first; other benchmarks of vLLM have some, too."""
    paths = sorted(results.glob("*-vllm-*.json"))
    return [p for p in paths if read_json(p, "results").get("leanmoe_benchmark") == "vllm_gpu"]


def read_run(path: Path, constants: Constants) -> EngineRun:
    """A results file of `vllm.one_gpu`."""
    return EngineRun(read_json(path, "results"), constants)


def read_layouts(path: Path, constants: Constants) -> dict[str, EngineRun]:
    """A results file of `vllm.several_gpus`: a run for each layout that was measured."""
    found = read_json(path, "results")
    return {
        name: EngineRun({**found, **layout}, constants, Layout.parse(name))
        for name, layout in found["layouts"].items()
    }


def deployment_of(layout: Layout, gpu: Gpu) -> Deployment:
    """A benchmark's layout as the planner has it."""
    return Deployment(gpu, layout.tensor, layout.expert_ranks, layout.data)


class EngineRun:
    """A run of vLLM in one layout: its measured lines, and the model's prediction of each."""

    def __init__(
        self, found: dict[str, Any], constants: Constants, layout: Layout = SINGLE
    ) -> None:
        self._found = found
        settings = self._found["settings"]
        self.model = read_shape(self._found["config"], settings["shape"])
        self.gpu = GPUS[gpu_of(self._found["provenance"]["hardware"])]
        deployment = deployment_of(layout, self.gpu)
        self._step = cache(partial(StepTime, self.model, deployment, constants))
        self._context = int(settings["prompt"]) + int(settings["steps"]) / 2
        self.lines = [
            line
            for line in self._found["lines"]
            if line.get("step_ms") is not None and line.get("distinct") is not None
        ]
        self._loads = sorted({line["requests"] for line in self.lines})

    @property
    def is_calibration(self) -> bool:
        """Whether it is the run that a layer's and an engine's own times are fitted to."""
        settings = self._found["settings"]
        return bool(settings["shape"] == CALIBRATED_ON and settings["layers"] == "None")

    def is_fitted(self, line: dict[str, Any]) -> bool:
        """Whether a layer's and an engine's own times were fitted to the line."""
        every_second = self._loads[::2]
        return self.is_calibration and line["plan"] in FULL and line["requests"] in every_second

    def parts(self, line: dict[str, Any]) -> Parts:
        """The step as predicted, from the experts that the run itself counted."""
        tokens = line["requests"]
        point = (float(tokens), float(line["distinct"]), float(line["activated"]))
        rule = self._rule(line)
        variant = self._variant(line)
        most = [float(line["most_loaded"])] if "most_loaded" in line else []
        columns = float(self.model.top_k if rule.top_k is None else rule.top_k)
        curve = from_points(
            [point],
            self.model.experts,
            "measured in the run",
            columns,
            rule.is_batch_aware,
            most,
            "all" in (variant.get("batch_scope"), variant.get("company")),
        )
        activation = Activation(self.model, None, partial(_always, curve))
        small_steps = SMALL_STEPS[variant.get("small_steps", SmallSteps.GROUP.value)]
        step = self._step(KERNELS[self.experts(line)], small_steps)
        return step.parts(StepBatch(tokens, self._context), activation)

    def captured(self, line: dict[str, Any]) -> float:
        """Seconds of the captured step as predicted: the model up to its last hidden states."""
        parts = self.parts(line)
        return parts.total - parts.head - parts.engine

    def experts(self, line: dict[str, Any]) -> str:
        """Whose kernels computed the line's experts."""
        return str(line.get("experts", "vllm"))

    def _variant(self, line: dict[str, Any]) -> dict[str, Any]:
        """What ran the line.

        Older files call variants "ways", with "company" for the batch scope; those with "plans" are
        older still: skipped slots repeated in all of them.
        """
        if variants := self._found.get("variants", self._found.get("ways")):
            return dict(variants[line["plan"]])
        bands = self._found["plans"].get(line["plan"], [])
        return {"bands": bands, "small_steps": SmallSteps.REPEAT.value}

    def _rule(self, line: dict[str, Any]) -> Rule:
        for band in self._variant(line).get("bands", []):
            if band["up_to"] is None or line["requests"] <= band["up_to"]:
                return Rule.from_json(band["rules"][0])
        return Rule()


def _always(curve: Curve, _layer: int, _rule: Rule) -> Curve:
    return curve


def own_times(constants: Constants, results: Path) -> dict[str, float]:
    """A layer's, a step's and a sampled sequence's own seconds, as fields of `Rates`.

    What the fitted lines' captured steps leave over is shared by the layers; what lies between a
    captured step with its head and the time of a token is a straight line over the sequences.
    """
    paths = results.glob(f"*-vllm-{CALIBRATED_ON}.json")
    (run,) = (run for path in paths if (run := read_run(path, constants)).is_calibration)
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
        "layer_seconds": max(0.0, float(np.median(layer))) / run.model.layers,
        "step_seconds": max(0.0, float(start)),
        "sampled_seconds": max(0.0, float(slope)),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}
