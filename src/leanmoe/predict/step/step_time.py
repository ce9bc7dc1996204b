"""The time of one forward step of a whole model on a deployment, part by part.

Letters: T tokens of the step, D hidden width, N GPUs of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

from leanmoe.models.attention import Attention
from leanmoe.models.shape import MoEShape
from leanmoe.predict.constants import Constants
from leanmoe.predict.experts.curves import Activation, Active
from leanmoe.predict.experts.spread import busiest, ranks_touched
from leanmoe.predict.hardware.collectives import (
    exchange_seconds,
    gather_seconds,
    library_reduce_seconds,
    reduce_seconds,
)
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import Rows
from leanmoe.predict.kernels.small_steps import SLOT_BY_SLOT, SmallSteps, slot_by_slot
from leanmoe.predict.kernels.tables import kernel_format
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.experts_time import GATHERED, ExpertsTime

REPLICATED_BYTES = 2.0
"""Bytes of an activation that is passed on: bf16."""
DEMAND_BYTES = 3 * 8
"""Bytes of an expert: what ranks add up where their tokens share experts, three int64."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a step, by what takes them."""

    projections: float = 0.0
    """Attention's matrices, and what stands in their place in linear mixers."""
    attention: float = 0.0
    """Over the cache, and among a prompt's tokens."""
    experts: float = 0.0
    shared: float = 0.0
    """Shared experts, dense layers, routers."""
    communication: float = 0.0
    head: float = 0.0
    layers: float = 0.0
    """Norms, rotations, routing and launches of every layer."""
    engine: float = 0.0
    """Once a step: scheduling, sampling."""

    @property
    def total(self) -> float:
        """The whole step."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    def to_json(self) -> dict[str, float]:
        """The parts in milliseconds."""
        return {name: 1e3 * value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class StepBatch:
    """What a step computes: sequences that decode, and tokens of prompts."""

    decoding: float
    context: float = 0.0
    """Mean tokens that a decoding sequence has."""
    prompt: float = 0.0
    """Tokens of prompts."""
    before: float = 0.0
    """Mean tokens of their prompts that came in earlier steps."""
    ending: float = 0.0
    """Prompts whose last token is among them: each is sampled too."""

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.decoding + self.prompt


class StepTime:
    """Times of steps of one model on one deployment, under any activation."""

    def __init__(
        self,
        model: MoEShape,
        deployment: Deployment,
        constants: Constants,
        kernel: str,
        small_steps: SmallSteps = SmallSteps.GROUP,
    ) -> None:
        deployment.check(model)
        self.model, self.deployment = model, deployment
        found, self.kernel_origin = constants.find(
            kernel, deployment.gpu.name, kernel_format(model)
        )
        self.kernel = found
        self.experts = ExpertsTime(model, deployment, found)
        self._rates, self.rates_origin = constants.rates_for(deployment.gpu.name)
        self._gathers = kernel in GATHERED
        self._small_steps = small_steps if deployment.data == 1 else SmallSteps.REPEAT
        self._experts_seconds: Callable[[float, Active], float] = lru_cache(maxsize=65536)(
            self._experts_of
        )

    def on(self, gpu: Gpu) -> StepTime:
        """Returns a copy with another GPU's rates, measured rows of this one's still holding."""
        other = copy(self)
        other.deployment = replace(self.deployment, gpu=gpu)
        other.experts = self.experts.on(gpu)
        other._experts_seconds = other._experts_of
        return other

    def parts(self, batch: StepBatch, activation: Activation) -> Parts:
        """Seconds of a step by part. With pipeline stages, of one part of the batch through all.

        Attention and its matrices see a copy's share of the tokens; the experts see all tokens.
        """
        here, rates = self.deployment, self._rates
        shared_by = here.pipeline
        tokens = batch.tokens / shared_by
        mine = tokens / here.data
        layers = self.model.layers
        active = activation.layers(batch.decoding / shared_by, batch.prompt / shared_by)
        sampled = (batch.decoding + batch.ending) / shared_by
        return Parts(
            projections=self._projections(mine),
            attention=self._attention(batch, shared_by * here.data),
            experts=sum(each.layers * self._experts_seconds(tokens, each) for each in active),
            shared=self._shared(mine),
            communication=self._communication(mine, tokens, active),
            head=self._head(sampled / here.data),
            layers=layers * rates.layer_seconds,
            engine=rates.step_seconds + sampled * rates.sampled_seconds,
        )

    def _products(self, weights: float, weight_bytes: float, tokens: float, calls: float) -> float:
        """Dense products with `weights` values in all, in so many calls."""
        if weights <= 0 or tokens <= 0:
            return 0.0
        gpu, rates = self.deployment.gpu, self._rates
        rate = gpu.flops_fp8 if weight_bytes < 1.5 else gpu.flops
        reading = weights * weight_bytes / (gpu.bandwidth * rates.product_bandwidth)
        computing = 2 * weights * tokens / (rate * rates.product_flops)
        return calls * rates.product_seconds + max(reading, computing)

    def _projections(self, tokens: float) -> float:
        parameters, storage = self.model.parameters, self.model.storage
        latent = any(kind.latent for kind, _ in self.model.attention)
        calls = self.model.layers * (5 if latent else 2)
        whole = self.model.copied_weights
        weights = (parameters.mixers - whole) / self.deployment.tensor + whole
        return self._products(weights, storage.mixer_bytes, tokens, calls)

    def _shared(self, tokens: float) -> float:
        shape = self.model
        each, stored, tensor = shape.parameters, shape.storage, self.deployment.tensor
        routed, dense = shape.routed_layers, shape.layers - shape.routed_layers
        return (
            self._products(each.shared / tensor, stored.shared_bytes, tokens, 2 * routed)
            + self._products(each.dense / tensor, stored.dense_bytes, tokens, 2 * dense)
            + self._products(each.routers, stored.router_bytes, tokens, routed)
        )

    def _head(self, tokens: float) -> float:
        parameters = self.model.parameters
        weights, stored = (parameters.head, self.model.storage.head_bytes)
        if not weights:
            weights, stored = parameters.embedding, self.model.storage.embedding_bytes
        return self._products(weights / self.deployment.tensor, stored, tokens, 1)

    def _attention(self, batch: StepBatch, copies: float) -> float:
        gpu, rates, tensor = self.deployment.gpu, self._rates, self.deployment.tensor
        seconds = 0.0
        for kind, count in self.model.attention:
            if batch.decoding > 0:
                seconds += count * self._decoding(kind, batch.decoding / copies, batch.context)
            if batch.prompt > 0:
                products = kind.prefill_products(batch.prompt / copies, batch.before, tensor)
                computing = products / (gpu.flops * rates.attention_flops)
                seconds += count * (rates.attention_seconds + computing)
        return seconds

    def _decoding(self, kind: Attention, sequences: float, context: float) -> float:
        """One layer's attention of `sequences` that decode, over what is cached of each."""
        gpu, rates, tensor = self.deployment.gpu, self._rates, self.deployment.tensor
        if kind.latent:
            fixed = rates.latent_seconds + sequences * rates.latent_sequence_seconds
            bandwidth, flops = rates.latent_bandwidth, rates.latent_flops
        else:
            heads = max(1.0, kind.pairs / tensor)
            fixed = rates.attention_seconds + sequences * heads * rates.attention_sequence_seconds
            bandwidth, flops = rates.attention_bandwidth, rates.attention_flops
        read = sequences * kind.cached_width(tensor) * kind.reach(context) * REPLICATED_BYTES
        products = sequences * kind.decode_products(context, tensor)
        return fixed + max(read / (gpu.bandwidth * bandwidth), products / (gpu.flops * flops))

    def _experts_of(self, tokens: float, active: Active) -> float:
        """Seconds of one of the layers that activate the same."""
        rows, here = active.rows, self.deployment
        if tokens <= 0 or rows <= 0:
            return 0.0
        if self._is_slot_by_slot(tokens, active):
            plain = Rows(tokens, rows / tokens, rows, active.distinct)
            blocks = active.columns if self._small_steps is SmallSteps.REPEAT else rows
            shape = self.experts.shape
            return self.experts.seconds(slot_by_slot(shape, plain, blocks, here.gpu))
        share = busiest(active.distinct, rows, active.experts, here.expert, active.most_loaded)
        if here.exchanges and not self._gathers:
            tokens = self._received(tokens, rows, share.rows)
            rows = share.rows
        return self.experts.seconds(
            Rows(tokens, rows / tokens, share.rows, max(share.distinct, 1e-9))
        )

    def _is_slot_by_slot(self, tokens: float, active: Active) -> bool:
        share = SLOT_BY_SLOT.get((self.kernel.kernel, self.kernel.dtype), 0.0)
        few = share * self.model.experts
        if self.deployment.expert > 1 or active.columns > few:
            return False
        is_grouped = active.is_shared and tokens > 1 and self._small_steps is SmallSteps.GROUP
        return not is_grouped

    def _received(self, tokens: float, rows: float, most: float) -> float:
        """Tokens that reach the busiest GPU, of all that are sent; they hold `most` rows."""
        touched = self._touched(rows / tokens)
        return tokens * touched / self.deployment.expert * most * self.deployment.expert / rows

    def _touched(self, slots: float) -> float:
        router = self.model.router
        return ranks_touched(
            self.model.experts, slots, self.deployment.expert, router.groups, router.groups_used
        )

    def _communication(self, mine: float, tokens: float, active: list[Active]) -> float:
        """All-reduces of tensor parallelism; tokens to their experts and back where attention is
        copied."""
        here, shape, rates = self.deployment, self.model, self._rates
        size = mine * shape.hidden * REPLICATED_BYTES
        seconds = 0.0
        if here.tensor > 1:
            calls = shape.layers * (1 if here.data > 1 else 2)
            seconds += calls * reduce_seconds(rates, here.gpu, size, here.tensor)
        if here.data > 1:
            seconds += sum(each.layers * self._to_experts(mine, tokens, each) for each in active)
        if here.pipeline > 1:
            hop = size / here.gpu.network + rates.exchange_seconds
            seconds += (here.pipeline - 1) * hop
        return seconds

    def _to_experts(self, mine: float, tokens: float, active: Active) -> float:
        """One layer's tokens to their experts and back, with data parallelism, and what ranks tell
        each other of their tokens' choices before."""
        here, hidden, rates = self.deployment, self.model.hidden, self._rates
        told = 0.0
        if active.exchanges_demand:
            demand = DEMAND_BYTES * self.model.experts
            told = library_reduce_seconds(rates, here.gpu, demand, here.data)
        if here.exchanges and not self._gathers:
            touched = self._touched(active.rows / tokens if tokens else 0.0)
            return told + 2 * exchange_seconds(rates, here.gpu, mine, touched, hidden, here.expert)
        size = tokens * hidden * REPLICATED_BYTES
        if self._gathers:
            return told + 2 * gather_seconds(rates, here.gpu, size, here.stage)
        return told + reduce_seconds(rates, here.gpu, size, here.stage)
