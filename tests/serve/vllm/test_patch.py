"""The plugin behind two methods of vLLM, with stand-ins for its classes."""

from __future__ import annotations

import copy
import logging
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm import patch
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.padding import RUNNERS
from leanmoe.serve.vllm.patch import VllmPlugin, is_draft, process_plugin
from leanmoe.serve.vllm.planned_model import PlannedModel
from tests.serve.stand_ins import (
    MODEL_CONFIG,
    VllmConfig,
    built_layer,
    install_stages,
)

MODEL = read_shape(MODEL_CONFIG).fingerprint()
PLAN = Plan.banded(MODEL, (Band(6, (Rule(guaranteed=2),) * 2),))
OPTIONS = PluginOptions("plan.json")
FUSED = "vllm.model_executor.layers.fused_moe"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's classes and functions that the plugin is put behind; `build` loads a model."""
    install_stages(monkeypatch)
    state = SimpleNamespace(asked=[], layers=0)

    class FusedMoERouter:
        @property
        def supports_monolithic_kernels(self) -> bool:
            return True

    class MoERunner:
        def __init__(self, index: int) -> None:
            state.asked.append(FusedMoERouter().supports_monolithic_kernels)
            vars(self).update(vars(built_layer(index)))

    class BaseModelLoader:
        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> list[Any]:
            del vllm_config, model_config, prefix
            return [MoERunner(layer) for layer in range(state.layers)]

    class OtherLoader(BaseModelLoader):
        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> list[Any]:
            return super().load_model(vllm_config, model_config, prefix)

    engine = SimpleNamespace(config=VllmConfig(), asked=state.asked, runner=MoERunner)

    def build(layers: int = 2, config: Any = None, model: Any = None) -> list[Any]:
        state.layers, config = layers, config or engine.config
        model = model or config.model_config
        return OtherLoader().load_model(vllm_config=config, model_config=model)

    engine.build = build
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.32.0"},
        f"{FUSED}.router.fused_moe_router": {"FusedMoERouter": FusedMoERouter},
        f"{FUSED}.runner.moe_runner": {"MoERunner": MoERunner},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parts = name.split(".")
        for end in range(2, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    return engine


def test_models_built_after_the_start_are_under_the_plan(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    with caplog.at_level(logging.INFO, logger="vllm.leanmoe"):
        layers = engine.build()
    assert all(isinstance(each.router._compute_routing, VllmLayerRouting) for each in layers)
    assert plugin.model is not None
    assert sorted(plugin.model.layers) == [0, 1]
    assert "plan plan.json at work, 2 of 2 MoE layers under it" in caplog.text
    assert "leanmoe" in engine.config.additional_config, "vLLM's compile cache is told"


def test_a_plan_holds_until_another_or_none_is_given(engine: Any) -> None:
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    first = engine.build()
    plugin.start(Plan.uniform(MODEL, Rule(top_k=2)), OPTIONS)
    assert plugin.model is None
    engine.config = VllmConfig()
    second = engine.build()
    assert first[0].router._compute_routing.rules[0] == Rule(guaranteed=2)
    assert second[0].router._compute_routing.rules[0] == Rule(top_k=2)
    plugin.stop()
    assert "_compute_routing" not in vars(engine.build()[0].router)


def drafting(target: VllmConfig) -> tuple[Any, Any]:
    """The config under which V1 builds a draft, a copy of the target's, and the draft's model."""
    own = VllmConfig().model_config
    target.speculative_config = SimpleNamespace(
        draft_model_config=own, target_model_config=target.model_config
    )
    return copy.copy(target), own


def test_a_drafts_layers_run_as_trained(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """V1 gives a copy of the target's config, V2 the target's own; numbers of layers overlap."""
    config, own = drafting(engine.config)
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    engine.build()
    target = plugin.model
    with caplog.at_level(logging.INFO, logger="vllm.leanmoe"):
        for given in (config, engine.config):
            (layer,) = engine.build(1, given, own)
            assert "_compute_routing" not in vars(layer.router)
    assert caplog.text.count("a draft of 1 MoE layers runs as trained") == 2
    assert plugin.model is target
    engine.build(0, config, own)


def test_a_draft_without_a_model_is_no_draft(engine: Any) -> None:
    """N-grams: vLLM names the target's model config as the draft's."""
    own = engine.config.model_config
    engine.config.speculative_config = SimpleNamespace(
        draft_model_config=own, target_model_config=own
    )
    assert not is_draft(engine.config, own)
    VllmPlugin().start(PLAN, OPTIONS)
    assert "_compute_routing" in vars(engine.build()[0].router)


def test_vllm_is_asked_for_kernels_that_do_not_choose(engine: Any) -> None:
    config, own = drafting(engine.config)
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    engine.build()
    engine.build(2, config, own)
    plugin.start(Plan(MODEL), OPTIONS)
    engine.build()
    plugin.stop()
    engine.build()
    assert engine.asked == [False, False, *[True] * 6]


def test_layers_outside_of_a_known_loader_are_refused(engine: Any) -> None:
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    with pytest.raises(LeanMoeError, match=r"0\.32\.0 builds model.layers.0.* --load-format"):
        engine.runner(0)
    plugin.stop()
    engine.runner(0)


def test_a_model_with_other_layers_or_none_is_refused(engine: Any) -> None:
    VllmPlugin().start(PLAN, OPTIONS)
    for layers in (0, 1):
        wanted = re.escape(f"vLLM built {list(range(layers))}")
        with pytest.raises(LeanMoeError, match=rf"^vLLM 0\.32\.0: .*{wanted}"):
            engine.build(layers)
    engine.build()


def test_a_vllm_of_another_form_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del engine
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.19.1")
    with pytest.raises(LeanMoeError, match=r"vLLM is 0\.19\.1"):
        VllmPlugin().start(PLAN, OPTIONS)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.99.0")
    monkeypatch.setattr(patch, "files_of_vllm", lambda: lambda _: None)
    with pytest.raises(LeanMoeError, match=r"vLLM 0\.99\.0 was never run with leanmoe"):
        VllmPlugin().start(PLAN, OPTIONS)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.32.0+cpu")
    monkeypatch.setitem(sys.modules, f"{FUSED}.runner.moe_runner", None)
    with pytest.raises(LeanMoeError, match=r"has no .*moe_runner, where a plan is put"):
        VllmPlugin().start(PLAN, OPTIONS)


def test_bands_between_captured_sizes_are_warned_of(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.config.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8])
    VllmPlugin().start(PLAN, OPTIONS)
    engine.build()
    assert "bands end at 6, which are no capture sizes" in caplog.text


def test_a_process_has_one_plugin() -> None:
    assert process_plugin() is process_plugin()


def test_kernels_are_compiled_once_the_model_ran_its_first_step(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr(PlannedModel, "warm_up", lambda model: warmed.append(model))
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    for number in range(2):
        engine.config = VllmConfig()
        engine.build()
        sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner().profile_run()
        assert len(warmed) == number + 1
        assert warmed[-1] is plugin.model
    plugin.stop()
    sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner().profile_run()
    assert len(warmed) == 2


@pytest.mark.parametrize("v2", [False, True])
def test_the_runner_at_work_fills_rule_rows_where_the_plan_has_prompt_rules(
    engine: Any, monkeypatch: pytest.MonkeyPatch, v2: bool
) -> None:
    asked: list[str] = []
    followed: list[Any] = []
    follow = ("follow_v1", "follow_v2")[v2]
    monkeypatch.setattr(patch, follow, lambda runner, current: followed.append((runner, current)))
    monkeypatch.setattr(patch, "files_of_vllm", lambda: None)
    monkeypatch.setattr(patch, "check_rows", lambda number, _: asked.append(number))
    engine.config.use_v2_model_runner = v2
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    engine.build()
    assert not asked
    assert not followed
    for _ in range(2):
        plugin.start(PLAN.with_level(prompt=(Rule(top_k=0),) * MODEL.moe_layers), OPTIONS)
        engine.build()
    ((runner, current),) = followed
    assert runner is sys.modules[RUNNERS[v2]].GPUModelRunner
    assert plugin.model is not None
    assert current() is plugin.model.rule_rows is not None
    assert asked == ["0.32.0"] * 2
    plugin.stop()
    assert current() is None
