"""The SGLang hook against a small stand-in of its `topk` file; tests/engines has the real one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
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
from leanmoe.serve.sglang import patch, planned_model
from leanmoe.serve.sglang.planned_model import SglangPlan

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


REASON = "its experts are no kernels of SGLang's"


class Model(torch.nn.Module):
    """A loaded model: `layers` are the modules that name a layer, beside its TopKs."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)


def build(
    layers: Iterable[int] = (0, 1),
    form: str = "STANDARD",
    config: dict[str, Any] = CONFIG,
    model: Any = None,
    planned: SglangPlan | None = None,
    drafts: int = 0,
) -> Any:
    """The stand-in with the plan in it, and a model loaded; then a draft of so many layers."""
    module = SimpleNamespace(select_experts=select_experts, TopKConfig=TopKConfig)
    module.TopK = type("TopK", (TopK,), {"bind_runner_backend": TopK.bind_runner_backend})
    module.draft = []

    class ModelRunner:
        model_config = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config))
        device, server_args = "cpu", SimpleNamespace(enable_metrics=False)

        def __init__(self, is_draft_worker: bool = False) -> None:
            self.is_draft_worker = is_draft_worker
            self.model = model or Model()

        def load_model(self) -> None:
            for layer in range(drafts) if self.is_draft_worker else layers:
                topk = module.TopK(layer, form)
                topk.bind_runner_backend(None)
                if self.is_draft_worker:
                    module.draft.append(topk)

    patch.patch(planned or SglangPlan(PLAN, "plan.json"), module, ModelRunner)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planned_model, "not_minus_one_reason", lambda *_: REASON)
        ModelRunner().load_model()
    if drafts:
        ModelRunner(is_draft_worker=True).load_model()
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
    with pytest.raises(LeanMoeError, match=r"SGLang built \[0\]: layer 1 chooses"):
        build(layers=[0])
    with pytest.raises(LeanMoeError, match="--moe-runner-backend triton"):
        build(form="BYPASSED")
    with pytest.raises(LeanMoeError, match="its experts is 16, this model's is 8"):
        build(config={**CONFIG, "num_experts": 8})
    module = SimpleNamespace(select_experts=lambda _a, _b: None, TopKConfig=TopKConfig, TopK=TopK)
    with pytest.raises(LeanMoeError, match="hidden_states"):
        patch.patch(SglangPlan(PLAN, ""), module, None)


def test_a_process_of_a_pipeline_has_the_layers_of_its_own_stage() -> None:
    stage = Model()
    stage.start_layer, stage.end_layer = 1, 2  # type: ignore[assignment]
    weights, _ = build(layers=[1], model=stage).select_experts(
        torch.empty(6, 1), logits(6), TopKConfig(), layer_id=1
    )
    assert weights.shape[1] == 2
    with pytest.raises(LeanMoeError, match=r"MoE layers \[1\], SGLang built \[\]"):
        build(layers=[], model=stage)


def test_a_draft_runs_as_trained_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sglang.leanmoe"):
        module = build(drafts=1)
    assert "1 MoE layers of a draft model run as trained" in caplog.text
    draft = module.draft[0].topk_config
    ours, _ = module.select_experts(torch.empty(6, 1), logits(6), draft, layer_id=0)
    stock, _ = select_experts(torch.empty(6, 1), logits(6), TopKConfig())
    assert torch.equal(ours, stock)
    planned, _ = module.select_experts(torch.empty(6, 1), logits(6), TopKConfig(), layer_id=0)
    assert not torch.equal(planned, stock)


def test_a_count_that_was_made_stays_out_of_experts_that_do_not_skip() -> None:
    """SGLang itself would not count here: the plan hears of padding, SGLang runs as it would."""
    planned = SglangPlan(PLAN, "plan.json", stock_count=lambda: False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planned_model, "not_counted_reason", lambda: None)
        monkeypatch.setattr(planned_model, "check_counts", lambda: None)
        module = build(planned=planned)
    _, ids = module.select_experts(
        torch.empty(6, 1), logits(6), TopKConfig(), layer_id=0,
        num_token_non_padded=torch.tensor(4),
    )  # fmt: skip
    wanted = route(logits(6)[:4], Router(normalise=True), 4, Rule(guaranteed=2))
    wanted_ids = repeat_best(wanted.ids_BTK, 16)
    assert ids[:4].tolist() == wanted_ids.tolist()
    assert ids[4:].tolist() == [[int(wanted_ids[0, 0])] * 4] * 2


def test_skipped_slots_are_minus_one_where_experts_pass_over_them() -> None:
    planned = SglangPlan(PLAN, "plan.json")
    module = build(planned=planned)
    planned.skipped_id = -1
    wanted = route(logits(2), Router(normalise=True), 4, Rule(guaranteed=2))
    call = (torch.empty(2, 1), logits(2), TopKConfig())
    _, ids = module.select_experts(*call, layer_id=0)
    assert (ids == -1).any()
    assert ids.tolist() == wanted.ids_BTK.masked_fill(wanted.ids_BTK >= 16, -1).tolist()
    _, placed = module.select_experts(*call, layer_id=0, expert_location_dispatch_info=object())
    assert placed.tolist() == repeat_best(wanted.ids_BTK, 16).tolist()


class GraphRunner:
    """Captures steps of `capture_bs` requests, two rows each."""

    captured_req_width, capture_bs = 2, (8, 2, 4)

    def capture_one_shape(self, planned: SglangPlan) -> object:
        return planned.captured_sizes


def test_captured_sizes_are_known_while_a_step_is_captured() -> None:
    planned = SglangPlan(PLAN, "plan.json")
    runner = type("Runner", (GraphRunner,), {})
    patch.watch_captures(planned, [runner])
    assert runner().capture_one_shape(planned) == (4, 8, 16)
    assert planned.captured_sizes is None
    prefill = type("Prefill", (GraphRunner,), {"capture_num_tokens": [64, 32]})
    patch.watch_captures(planned, [prefill])
    assert prefill().capture_one_shape(planned) == (32, 64)
    with pytest.raises(LeanMoeError, match="object has no capture_one_shape"):
        patch.watch_captures(planned, [object])
