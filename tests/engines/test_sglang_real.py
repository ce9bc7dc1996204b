"""The plan in SGLang's own `select_experts`; skipped where SGLang cannot be imported.

A machine without a GPU will do: SGLang then routes in plain torch. Its wheel is enough, with the
packages that its `topk` file imports.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_sglang import TESTED
from leanmoe.kernels.dispatch import repeat_best
from leanmoe.models.routers import Router
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.sglang import padding
from leanmoe.serve.sglang import patch as sglang_patch
from leanmoe.serve.sglang.planned_model import SglangPlan
from leanmoe.serve.sglang.routing import read_router

try:
    topk: Any = import_module("sglang.srt.layers.moe.topk")
    runner: Any = import_module("sglang.srt.model_executor.model_runner")
    batches: Any = import_module("sglang.srt.model_executor.forward_batch_info")
    context: Any = import_module("sglang.srt.runtime_context")
except ImportError as error:
    pytest.skip(f"SGLang cannot be imported here: {error}", allow_module_level=True)

EXPERTS, TOP_K, ROWS = 16, 4, 24
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"renormalize": True},
    "softmax, not normalised": {"renormalize": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid with bias": {"scoring_func": "sigmoid", "correction_bias": "random"},
    "softmax in groups": {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
    "sigmoid in groups": {
        "use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2,
        "scoring_func": "sigmoid",
    },
    "DeepSeek-V3's": {
        "use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2,
        "scoring_func": "sigmoid", "correction_bias": "random",
    },
    "one group with bias": {
        "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1,
        "correction_bias": "random",
    },
}  # fmt: skip
RULES = {
    "top_k": Rule(top_k=2),
    "threshold": Rule(threshold=0.4),
    "threshold, weights kept": Rule(threshold=0.4, renormalise=0.0),
    "top_p": Rule(top_p=0.6),
    "guaranteed": Rule(guaranteed=1),
    "budget": Rule(budget=6),
    "experts": Rule(experts=tuple(range(0, EXPERTS, 2))),
    "guaranteed of fewer": Rule(top_k=3, guaranteed=1),
}


def config(name: str) -> Any:
    settings = dict(ROUTERS[name])
    if settings.get("correction_bias") == "random":
        settings["correction_bias"] = torch.randn(EXPERTS, generator=seeded(1))
    return topk.TopKConfig(
        top_k=TOP_K, torch_native=True, allow_routed_experts_capture=False, **settings
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows: int = ROWS) -> Tensor:
    return 2 * torch.randn(rows, EXPERTS, generator=seeded(rows))


def select(topk_config: Any, rows: int = ROWS, **more: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights as SGLang's function in its `topk` file gives them."""
    output = topk.select_experts(
        hidden_states=torch.empty(rows, 1), router_logits=logits(rows), topk_config=topk_config,
        layer_id=0, **more,
    )  # fmt: skip
    return output.topk_ids.long(), output.topk_weights.float()


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """Each row's weight of every expert, whatever the order of slots."""
    return torch.zeros(ids.shape[0], EXPERTS).scatter_add(1, ids, weights)


@pytest.fixture
def patched() -> Iterator[Any]:
    """Puts a rule to work in SGLang's file, and takes it away again."""
    stock, bind = topk.select_experts, topk.TopK.bind_runner_backend
    load, bypass = runner.ModelRunner.load_model, getattr(topk, sglang_patch.BYPASS)

    def patch(rule: Rule, up_to: int | None = None) -> SglangPlan:
        model = Fingerprint("Model", 1, 1, EXPERTS, TOP_K)
        planned = SglangPlan(Plan.banded(model, (Band(up_to, (rule,)),)), "plan.json")
        planned.shape = SimpleNamespace(moe_layers=(0,))  # type: ignore[assignment]
        sglang_patch.patch(planned, topk, runner.ModelRunner)
        return planned

    yield patch
    topk.select_experts, topk.TopK.bind_runner_backend = stock, bind
    runner.ModelRunner.load_model = load
    setattr(topk, sglang_patch.BYPASS, bypass)


def test_the_version_is_the_one_named() -> None:
    assert metadata.version("sglang") == TESTED


@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_read_of_a_router_is_how_sglang_routes(name: str) -> None:
    settings = config(name)
    ids, weights = select(settings)
    wanted = route(logits(), read_router(settings), TOP_K, Rule(), settings.correction_bias)
    assert sorted_rows(ids) == sorted_rows(wanted.ids_BTK)
    torch.testing.assert_close(dense(ids, weights), dense(wanted.ids_BTK, wanted.weights_BTK))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_rule_routes_as_the_reference_does(name: str, rule: str, patched: Any) -> None:
    settings = config(name)
    router: Router = read_router(settings)
    patched(RULES[rule])
    ids, weights = select(settings)
    wanted = route(logits(), router, TOP_K, RULES[rule], settings.correction_bias)
    wanted_ids = repeat_best(wanted.ids_BTK, EXPERTS)
    torch.testing.assert_close(
        dense(ids, weights), dense(wanted_ids, wanted.weights_BTK), atol=1e-6, rtol=1e-5
    )
    active = set(ids[weights != 0].tolist())
    assert active == set(wanted.ids_BTK[wanted.ids_BTK < EXPERTS].tolist())
    assert int(ids.min()) >= 0
    assert int(ids.max()) < EXPERTS


