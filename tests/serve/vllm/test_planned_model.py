"""A model under the plan, with stand-ins for what vLLM builds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.router import _allowed, _rank_of
from leanmoe.kernels.triton.state import _in_use
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.serve.plugin_options import LEANMOE, VLLM, PluginOptions
from leanmoe.serve.vllm import planned_model
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.planned_model import PlannedModel, decoder_index
from leanmoe.serve.vllm.small_steps import Skipped, Skipping
from tests.serve.stand_ins import MODEL_CONFIG, VllmConfig, built_layer, install_stages
from tests.serve.vllm_operators import (
    align_of_0_24,
    install_operators,
    sum_of_0_24,
    triton_runner,
)

MODEL = read_shape(MODEL_CONFIG).fingerprint()
SHARED = Plan.uniform(MODEL, Rule(guaranteed=2))


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stages(monkeypatch)


def planned(plan: Plan, config: VllmConfig, **options: Any) -> PlannedModel:
    return PlannedModel(plan, config, PluginOptions("plan.json", **options))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("language_model.model.layers.12.block_sparse_moe.experts", 12),
        ("transformer.blocks.7.ffn.experts", 7),
    ],
)
def test_the_decoder_layer_is_in_a_layers_name(name: str, index: int) -> None:
    assert decoder_index(name) == index


def test_a_name_without_a_number_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="no layer number"):
        decoder_index("experts")


def test_a_plan_of_another_model_is_refused() -> None:
    config = VllmConfig({**MODEL_CONFIG, "num_experts": 8})
    with pytest.raises(LeanMoeError, match="its experts is 16, this model's is 8"):
        planned(SHARED, config)


def test_layers_of_the_plan_are_routed_by_it_and_others_are_not() -> None:
    config = VllmConfig()
    model = planned(SHARED, config)
    runner, other = built_layer(0), built_layer(7)
    model.adopt(runner)
    model.adopt(other)
    assert isinstance(runner.router._compute_routing, VllmLayerRouting)
    assert "_compute_routing" not in vars(other.router)
    assert sorted(model.layers) == sorted(model.runners) == [0]


def test_a_full_model_is_left_alone_unless_its_steps_are_asked_for() -> None:
    config = VllmConfig()
    for stats in (False, True):
        model, runner = planned(Plan(MODEL), config, collect_stats=stats), built_layer(0)
        model.adopt(runner)
        assert ("_compute_routing" in vars(runner.router)) == stats
        assert (model.statistics is not None) == stats


def test_what_cannot_be_adopted_is_refused() -> None:
    config = VllmConfig()
    model, runner = planned(SHARED, config), built_layer(0)
    model.adopt(runner)
    with pytest.raises(LeanMoeError, match="vLLM built two MoE layers 0"):
        model.adopt(built_layer(0))
    shared = built_layer(1)
    shared.router = runner.router
    with pytest.raises(LeanMoeError, match="its router is another layer's too"):
        model.adopt(shared)


def test_every_step_has_the_models_slots_where_experts_are_returned() -> None:
    """Its place in vLLM's config changed with 0.31."""
    for place in ("model_config", "aux_output_config"):
        config = VllmConfig()
        runner = built_layer(0)
        setting = getattr(config, place, None) or SimpleNamespace()
        setting.enable_return_routed_experts = True
        setattr(config, place, setting)
        model = planned(SHARED, config)
        model.adopt(runner)
        assert not model.layers[0].may_skip, place


def test_a_model_is_whole_before_it_runs() -> None:
    config = VllmConfig()
    model = planned(SHARED, config)
    model.adopt(built_layer(0))
    with pytest.raises(LeanMoeError, match=r"MoE layers \[0, 1\], vLLM built \[0\]"):
        model.check()
    model.adopt(built_layer(1))
    model.check()
    model.settle()
    assert all(layer.skipping == Skipping() for layer in model.layers.values())
    said = model.describe()
    assert "2 of 2 MoE layers under it" in said
    assert "experts by OtherExperts" in said
    assert "a skipped slot is the token's best expert again" in said


def test_leanmoes_kernels_are_refused_where_they_cannot_compute() -> None:
    config = VllmConfig()
    model = planned(SHARED, config, experts=LEANMOE)
    for layer in range(2):
        model.adopt(built_layer(layer))
    with pytest.raises(LeanMoeError, match="LEANMOE_EXPERTS=leanmoe cannot compute it"):
        model.check()


def settled(monkeypatch: pytest.MonkeyPatch, plan: Plan = SHARED, **options: Any) -> PlannedModel:
    """A model of Triton experts under a plan, loaded."""
    monkeypatch.setattr(planned_model, "kernels_for", lambda _: SimpleNamespace(reason="tuned"))
    config, loaded = VllmConfig(), triton_runner(experts=16)
    model = planned(plan, config, **options)
    for layer in range(2):
        runner = built_layer(layer)
        parallel, runner.moe_config = runner.moe_config, loaded.moe_config
        vars(runner.moe_config).update(vars(parallel), moe_parallel_config=parallel)
        model.adopt(runner)
        runner.routed_experts = triton_runner(experts=16).routed_experts
    model.settle()
    return model


