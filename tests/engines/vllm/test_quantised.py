"""A plan on a checkpoint with int8 experts, in vLLM itself.

vLLM 0.32 has kernels for such experts on a CPU with AMX only (on x86). Elsewhere plain torch stands
in for the kernel; loading, the choice of a kernel, routing and the plugin are what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.plugin_options import is_plain
from tests.engines.vllm.quantised import EXPERTS, LAYERS, TOP_K, stand_in, write_checkpoint

PROMPTS = [[5, 6, 7, 8 + number, 30 * number + 9] for number in range(4)]
REPLY = 12
BFLOAT16 = 2**-8
"""Its rounding, of a weight of at most 1."""
RULES = (Rule(guaranteed=1, renormalise=0.0), Rule(budget=6), Rule(top_k=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantised") / "int8")


@pytest.fixture
def replies(
    load: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[int]]]:
    """Loads the checkpoint under a plan, or as it is, and gives its greedy replies."""
    from vllm import SamplingParams
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    if not torch.cpu._is_amx_tile_supported():
        for name, method in stand_in().items():
            monkeypatch.setattr(CPUExpertsInt8, name, method)

    def reply(plan: Plan | None = None, **settings: Any) -> list[list[int]]:
        llm = load(
            plan, model=str(checkpoint), dtype="bfloat16", skip_tokenizer_init=True,
            compilation_config={}, **settings,
        )  # fmt: skip
        parameters = SamplingParams(
            temperature=0, max_tokens=REPLY, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        found = llm.generate(prompts, parameters, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return reply


def by_expert(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weights (T,E), whatever order slots have; an id of E is nobody's."""
    spread = torch.zeros(ids_TK.shape[0], EXPERTS + 1)
    return spread.scatter_add(1, ids_TK.long(), weights_TK.float())[:, :EXPERTS]


def test_an_empty_plan_changes_no_token_and_a_uniform_one_is_the_override(
    replies: Callable[..., list[list[int]]], checkpoint: Path
) -> None:
    model = read_shape(str(checkpoint)).fingerprint()
    assert (model.moe_layers, model.experts, model.top_k) == (LAYERS, EXPERTS, TOP_K)
    stock = replies()
    assert replies(Plan(model)) == stock
    fewer = replies(Plan.uniform(model, Rule(top_k=2)))
    assert fewer == replies(hf_overrides={"num_experts_per_tok": 2})
    assert fewer != stock


def test_each_layer_of_int8_experts_routes_as_the_reference(
    replies: Callable[..., list[list[int]]],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
    from leanmoe.serve.vllm.patch import process_plugin

    seen: list[tuple[VllmLayerRouting, Tensor, Tensor, Tensor]] = []
    stock = VllmLayerRouting.__call__

    def watched(
        self: VllmLayerRouting, hidden: Tensor, logits: Tensor, *more: Any, **named: Any
    ) -> Any:
        weights, ids = stock(self, hidden, logits, *more, **named)
        seen.append((self, logits.clone(), ids.clone(), weights.clone()))
        return weights, ids

    monkeypatch.setattr(VllmLayerRouting, "__call__", watched)
    replies(Plan.per_layer(read_shape(str(checkpoint)).fingerprint(), RULES))
    model = process_plugin().model
    assert model is not None
    assert f"{LAYERS} of {LAYERS} MoE layers under it" in model.describe()
    assert "experts by CPUExpertsInt8" in model.describe()
    assert len([layer for layer, *_ in seen if layer.layer == 0]) >= REPLY
    skipped = 0
    for layer, logits_TE, ids_TK, weights_TK in seen:
        wanted_ids, wanted, _ = route(logits_TE.float(), layer.router, TOP_K, RULES[layer.layer])
        near = BFLOAT16 if is_plain(RULES[layer.layer]) else 1e-5  # vLLM's own routing, or ours
        torch.testing.assert_close(
            by_expert(ids_TK, weights_TK), by_expert(wanted_ids, wanted), atol=near, rtol=near,
            msg=partial("layer {}: {}".format, layer.layer),
        )  # fmt: skip
        assert bool((ids_TK < EXPERTS).all()), "an id that vLLM's kernel has no expert for"
        skipped += int((weights_TK == 0).sum())
    assert skipped > 0, "no rule skipped a slot"
