"""Table 9 of the paper beside the cost model: gains of fewer experts on DeepSeek-V3.

What the model predicts, what the paper's own table contradicts or puts out of reach, and which
assumptions move the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import MoEShape, distinct_uniform
from leanmoe.plan import Plan, Rule
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation, CurveOf
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.prediction import default_kernel
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepTime
from leanmoe.predict.traffic.closed_loop import closed_loop
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
from leanmoe.results.study import Assumption, KeptExperts, Table9, Table9Cell, Table9Row
from leanmoe.study import paper

LENGTHS = read_lengths("1024", "length")
"""Tokens of the study's prompts, and of its replies."""
OVERHEADS = tuple(n / 4000 for n in range(41))
"""Seconds of an engine's step that are tried against the paper's k = 8 column."""
OTHER_KERNELS = ("vllm-triton", "vllm-flashinfer", "trtllm-cutlass")
"""Kernels of fp8 blocks, beside the one that is assumed."""
WITHIN = 3.0
"""Points of percent that a ratio may be off."""
LOWER_K = (6, 4, 3)
"""Of DeepSeek-V3's 8 experts a token, in Table 9."""
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Service:
    """A model on a machine, in closed loops of the study's lengths."""

    step: StepTime
    curves: CurveOf

    @classmethod
    def of(
        cls,
        name: str,
        place: Deployment,
        overhead: float | None = None,
        kernel: str | None = None,
        assumed: Assumed | None = None,
    ) -> Service:
        """A published model's; `overhead` is an engine's own time in every step, in seconds."""
        constants, model, gpu = shipped(), published_shape(name), place.gpu.name
        if overhead is not None:
            rates = replace(constants.rates_for(gpu)[0], step_seconds=overhead)
            constants = replace(constants, rates={**constants.rates, gpu: rates})
        step = StepTime(model, place, constants, kernel or default_kernel(model))
        return cls(step, assumed_curves(model, assumed or Assumed()))

    def activation(self, plan: Plan | Rule | None) -> Activation:
        """What steps activate under a plan, or under one rule in every layer at every load."""
        if isinstance(plan, Rule):
            plan = Plan.uniform(self.step.model.fingerprint(), plan)
        return Activation(self.step.model, plan, self.curves)

    def throughputs(self, plan: Plan | Rule | None, loads: Sequence[int]) -> list[float]:
        """Output tokens a second at each concurrency."""
        activation = self.activation(plan)
        at = [ServiceLoadModel(LENGTHS, LENGTHS, load) for load in loads]
        return [closed_loop(self.step, activation, load).output_throughput for load in at]

    def gains(
        self, plans: Mapping[Name, Plan | Rule], loads: Sequence[int]
    ) -> dict[Name, tuple[float, ...]]:
        """Percent of throughput that each plan gains over the full model, at each concurrency."""
        full = self.throughputs(None, loads)
        return {
            name: tuple(
                100 * (ours / before - 1)
                for ours, before in zip(self.throughputs(plan, loads), full, strict=True)
            )
            for name, plan in plans.items()
        }