def experts_of(model: PlannedModel) -> set[str]:
    """What stands in the place of the layers' experts."""
    kernels = [r.routed_experts.quant_method.moe_kernel for r in model.runners.values()]
    return {type(kernel.fused_experts.apply).__name__ for kernel in kernels}


def test_operators_that_pass_over_skipped_slots_do_so_at_all_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_operators(monkeypatch)
    model = settled(monkeypatch)
    wanted = Skipping.at_all_sizes(Skipped.MINUS_ONE, groups=True)
    assert all(routing.skipping == wanted for routing in model.layers.values())
    assert experts_of(model) == {"LayerSteps"}
    assert all(routing.experts_in_place() for routing in model.layers.values())
    assert "a skipped slot is id -1" in model.describe()


def test_a_plan_that_skips_nothing_leaves_the_experts_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_operators(monkeypatch)
    assert experts_of(settled(monkeypatch, Plan.uniform(MODEL, Rule(top_k=2)))) == {"method"}


@pytest.mark.parametrize(
    ("experts", "reason", "how", "stands"),
    [
        (None, None, Skipping.at_all_sizes(Skipped.BEYOND), "LeanmoeExperts"),
        (None, "no", Skipping(small=Skipped.MINUS_ONE, groups=True), "LayerSteps"),
        (VLLM, None, Skipping(small=Skipped.MINUS_ONE, groups=True), "LayerSteps"),
    ],
)
def test_where_vllm_would_compute_the_rows_leanmoes_kernels_do_not(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    experts: str | None,
    reason: str | None,
    how: Skipping,
    stands: str,
) -> None:
    install_operators(monkeypatch, align_of_0_24, sum_of_0_24)
    monkeypatch.setattr(planned_model, "kernels_unsupported_reason", lambda _: reason)
    caplog.set_level("INFO", "vllm.leanmoe")
    model = settled(monkeypatch, experts=experts)
    assert all(routing.skipping == how for routing in model.layers.values())
    assert experts_of(model) == {stands}
    assert all(routing.experts_in_place() for routing in model.layers.values())
    assert "moe_sum adds up all slots" in caplog.text
    assert ("experts by leanmoe, tuned" in model.describe()) == (stands == "LeanmoeExperts")


def test_bands_that_end_between_captured_sizes_are_named() -> None:
    config = VllmConfig()
    config.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8, 16])

    def between(*ends: int) -> str | None:
        plan = Plan.banded(MODEL, tuple(Band(end, (Rule(top_k=2),) * 2) for end in ends))
        return planned(plan, config).uncaptured_bands()

    assert between(4, 16) is None
    assert between(100) is None  # steps so large are not padded
    assert "6, 12" in str(between(4, 6, 12))


def test_experts_of_steps_that_vllm_captures_not_are_launched_before_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[int] = []
    name = "leanmoe.serve.vllm.planned_model.warm_up"
    monkeypatch.setattr(name, lambda _layer, rows, _slots: launched.append(rows))
    config = VllmConfig()
    config.scheduler_config.max_num_batched_tokens = 3000
    config.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[1, 2, 512])
    model = planned(SHARED, config)
    layers = [built_layer(0), built_layer(1)]
    for layer in layers:
        layer.routed_experts.w13_weight = torch.empty(16, 32, 8)
    model._computed.extend(layers)
    model.warm_up()
    assert launched == [1024, 2048, 3000], "once, since the layers are alike"
    launched.clear()
    config.compilation_config = None
    model.warm_up()
    assert launched == [*(1 << power for power in range(12)), 3000]


def test_loading_puts_nothing_of_leanmoes_on_the_device() -> None:
    """vLLM loads a model in memory that sleep mode of level 2 lets go of, and does not restore."""
    config = VllmConfig()
    model = planned(Plan.uniform(MODEL, Rule(experts=(1, 2, 3, 4, 5), budget=5)), config)
    kept = [cached.cache_info().currsize for cached in (_allowed, _rank_of)], len(_in_use)
    for layer in range(2):
        model.adopt(built_layer(layer))
    model.check()
    model.settle()
    model.describe()
    for routing in model.layers.values():
        routing.warm_up()  # no step was run, so there is nothing to compile for
    now = [cached.cache_info().currsize for cached in (_allowed, _rank_of)], len(_in_use)
    assert now == kept


def test_statistics_know_whose_rule_each_row_is_under() -> None:
    """Not where ranks have shares of a step's rows."""
    prompted = SHARED.with_level(prompt=(Rule(top_k=0),) * 2)
    for is_divided in (False, True):
        model, runner = planned(prompted, VllmConfig(), collect_stats=True), built_layer(0)
        runner.moe_config.is_sequence_parallel = is_divided
        runner.moe_config.tp_rank, runner.moe_config.tp_size = 0, 2
        model.adopt(runner)
        assert model.statistics is not None
        assert model.rule_rows is not None
        found = model.statistics.rule_rows
        assert found == (None if is_divided else model.rule_rows.rows)
    plain = planned(SHARED, VllmConfig(), collect_stats=True)
    plain.adopt(built_layer(0))
    assert plain.statistics is not None
    assert plain.statistics.rule_rows is None