def test_rows_beyond_the_last_band_are_sglangs_own(patched: Any) -> None:
    stock = select(config("softmax"))
    patched(Rule(guaranteed=1), up_to=ROWS - 1)
    for ours, wanted in zip(select(config("softmax")), stock, strict=True):
        assert torch.equal(ours, wanted)


def test_padding_asks_for_no_expert(patched: Any) -> None:
    patched(Rule(guaranteed=1))
    ids, weights = select(config("softmax"), num_token_non_padded=torch.tensor(5))
    wanted = route(logits()[:5], Router(normalise=True), TOP_K, Rule(guaranteed=1))
    torch.testing.assert_close(
        dense(ids[:5], weights[:5]),
        dense(repeat_best(wanted.ids_BTK, EXPERTS), wanted.weights_BTK),
    )


@pytest.fixture
def counting() -> Iterator[None]:
    """SGLang counts real rows, until the test ends."""
    stock = padding.make_count()
    yield
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(padding.NAME) is padding.always_counts:
            setattr(module, padding.NAME, stock)


def counted_rows() -> Tensor | None:
    """What a batch of five tokens says of its real rows."""
    batch = SimpleNamespace(input_ids=torch.arange(5), global_num_token_non_padded=None)
    with context.get_parallel().override(moe_ep_size=1):
        batches.ForwardBatch._init_num_token_non_padded(batch, device="cpu", is_draft_worker=False)
    counted: Tensor | None = batch.global_num_token_non_padded
    return counted


def test_on_one_gpu_sglang_does_not_count_real_rows_of_itself() -> None:
    assert counted_rows() is None


@pytest.mark.usefixtures("counting")
def test_real_rows_are_counted_under_a_plan_that_needs_them() -> None:
    counted = counted_rows()
    assert counted is not None
    assert int(counted) == 5
    for name in ("base_runner", "decode_cuda_graph_runner", "prefill_cuda_graph_runner"):
        asks = import_module(f"sglang.srt.model_executor.runner.{name}")
        assert asks.enable_num_token_non_padded()
    padding.check_counts()


@pytest.mark.parametrize("real", [9, 10, 11])
def test_real_rows_pick_the_band_of_a_captured_step(patched: Any, real: int) -> None:
    planned = patched(Rule(top_k=1), up_to=10)
    planned.captured_sizes = (8, ROWS)
    ids, weights = select(config("softmax"), num_token_non_padded=torch.tensor([real]))
    used = (weights[:real] != 0).sum(dim=1)
    assert used.tolist() == [1 if real <= 10 else TOP_K] * real
    assert ids[real:].unique().tolist() == [-1]


def test_skipped_slots_are_minus_one_where_experts_pass_over_them(patched: Any) -> None:
    planned = patched(Rule(guaranteed=1))
    planned.skipped_id = -1
    ids, weights = select(config("softmax"), rows=3)
    assert (ids == -1).any()
    assert not weights[ids == -1].any()
    wanted = route(logits(3), Router(normalise=True), TOP_K, Rule(guaranteed=1))
    assert sorted_rows(ids) == sorted_rows(wanted.ids_BTK.where(wanted.ids_BTK < EXPERTS, -1))


def test_scaling_is_sglangs(patched: Any) -> None:
    scaled = replace(
        config("softmax"), routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=True
    )
    patched(Rule(guaranteed=1))
    ids, weights = select(scaled)
    plain_ids, plain = select(config("softmax"))
    torch.testing.assert_close(dense(ids, weights), 2.5 * dense(plain_ids, plain))


def test_a_kernel_of_a_models_own_does_not_pass_the_hook_by(
    patched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_is_cuda", True)
    assert topk.precomputed_topk_postprocess_is_noop(config("softmax"))
    patched(Rule(guaranteed=1))
    assert not topk.precomputed_topk_postprocess_is_noop(config("softmax"))


def test_simulated_routing_is_refused(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SIMULATE_UNIFORM_EXPERTS", "1")
    with pytest.raises(LeanMoeError, match="unset SGLANG_SIMULATE_UNIFORM_EXPERTS"):
        patched(Rule(guaranteed=1))


def sorted_rows(ids: Tensor) -> list[list[int]]:
    return [sorted(row) for row in ids.tolist()]