def table_9(kernel: str | None = None, assumed: Assumed | None = None) -> Table9:
    """DeepSeek-V3 on 8 H200 beside Table 9.

    One number is fitted: an engine's own time in a step, to the paper's k = 8 column alone. What
    fewer experts gain is then predicted. Points that break the cited table's own trend are not
    counted.
    """
    place, loads = Deployment(GPUS["h200"], 8), list(paper.TABLE_9)

    def off(seconds: float) -> float:
        modelled = Service.of(paper.V3, place, seconds, kernel, assumed).throughputs(None, loads)
        return sum(
            math.log(value / paper.TABLE_9[load][8]) ** 2
            for load, value in zip(loads, modelled, strict=True)
        )

    overhead = min(OVERHEADS, key=off)
    service = Service.of(paper.V3, place, overhead, kernel, assumed)
    step = service.step
    columns = {k: service.throughputs(Rule(top_k=k), loads) for k in (8, *LOWER_K)}
    rows = tuple(
        _row(step.model, place, load, {k: column[n] for k, column in columns.items()})
        for n, load in enumerate(loads)
    )
    counted = [(r, k) for r in rows for k in (6, 4) if (r.concurrency, k) not in paper.BROKEN]
    shares = [kept / paper.EXPERTS_KEPT[0] for kept in paper.EXPERTS_KEPT[1:]]
    fewer = {s: Rule(experts=tuple(range(int(step.model.experts * s)))) for s in shares}
    return Table9(
        label="modelled beside cited",
        machine=str(place),
        kernel=kernel or default_kernel(step.model),
        step_overhead_ms=1e3 * overhead,
        rows=rows,
        kept_experts=tuple(KeptExperts(*each) for each in service.gains(fewer, loads).items()),
        within=sum(abs(row.off[str(k)]) <= WITHIN for row, k in counted),
        counted=len(counted),
        out_of_reach=tuple(
            Table9Cell(row.concurrency, k)
            for row, k in counted
            if row.least_gain[str(k)] - row.paper_gain[str(k)] > WITHIN
        ),
        trend_breaks=tuple(
            Table9Cell(load, k, round(value, 1)) for load, k, value in paper.trend_breaks(WITHIN)
        ),
        full_off=max(abs(row.full_off) for row in rows),
        stands_on=step.experts.origin,
    )


def _saved(model: MoEShape, place: Deployment, load: int, k: int) -> dict[str, float]:
    """Milliseconds of a step that k for 8 saves: reading, at the full rate; in the paper."""
    fewer = distinct_uniform(model.experts, 8, load) - distinct_uniform(model.experts, k, load)
    read = fewer * len(model.moe_layers) * model.expert_bytes / place.gpus / place.gpu.bandwidth
    cited = load / paper.TABLE_9[load][8] - load / paper.TABLE_9[load][k]
    return {"reading": 1e3 * read, "paper": 1e3 * cited}


def _least_gain(model: MoEShape, place: Deployment, load: int, k: int) -> float:
    """Percent that k for 8 gains of the paper's own step, if tokens choose independently.

    Nothing but the reading of the experts that are not active is saved, at the memory's stated
    rate, which no kernel reaches: a kernel that is slower saves more.
    """
    step = 1e3 * load / paper.TABLE_9[load][8]
    return 100 * (step / (step - _saved(model, place, load, k)["reading"]) - 1)


def _row(model: MoEShape, place: Deployment, load: int, ours: Mapping[int, float]) -> Table9Row:
    cited = paper.TABLE_9[load]
    gains, cited_gains = (
        {str(k): 100 * (column[k] / column[8] - 1) for k in LOWER_K} for column in (ours, cited)
    )
    return Table9Row(
        concurrency=load,
        ours={str(k): value for k, value in ours.items()},
        paper={str(k): value for k, value in cited.items()},
        full_off=ours[8] / cited[8] - 1,
        gain=gains,
        paper_gain=cited_gains,
        off={k: gains[k] - cited_gains[k] for k in gains},
        broken=tuple(k for k in LOWER_K if (load, k) in paper.BROKEN),
        saved_ms=_saved(model, place, load, 4),
        least_gain={str(k): _least_gain(model, place, load, k) for k in LOWER_K},
    )


def what_moves() -> tuple[Assumption, ...]:
    """Table 9's ratios under other assumptions, each with an engine's time fitted anew.

    None is chosen by how near it comes: this says how much of the difference they can explain.
    """
    cases: list[tuple[str, str | None, Assumed]] = [
        ("as above: independent tokens, even use", None, Assumed()),
        ("tokens of a step agree on their groups", None, Assumed(agreement=1.0)),
        ("experts' popularity as rank^-0.5", None, Assumed(skew=0.5)),
        ("experts' popularity as rank^-1", None, Assumed(skew=1.0)),
        *((f"kernel {kernel}", kernel, Assumed()) for kernel in OTHER_KERNELS),
    ]
    moved = []
    for name, kernel, assumed in cases:
        nine = table_9(kernel, assumed)
        off = [abs(row.off[k]) for row in nine.rows for k in ("6", "4")]
        moved.append(
            Assumption(
                name,
                nine.within,
                nine.counted,
                sum(off) / len(off),
                nine.full_off,
                nine.step_overhead_ms,
            )
        )
    return tuple(moved)
