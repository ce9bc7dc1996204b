"""`leanmoe predict` from top to bottom: what is asked for is read, then predicted or swept.

Needs no torch, unless a profile's traces have to be replayed under a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import to_json
from leanmoe.models.catalog import find_shape
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.predict.constants import find_constants
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import find_curves
from leanmoe.predict.hardware.gpus import read_gpu
from leanmoe.predict.prediction import Basis, Prediction, default_kernel
from leanmoe.predict.prediction import predict as predict_load
from leanmoe.predict.settings import CONCURRENCY, SWEPT_CONCURRENCY, SWEPT_GPUS, PredictSettings
from leanmoe.predict.step.deployment import find_deployment
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
from leanmoe.predict.traffic.sweep import sweep
from leanmoe.results.predict import SweepLimits, SweepResults


@dataclass(frozen=True)
class PredictResults:
    """What was predicted: one prediction for each load, or a sweep over deployments."""

    predictions: tuple[Prediction, ...] = ()
    sweep: SweepResults | None = None

    def to_json(self) -> Any:
        """The sweep, or a list of predictions, as JSON values."""
        if self.sweep is not None:
            return self.sweep.to_json()
        return [to_json(each) for each in self.predictions]


def predict(settings: PredictSettings) -> PredictResults:
    """Predicts throughput, latency and memory of the full model and, where one is given, a plan.

    Raises LeanMoeError for a setting that is not allowed, for a plan of another model, and for a
    model that does not fit the GPUs.
    """
    settings.check()
    model, gpu = find_shape(settings.model), read_gpu(settings.gpu)
    plan = find_plan(settings, model)
    basis = Basis(
        settings.kernel or default_kernel(model),
        find_curves(model, plan, settings.profile, Assumed(settings.skew, settings.agreement)),
        find_constants(settings.constants),
        settings.cross_rank,
    )
    loads = _loads(settings)
    if settings.sweep:
        plans = {} if plan is None else {"plan": plan}
        gpus = settings.gpus or (SWEPT_GPUS,)
        limits = SweepLimits(settings.tpot, settings.ttft, settings.price)
        return PredictResults(sweep=sweep(model, plans, gpu, gpus, loads, basis, limits))
    place = find_deployment(model, gpu, settings)
    return PredictResults(
        tuple(predict_load(model, plan, place, load, basis, settings.seed) for load in loads)
    )


def find_plan(settings: PredictSettings, model: MoEShape) -> Plan | None:
    """A saved plan, or a uniform one; raises LeanMoeError where both are asked for or none fits."""
    rule = Rule(top_k=settings.top_k, guaranteed=settings.guaranteed)
    fingerprint = model.fingerprint()
    if settings.level is not None and settings.plan is None:
        raise LeanMoeError(f"--level {settings.level} is one of a plan's: give one with --plan")
    if settings.plan is None:
        if rule.is_empty:
            return None
        plan = Plan.uniform(fingerprint, rule)
        plan.check(fingerprint)
        return plan
    if not rule.is_empty:
        raise LeanMoeError("give --plan, or --top-k and --guaranteed, not both")
    plan = Plan.load(settings.plan).at(settings.level)
    plan.check(fingerprint, more_experts=True)
    return plan


def _loads(settings: PredictSettings) -> list[ServiceLoadModel]:
    """A load for each concurrency, or the one at which requests arrive at a rate."""
    lengths = (
        read_lengths(settings.input_len, "--input-len"),
        read_lengths(settings.output_len, "--output-len"),
    )
    if settings.request_rate is not None:
        return [ServiceLoadModel(*lengths, rate=settings.request_rate)]
    default = SWEPT_CONCURRENCY if settings.sweep else CONCURRENCY
    return [ServiceLoadModel(*lengths, each) for each in settings.concurrency or default]
