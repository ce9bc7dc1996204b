"""One model that vLLM builds, and its MoE layers under the plan."""

from __future__ import annotations

import logging
import re
import weakref
from typing import Any

import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.serve.plugin_options import LEANMOE, PluginOptions, has_prompt_rules
from leanmoe.serve.routing_statistics import RoutingStatistics
from leanmoe.serve.vllm import checks
from leanmoe.serve.vllm.checks import GATHERING, experts_class, scope_of
from leanmoe.serve.vllm.installation import version
from leanmoe.serve.vllm.layer_routing import OneCopy, VllmLayerRouting
from leanmoe.serve.vllm.padding import PaddingSource, PaddingWatch, StepPadding, padding_source
from leanmoe.serve.vllm.rule_rows import Levels, RuleRows
from leanmoe.serve.vllm.skipped_slots import (
    LeanmoeExperts,
    all_sizes_unsupported_reason,
    check_experts,
    kernels_for,
    kernels_unsupported_reason,
    warm_up,
)
from leanmoe.serve.vllm.small_steps import (
    LayerSteps,
    Skipped,
    Skipping,
    grouping_unsupported_reason,
    small_steps_unsupported_reason,
)

logger = logging.getLogger("vllm.leanmoe")


class PlannedModel:
    """A model that vLLM builds in this process, and its layers under the plan."""

    def __init__(
        self, plan: Plan, config: Any, options: PluginOptions, levels: Levels | None = None
    ) -> None:
        """`config` is vLLM's, `levels` says those of requests where they may have several.

        Raises LeanMoeError if the plan was made for another model.
        """
        self.config = weakref.ref(config)
        self.plan = plan
        self._options = options
        # The config that vLLM has of the model includes its user's overrides.
        self.shape = read_shape(config.model_config.hf_config.to_dict())
        plan.check(self.shape.fingerprint())
        self.statistics: RoutingStatistics | None = None
        """What the layers' last steps ran; None unless the options ask for it."""
        if options.collect_stats:
            self.statistics = RoutingStatistics(plan.model.moe_layers, plan.model.experts)
        bands = [band for level in plan.levels for band in level.bands]
        rules = [rule for band in bands for rule in band.rules]
        self.padding = StepPadding(padding_source(config, rules, version()))
        self.rule_rows: RuleRows | None = None
        """Which rows of a step are under which rule; None where all are under the same."""
        if has_prompt_rules(plan) or levels is not None:
            checks.check_row_classes(config)
            most = config.scheduler_config.max_num_batched_tokens
            has_ranks = getattr(config.parallel_config, "data_parallel_size", 1) > 1
            self.rule_rows = RuleRows(
                plan, most, is_checked=options.check_rows, has_ranks=has_ranks, levels=levels
            )
        self.layers: dict[int, VllmLayerRouting] = {}
        self.runners: dict[int, Any] = {}
        self._computed: list[Any] = []
        """The layers whose experts leanmoe's kernels compute."""

    @property
    def chooses_experts(self) -> bool:
        """Whether the plan stands in the place of any layer's routing."""
        return self.statistics is not None or not self.plan.is_empty

    def adopt(self, runner: Any) -> None:
        """Puts the plan in the place of a layer's routing, unless it is no layer of the plan's."""
        name, index = runner.layer_name, decoder_index(runner.layer_name)
        if index not in self.shape.moe_layers:
            logger.info("leanmoe: %s is not in the plan, it runs as trained", name)
            return
        layer = self.shape.moe_layers.index(index)
        if layer in self.runners:
            raise LeanMoeError(
                f"vLLM built two MoE layers {index} in one model: a plan cannot tell them apart; "
                "unset LEANMOE_PLAN"
            )
        checks.check_substitution(runner, name)
        self.runners[layer] = runner
        routing = self._routing(runner, layer)
        rules, cross_rank = routing.rules, self._options.cross_rank
        checks.check_ranks(runner, rules, cross_rank, self.config(), name)
        top_k = self.plan.model.top_k
        checks.check_router(runner.router, rules, top_k, name, routing.by_table)
        if all(rule.is_empty for rule in rules) and self.statistics is None:
            return
        if "_compute_routing" in vars(runner.router):
            raise LeanMoeError(f"{name}: its router is another layer's too: unset LEANMOE_PLAN")
        runner.router._compute_routing = routing
        OneCopy.put(runner.router)
        self.layers[layer] = routing

    def _routing(self, runner: Any, layer: int) -> VllmLayerRouting:
        parallel = runner.moe_config
        share = (parallel.tp_rank, parallel.tp_size) if parallel.is_sequence_parallel else None
        if share is None and self.statistics is not None and self.rule_rows is not None:
            self.statistics.rule_rows = self.rule_rows.rows
        return VllmLayerRouting(
            runner.router,
            self.plan,
            layer,
            sequence_parallel=share,
            is_full_width=self._is_full_width(parallel),
            statistics=self.statistics,
            scope=scope_of(runner, self.plan.model.experts, self._options.cross_rank),
            padding=self.padding,
            rule_rows=self.rule_rows,
        )

    def check(self) -> None:
        """Refuses a loaded model of which not every layer can run under the plan."""
        config = self.config()
        checks.check_layers(
            sorted(self.shape.moe_layers[layer] for layer in self.runners),
            [index for index in self.shape.moe_layers if index in _own_layers(config)],
        )
        for layer, routing in self.layers.items():
            runner = self.runners[layer]
            checks.check_runner(runner, routing.rules, runner.layer_name, routing.by_table)
        if self._options.experts == LEANMOE:
            for runner in self.runners.values():
                check_experts(runner, runner.layer_name)

    def settle(self) -> None:
        """Puts leanmoe's kernels in place, if asked for, and settles how skipped slots are written.

        It is called for a model that `check` has nothing against.
        """
        for layer, runner in self.runners.items():
            routing = self.layers.get(layer)
            if self._options.experts == LEANMOE:
                self._compute(runner, routing)
            elif routing is not None and routing.may_skip and not routing.is_plain:
                self._settle_skipping(runner, routing)

    def _compute(self, runner: Any, routing: VllmLayerRouting | None) -> None:
        """Has leanmoe's kernels compute a layer's experts."""
        experts = LeanmoeExperts(runner)
        experts.put()
        self._computed.append(runner)
        if routing is not None and routing.may_skip:
            routing.skipping = Skipping.at_all_sizes(Skipped.BEYOND)
            routing.experts_in_place = experts.is_in_place

    def _settle_skipping(self, runner: Any, routing: VllmLayerRouting) -> None:
        """Has a layer skip slots as well as its experts can; the log says what they cannot."""
        name, experts = runner.layer_name, self.plan.model.experts
        repeats = all_sizes_unsupported_reason(runner, routing.slots, experts)
        if repeats is None:
            steps = LayerSteps(runner, routing.groups_step, routing.skips_step)
            self._put(steps, routing, Skipping.at_all_sizes(Skipped.MINUS_ONE, groups=True))
            if steps.activates_all:
                logger.info("leanmoe: %s: vLLM's activation takes the rows of all slots", name)
            return
        if self._options.experts is None and kernels_unsupported_reason(runner) is None:
            logger.info("leanmoe: %s: leanmoe's kernels compute it: %s", name, repeats)
            self._compute(runner, routing)
            return
        if routing.by_table:
            checks.check_skipping(version(), repeats, name)
        if reason := small_steps_unsupported_reason(runner, routing.slots, experts):
            logger.info("leanmoe: %s: a skipped slot repeats: %s; %s", name, repeats, reason)
            return
        logger.info("leanmoe: %s: a skipped slot repeats in larger steps: %s", name, repeats)
        if reason := grouping_unsupported_reason():
            logger.info("leanmoe: %s: small steps stay apart: %s", name, reason)
            routing.skipping = Skipping(small=Skipped.MINUS_ONE)
            return
        steps = LayerSteps(runner, routing.groups_step)
        self._put(steps, routing, Skipping(small=Skipped.MINUS_ONE, groups=True))

    def _put(self, steps: LayerSteps, routing: VllmLayerRouting, skipping: Skipping) -> None:
        steps.put()
        routing.skipping, routing.experts_in_place = skipping, steps.is_in_place

    def warm_up(self) -> None:
        """Compiles leanmoe's kernels for steps of every size, but experts for those not captured.

        It is called once the model has run a step. What the kernels keep on the device then lies
        outside of the memory that sleep mode lets go of, in which vLLM loads a model.
        """
        layers = {
            each.w13_weight.shape: each for each in (r.routed_experts for r in self._computed)
        }
        with torch.inference_mode():
            for routing in self.layers.values():
                routing.warm_up()
            for layer in layers.values():
                for rows in self._uncaptured_rows():
                    warm_up(layer, rows, self.plan.model.top_k)

    def _uncaptured_rows(self) -> list[int]:
        """Powers of two, up to the rows that a step may have, beyond the largest captured size."""
        config: Any = self.config()
        compilation = getattr(config, "compilation_config", None)
        sizes = getattr(compilation, "cudagraph_capture_sizes", None) or [0]
        most = config.scheduler_config.max_num_batched_tokens
        powers = [1 << power for power in range(most.bit_length())]
        return [rows for rows in (*powers, most) if max(sizes) < rows <= most]

    @property
    def watch(self) -> PaddingWatch | None:
        """What compares the masks that the layers read; None where no rule reads one."""
        is_plain = all(routing.is_plain for routing in self.layers.values())
        reads_none = self.padding.source is PaddingSource.NONE or is_plain
        return None if reads_none else self.padding.watch

    def describe(self) -> str:
        """What runs, in one line."""
        runner = next(iter(self.runners.values()), None)
        method = None if runner is None else runner.routed_experts.quant_method
        experts = "none here" if method is None else experts_class(method).__name__
        if self._computed:
            experts = f"leanmoe, {kernels_for(self._computed[0].routed_experts).reason}"
        skippings = {routing.skipping.describe() for routing in self.layers.values()}
        parts = [
            f"{len(self.layers)} of {len(self.runners)} MoE layers under it",
            f"routing by {self._implementations()}",
            f"experts by {experts}",
            f"padding by {self.padding.source.value}",
            *(f"a skipped slot is {skipping}" for skipping in sorted(skippings)),
        ]
        return ", ".join(parts)

    def _implementations(self) -> str:
        config = self.config()
        device = "cpu" if config is None else config.device_config.device
        logits = torch.empty(1, self.plan.model.experts, device=device)
        names = {name for each in self.layers.values() for name in each.implementations(logits)}
        return " and ".join(sorted(names)) or "vllm"

    def uncaptured_bands(self) -> str | None:
        """What happens to steps between a band's end and the next size that is captured."""
        compilation = getattr(self.config(), "compilation_config", None)
        sizes = sorted(getattr(compilation, "cudagraph_capture_sizes", None) or [])
        if self.rule_rows is not None:  # the rows that are really there pick the band
            return None
        ends = [band.up_to for band in self.plan.bands if band.up_to is not None]
        between = [end for end in ends if sizes and end < sizes[-1] and end not in sizes]
        if not between:
            return None
        return (
            f"bands end at {', '.join(map(str, between))}, which are no capture sizes: a step that "
            "is padded beyond a band's end runs under the next; add them to cudagraph_capture_sizes"
        )

    def _is_full_width(self, parallel: Any) -> bool:
        """Whether every step must have the model's own number of slots.

        Data-parallel ranks exchange their ids in kernels that may be made for one width; whoever
        asks for the experts of a reply gets them from a table of that width.
        """
        config = self.config()
        # Since 0.31 the setting stands in the second of these.
        places = [getattr(config, name, None) for name in ("model_config", "aux_output_config")]
        returned = any(getattr(at, "enable_return_routed_experts", False) for at in places)
        gathers = parallel.moe_parallel_config.all2all_backend in GATHERING
        return bool((parallel.dp_size > 1 and not gathers) or returned)


def decoder_index(name: str) -> int:
    """The decoder layer of a MoE layer's name, like model.layers.3.mlp.experts."""
    match = re.search(r"\blayers?\.(\d+)\.", name) or re.search(r"\.(\d+)\.", name)
    if match is None:
        raise LeanMoeError(
            f"vLLM built a MoE layer {name!r}, whose name has no layer number: unset LEANMOE_PLAN"
        )
    return int(match[1])


def _own_layers(config: Any) -> range:
    """The decoder layers of this process's pipeline stage."""
    from vllm.distributed import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    layers = config.model_config.hf_text_config.num_hidden_layers
    if config.parallel_config.pipeline_parallel_size == 1:
        return range(layers)
    group = get_pp_group()
    return range(*get_pp_indices(layers, group.rank_in_group, group.world_size))
