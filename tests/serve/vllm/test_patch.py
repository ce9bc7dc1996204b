"""The plugin behind two methods of vLLM, with stand-ins for its classes."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.patch import VllmPlugin, process_plugin
from tests.serve.stand_ins import (
    MODEL_CONFIG,
    BaseRouter,
    VllmConfig,
    built_layer,
    install_stages,
)

MODEL = read_shape(MODEL_CONFIG).fingerprint()
PLAN = Plan(MODEL, (Band(6, (Rule(guaranteed=2),) * 2),))
OPTIONS = PluginOptions("plan.json")
FUSED = "vllm.model_executor.layers.fused_moe"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's classes and functions that the plugin is put behind; `build` loads a model."""
    install_stages(monkeypatch)

    class MoERunner:
        def __init__(self, index: int) -> None:
            vars(self).update(vars(built_layer(index)))

    class BaseModelLoader:
        def load_model(self, layers: int) -> list[Any]:
            return [MoERunner(layer) for layer in range(layers)]

    class OtherLoader(BaseModelLoader):
        def load_model(self, layers: int) -> list[Any]:
            return super().load_model(layers)

    engine = SimpleNamespace(config=VllmConfig(), router=type("Router", (BaseRouter,), {}))
    engine.build = lambda layers=2: OtherLoader().load_model(layers)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.32.0"},
        f"{FUSED}.router.base_router": {"BaseRouter": engine.router},
        f"{FUSED}.runner.moe_runner": {"MoERunner": MoERunner},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
        "vllm.config": {"get_current_vllm_config": lambda: engine.config},
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


def test_a_drafts_layers_run_as_trained(engine: Any) -> None:
    plugin = VllmPlugin()
    plugin.start(PLAN, OPTIONS)
    engine.build()
    main, draft = engine.config, VllmConfig()
    draft.speculative_config = SimpleNamespace(draft_model_config=draft.model_config)
    engine.config = draft
    assert "_compute_routing" not in vars(engine.build()[0].router)
    assert plugin.model is not None
    assert plugin.model.config() is main


def test_a_model_with_other_layers_or_none_is_refused(engine: Any) -> None:
    VllmPlugin().start(PLAN, OPTIONS)
    with pytest.raises(LeanMoeError, match="without MoE layers of its MoERunner"):
        engine.build(0)
    with pytest.raises(LeanMoeError, match=r"vLLM built \[0\]"):
        engine.build(1)


def test_a_vllm_of_another_form_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.19.1")
    with pytest.raises(LeanMoeError, match=r"vLLM is 0\.19\.1"):
        VllmPlugin().start(PLAN, OPTIONS)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.99.0")
    monkeypatch.setattr(engine.router, "_compute_routing", lambda _self: None)
    with pytest.raises(LeanMoeError, match=r"vLLM 0\.99\.0 calls its routers in another way"):
        VllmPlugin().start(PLAN, OPTIONS)
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
