"""The plan of one SGLang process: the model it fits, the layers that ask it, and what they run."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import is_plain
from leanmoe.serve.sglang.padding import (
    check_counts,
    is_batch_aware,
    needs_count,
    not_counted_reason,
)
from leanmoe.serve.sglang.routing import BandRule
from leanmoe.serve.sglang.skipped_slots import (
    fails_on_minus_one,
    not_minus_one_reason,
    sglangs_experts,
)

logger = logging.getLogger("sglang.leanmoe")


class SglangPlan:
    """The plan of this process and the layers that SGLang built."""

    def __init__(
        self, plan: Plan, path: str, stock_count: Callable[[], bool] | None = None
    ) -> None:
        """`stock_count` is SGLang's own function that says whether it counts real rows; None where
        it was left in its place."""
        self.plan, self.path, self._stock_count = plan, path, stock_count
        self._bands, self._is_batch_aware = plan.bands, is_batch_aware(plan)
        self.shape: MoEShape | None = None
        self.topks: dict[int, Any] = {}
        """SGLang's TopK of each planned layer, by the layer's number."""
        self.drafts: list[Any] = []
        """Configs of a draft model's TopK modules: its layers have numbers of the target's."""
        self.is_loading_draft = False
        self.captured_sizes: tuple[int, ...] | None = None
        """Rows of all steps that are captured, while one of them is."""
        self.skipped_id: int | None = None
        """What stands in a skipped slot; None: the token's best expert again."""
        self.keeps_count = True
        """Whether SGLang is given its count of real rows, and writes -1 beyond them."""

    def check_model(self, config: Any) -> None:
        """Refuses a model that the plan was not made for."""
        self.shape = read_shape(config.to_dict())
        self.plan.check(self.shape.fingerprint())
        router = self.shape.router
        if router.zero_experts or router.expert_scale:
            raise LeanMoeError(
                f"{self.shape.model_type}: SGLang's hook knows no identity experts and no factor "
                "on each expert's weight: unset LEANMOE_PLAN"
            )

    def check_topk(self, topk: Any) -> None:
        """Refuses a layer whose kernel chooses experts, or in which shared experts are fused."""
        if self.is_loading_draft or topk.is_draft:
            self.drafts.append(topk.topk_config)
            return
        if topk.layer_id not in self._planned():
            return
        form = getattr(topk.topk_config.output_format, "name", "STANDARD")
        if form != "STANDARD":
            raise LeanMoeError(
                f"layer {topk.layer_id}: SGLang's kernel chooses experts itself ({form}): set "
                "--moe-runner-backend triton, or unset LEANMOE_PLAN"
            )
        if getattr(topk.topk_config, "num_shared_topk_slots", 0):
            raise LeanMoeError(
                f"layer {topk.layer_id}: shared experts are fused into the routed ones: set "
                "--disable-shared-experts-fusion"
            )
        self.topks[topk.layer_id] = topk

    def check_layers(self, model: Any, device: Any) -> None:
        """Refuses a loaded model of which not every planned layer asks a `TopK` for its experts.

        With pipeline parallelism a process has the layers of its own stage alone. Settles what
        stands in skipped slots and in padding, and logs it.
        """
        for module in model.modules():
            self._check_module(module)
        last = 0 if self.shape is None else max(self.shape.moe_layers, default=0) + 1
        stage = range(getattr(model, "start_layer", 0), getattr(model, "end_layer", last))
        own = sorted(self._planned() & set(stage))
        if missing := sorted(set(own) - set(self.topks)):
            raise LeanMoeError(
                f"the plan has rules for MoE layers {own}, SGLang built {sorted(self.topks)}: "
                f"layer {missing[0]} chooses experts elsewhere; unset LEANMOE_PLAN to run the "
                "model in full"
            )
        padding = self._settle_padding()
        skipped = self._settle_skipped_slots(model, device)
        if self._stock_count is not None and self.skipped_id is None and not self._stock_count():
            self.keeps_count = False
        logger.info(
            "leanmoe: plan %s at work in %d MoE layers of process %d (layers %d to %d), "
            "padding %s, a skipped slot is %s",
            self.path, len(own), os.getpid(), stage.start, stage.stop - 1, padding, skipped,
        )  # fmt: skip

    def _check_module(self, module: Any) -> None:
        """Refuses a layer under a rule that another router than TopK's chooses experts for."""
        layer = getattr(module, "layer_id", None)
        if layer not in self._planned():
            return
        if type(module).__name__ == "HashTopK":
            raise LeanMoeError(
                f"layer {layer}: its experts are hashed from token ids (HashTopK): a plan must "
                "leave it as trained; unset LEANMOE_PLAN to run the model in full"
            )
        if getattr(module, "use_block_routing", False):
            raise LeanMoeError(
                f"layer {layer}: it chooses experts for blocks of tokens (use_block_routing), "
                "past SGLang's TopK; unset LEANMOE_PLAN to run the model in full"
            )

    def _settle_padding(self) -> str:
        """How padding is told from tokens; raises LeanMoeError where it is not and must be."""
        if not needs_count(self.plan):
            return "as SGLang has it, since no rule depends on it"
        if self._stock_count is None:
            return "as SGLang has it"
        check_counts()
        if (reason := not_counted_reason()) is None:
            return "by SGLang's count of real rows"
        if self._is_batch_aware:
            raise LeanMoeError(f"padding would take part in rules that share experts: {reason}")
        return f"not told, so that padded rows pick a band ({reason})"

    def _settle_skipped_slots(self, model: Any, device: Any) -> str:
        """What stands in a skipped slot, in words, with the reason."""
        shape = self.shape
        if shape is None or all(is_plain(rule) for rule in self._rules()):
            return "not there: every slot has an expert"
        reason = not_minus_one_reason(self.topks.values(), model)
        if reason is None:
            slots = {rule.top_k or self.plan.model.top_k for rule in self._rules()}
            reason = fails_on_minus_one(sglangs_experts, shape.experts, slots, device)
        if reason is not None:
            return f"the token's best expert again, weight 0, and computed ({reason})"
        self.skipped_id = -1
        return "id -1, no weight read and no row computed"

    def log_draft(self) -> None:
        """Says that a loaded draft model runs as trained."""
        logger.info(
            "leanmoe: %d MoE layers of a draft model run as trained; what they propose is "
            "verified under the plan", len(self.drafts),
        )  # fmt: skip

    def bands(self, config: Any, layer_id: int | None, rows: int, counts: bool) -> list[BandRule]:
        """The rules of a call of so many rows, padding included: several where only the device
        knows how many of them are real (`counts`), and a band ends among what they may be.
        """
        layer = self._layer(layer_id)
        if layer is None or any(config is draft for draft in self.drafts):
            return [BandRule(None, Rule())]
        if self._is_batch_aware and self.captured_sizes is not None and not counts:
            raise LeanMoeError(
                f"layer {layer_id}: SGLang does not say how many of {rows} captured rows are real: "
                "set --disable-cuda-graph-padding and --cuda-graph-backend-prefill disabled"
            )
        fewest = rows
        if counts and self.captured_sizes is not None:
            below = bisect_left(self.captured_sizes, rows)
            fewest = 1 + (self.captured_sizes[below - 1] if below else 0)
        found = []
        for band in self._bands:
            if band.up_to is None or band.up_to >= fewest:
                found.append(BandRule(band.up_to, band.rules[layer]))
                if band.up_to is None or band.up_to >= rows:
                    return found
        return [*found, BandRule(None, Rule())]

    def _rules(self) -> list[Rule]:
        return [rule for band in self._bands for rule in band.rules]

    def _planned(self) -> set[int]:
        """Numbers of the layers that have a rule in any band."""
        if self.shape is None:
            return set()
        return {
            number
            for n, number in enumerate(self.shape.moe_layers)
            if any(not band.rules[n].is_empty for band in self._bands)
        }

    def _layer(self, layer_id: int | None) -> int | None:
        if self.shape is None or layer_id not in self.shape.moe_layers:
            return None
        return self.shape.moe_layers.index(layer_id)
