"""The SGLang hook against a small stand-in of its `topk` file; tests/engines has the real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import repeat_best
from leanmoe.models.routers import Router
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.sglang import patch

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 16, "intermediate_size": 32, "num_experts": 16,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "vocab_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MODEL = read_shape(CONFIG).fingerprint()
PLAN = Plan.banded(MODEL, (Band(8, (Rule(guaranteed=2), Rule(top_k=2))),))


@dataclass
class TopKConfig:
    top_k: int = 4
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    custom_routing_function: Callable[..., Any] | None = None
    correction_bias: Tensor | None = None
    scoring_func: str = "softmax"
    output_format: Any = None
    routed_scaling_factor: float | None = None
    apply_routed_scaling_factor_on_output: bool = False
    num_shared_topk_slots: int = 0


def select_experts(
    hidden_states: Tensor,
    router_logits: Tensor,
    topk_config: TopKConfig,
    *,
    layer_id: int | None = None,
    num_token_non_padded: Tensor | None = None,
    expert_location_dispatch_info: Any = None,
    dynamic_expert_bias: Any = None,
) -> tuple[Tensor, Tensor]:
    """What SGLang's does around routing: scaling, then -1 in padding rows."""
    del layer_id, expert_location_dispatch_info, dynamic_expert_bias
    if topk_config.custom_routing_function is None:
        scores = router_logits.float().softmax(-1)
        weights, ids = scores.topk(topk_config.top_k)
        if topk_config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
    else:
        weights, ids = topk_config.custom_routing_function(
            hidden_states=hidden_states, gating_output=router_logits,
            topk=topk_config.top_k, renormalize=topk_config.renormalize,
        )  # fmt: skip
    if topk_config.apply_routed_scaling_factor_on_output and topk_config.routed_scaling_factor:
        weights = weights * topk_config.routed_scaling_factor
    ids = ids.to(torch.int32)
    if num_token_non_padded is not None:
        ids[torch.arange(len(ids)) >= num_token_non_padded] = -1
    assert ids.shape[1] == topk_config.top_k
    return weights, ids


class TopK:
    def __init__(self, layer_id: int, form: str = "STANDARD", is_draft: bool = False) -> None:
        self.layer_id, self.is_draft, self.form = layer_id, is_draft, form
        self.topk_config = TopKConfig()

    def bind_runner_backend(self, backend: Any) -> None:
        del backend
        self.topk_config.output_format = SimpleNamespace(name=self.form)


def build(layers: int = 2, form: str = "STANDARD", config: dict[str, Any] = CONFIG) -> Any:
    """The stand-in with the plan in it, and a model loaded."""
    module = SimpleNamespace(select_experts=select_experts, TopKConfig=TopKConfig)
    module.TopK = type("TopK", (TopK,), {"bind_runner_backend": TopK.bind_runner_backend})

    class ModelRunner:
        is_draft_worker = False
        model_config = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config))

        def load_model(self) -> None:
            for layer in range(layers):
                module.TopK(layer, form).bind_runner_backend(None)

    patch.patch(patch.SglangPlan(PLAN, "plan.json"), module, ModelRunner)
    ModelRunner().load_model()
    return module


def logits(rows: int) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))


def test_a_rule_is_the_custom_routing_function_of_the_call() -> None:
    weights, ids = build().select_experts(
        hidden_states=torch.empty(6, 1), router_logits=logits(6), topk_config=TopKConfig(),
        layer_id=0,
    )  # fmt: skip
    wanted = route(logits(6), Router(normalise=True), 4, Rule(guaranteed=2))
    assert ids.tolist() == repeat_best(wanted.ids_BTK, 16).tolist()
    torch.testing.assert_close(weights, wanted.weights_BTK, atol=1e-6, rtol=1e-5)


def test_padding_rows_ask_for_no_expert_and_stay_minus_one() -> None:
    _, ids = build().select_experts(
        torch.empty(6, 1), logits(6), TopKConfig(), layer_id=0,
        num_token_non_padded=torch.tensor(4),
    )  # fmt: skip
    wanted = route(logits(6)[:4], Router(normalise=True), 4, Rule(guaranteed=2))
    assert ids[:4].tolist() == repeat_best(wanted.ids_BTK, 16).tolist()
    assert ids[4:].tolist() == [[-1] * 4] * 2


def test_grouped_routing_with_a_bias_is_deepseeks() -> None:
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 0.1
    config = TopKConfig(
        use_grouped_topk=True, num_expert_group=4, topk_group=2, correction_bias=bias,
        routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True,
    )  # fmt: skip
    weights, ids = build().select_experts(torch.empty(6, 1), logits(6), config, layer_id=0)
    router = Router("sigmoid", "bias", True, 1e-20, 2.5, 4, 2, "top2_sum")
    wanted = route(logits(6), router, 4, Rule(guaranteed=2), bias)
    assert ids.tolist() == repeat_best(wanted.ids_BTK, 16).tolist()
    torch.testing.assert_close(weights, wanted.weights_BTK, atol=1e-5, rtol=1e-5)


def test_a_plain_top_k_and_other_layers_run_sglangs_own_routing() -> None:
    module = build()
    weights, _ = module.select_experts(torch.empty(6, 1), logits(6), TopKConfig(), layer_id=1)
    stock, _ = select_experts(torch.empty(6, 1), logits(6), TopKConfig(top_k=2))
    assert torch.equal(weights, stock)
    for layer, rows in ((7, 6), (0, 9)):  # not in the plan; beyond the last band
        weights, _ = module.select_experts(
            torch.empty(rows, 1), logits(rows), TopKConfig(), layer_id=layer
        )
        assert torch.equal(weights, select_experts(torch.empty(1), logits(rows), TopKConfig())[0])


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="SGLang built"):
        build(layers=1)
    with pytest.raises(LeanMoeError, match="--moe-runner-backend triton"):
        build(form="BYPASSED")
    with pytest.raises(LeanMoeError, match="its experts is 16, this model's is 8"):
        build(config={**CONFIG, "num_experts": 8})
    module = SimpleNamespace(select_experts=lambda _a, _b: None, TopKConfig=TopKConfig, TopK=TopK)
    with pytest.raises(LeanMoeError, match="hidden_states"):
        patch.patch(patch.SglangPlan(PLAN, ""), module, None)
