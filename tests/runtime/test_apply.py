"""A plan in each family: nothing set changes nothing, and what is skipped does no work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from leanmoe import Plan, Rule, apply
from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.work import count_work
from leanmoe.models.families import FAMILIES
from leanmoe.plan.placement import Placement
from leanmoe.routing import route
from leanmoe.runtime import find_layers, has_kernel, record, shape_of
from leanmoe.runtime.model import decoder_layers
from tests import tiny
from tests.runtime.families import CONFIGS, TOP_K_KEY, build

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
RULES = (
    Rule(threshold=0.6),
    Rule(top_p=0.6),
    Rule(guaranteed=1),
    Rule(budget=3),
    Rule(experts=(0, 1, 2, 3, 4, 6)),
    Rule(top_k=3, threshold=0.4, guaranteed=2),
)


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model(**({"input_ids": ids()} | inputs)).logits
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_an_empty_plan_is_the_model_itself(family: str) -> None:
    model = build(family)
    stock = logits(model)
    with apply(model, Plan(shape_of(model).fingerprint()), count=True) as applied:
        assert torch.equal(logits(model), stock)
    assert applied.generated[0].slots_per_token == shape_of(model).top_k


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_uniform_top_k_is_the_model_with_that_k(family: str, implementation: str) -> None:
    model = build(family)
    fewer = build(family, **{TOP_K_KEY.get(family, "num_experts_per_tok"): 2})
    fewer.load_state_dict(model.state_dict())
    for each in (model, fewer):
        each.set_experts_implementation(implementation)
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=2))
    with apply(model, plan):
        torch.testing.assert_close(logits(model), logits(fewer), rtol=0, atol=0)
    assert not torch.allclose(logits(model), logits(fewer))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe", "minimax_m2"])
def test_every_implementation_computes_the_same(family: str, rule: Rule) -> None:
    model = build(family)
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    found = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with apply(model, plan):
            found.append(logits(model))
    with apply(model, plan, experts="leanmoe"):
        found.append(logits(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], logits(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_skipped_slots_do_no_work(family: str) -> None:
    model = build(family)
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(threshold=0.7))
    with apply(model, plan, experts="leanmoe", count=True) as applied, count_work() as work:
        logits(model)
    slots = sum(layer.slots for layer in applied.generated)
    full = sum(layer.tokens for layer in applied.generated) * shape_of(model).top_k
    assert work.rows == slots < full


ROTARY = ("glm4v_moe_text", "mimo_v2_flash", "mistral4")
"""Their rotary parts want larger heads than tests/tiny.py has: tests/models runs them by layer."""
EVERY = sorted(
    name
    for name, family in FAMILIES.items()
    if name in CONFIG_MAPPING and family.not_runnable is None and name not in ROTARY
)
"""Every other family of the table that this Transformers has and a plan can run on."""
TOP_K_NAMES = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


@torch.inference_mode()
def outputs(model: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a language part that has no head."""
    output = model(input_ids=ids(), use_cache=False)
    found: torch.Tensor = output["logits" if "logits" in output else "last_hidden_state"]
    return found


@pytest.mark.parametrize("family", EVERY)
def test_an_empty_plan_is_the_model_itself_in_every_family(family: str) -> None:
    model = tiny.build(family)
    shape = shape_of(model)
    stock = outputs(model)
    with apply(model, Plan(shape.fingerprint()), count=True) as applied:
        assert torch.equal(outputs(model), stock)
    assert len(applied.generated) == len(shape.moe_layers)
    slots = applied.generated[-1].slots_per_token
    assert slots == shape.top_k or (shape.router.zero_experts and slots < shape.top_k)


@pytest.mark.parametrize("family", EVERY)
def test_uniform_top_k_is_the_model_with_that_k_in_every_family(family: str) -> None:
    model = tiny.build(family)
    shape = shape_of(model)
    names: dict[str, Any] = {name: 2 for name in TOP_K_NAMES if name in tiny.settings(family)}
    fewer = tiny.build(family, **names)
    for index in shape.hash_layers:  # what no plan changes keeps its experts
        stock: Any = decoder_layers(model)[index]
        changed: Any = decoder_layers(fewer)[index]
        changed.mlp.gate = stock.mlp.gate
    fewer.load_state_dict(model.state_dict())
    full = outputs(model)
    with apply(model, Plan.uniform(shape.fingerprint(), Rule(top_k=2))):
        torch.testing.assert_close(outputs(model), outputs(fewer), rtol=0, atol=0)
    assert not torch.allclose(outputs(fewer), full)


@pytest.mark.parametrize("experts", ["stock", "leanmoe"])
@pytest.mark.parametrize("family", EVERY)
def test_batch_aware_rules_are_those_of_the_reference_in_every_family(
    family: str, experts: str
) -> None:
    """What each layer does with its router's own logits, beside `routing.route` of these."""
    model = tiny.build(family)
    shape = shape_of(model)
    layers = find_layers(model)
    if experts == "leanmoe" and not all(layer.has_kernel for layer in layers):
        pytest.skip("its experts are Transformers' alone")
    rule = Rule(guaranteed=2, budget=9)
    seen: dict[int, torch.Tensor] = {}
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(number: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        chosen[number] = ids_TK.clone(), weights_TK.clone()

    plan = Plan.uniform(shape.fingerprint(), rule)
    with apply(model, plan, observe=observe), record(model, seen.__setitem__):
        outputs(model)
    assert len(seen) == len(chosen) == len(layers)
    for layer in layers:
        bias_E = layer.ranking_bias(shape.router)
        logits_TE = seen[layer.number].to(torch.float32)
        wanted = route(logits_TE, shape.router, shape.top_k, rule, bias_E)
        weights_TK = wanted.weights_BTK
        if (scale_E := layer.expert_scale(shape.router)) is not None:
            weights_TK = weights_TK * scale_E[wanted.ids_BTK.clamp(max=shape.experts - 1)]
        assert torch.equal(chosen[layer.number][0], wanted.ids_BTK)
        torch.testing.assert_close(chosen[layer.number][1], weights_TK)


def test_a_plan_is_undone_after_an_exception() -> None:
    model = build("deepseek_v3")
    stock = logits(model)
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=1))
    with pytest.raises(RuntimeError, match="boom"), apply(model, plan, experts="leanmoe"):
        raise RuntimeError("boom")
    assert torch.equal(logits(model), stock)
    assert all("forward" not in vars(layer.experts) for layer in find_layers(model))


def test_a_budget_per_rank_wants_to_know_the_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """On one rank it is a budget; on several it is the reference's, which is said."""
    model = build("qwen3_moe")
    shape = shape_of(model)
    plan = Plan.uniform(shape.fingerprint(), Rule(budget_per_rank=2))
    with apply(model, Plan.uniform(shape.fingerprint(), Rule(budget=2))):
        one = logits(model)
    with apply(model, plan):
        assert torch.equal(logits(model), one)
    placement = Placement.linear(shape.experts, 2)
    with apply(model, plan, placement=placement):
        two = logits(model)
    assert not torch.equal(two, one)
    assert "routed by the reference" not in caplog.text
    with apply(model, plan, experts="leanmoe", placement=placement):
        torch.testing.assert_close(logits(model), two, rtol=1e-4, atol=1e-5)
    assert "budget_per_rank are routed by the reference" in caplog.text
    with (
        pytest.raises(LeanMoeError, match=r"placement is of 6 experts: the model has"),
        apply(model, plan, placement=Placement.linear(6, 2)),
    ):
        pass


def test_a_second_plan_is_refused() -> None:
    model = build("qwen3_moe")
    plan = Plan(shape_of(model).fingerprint())
    with (
        apply(model, plan),
        pytest.raises(LeanMoeError, match="applied to this model already"),
        apply(model, plan),
    ):
        pass


def test_a_plan_for_another_model_is_refused() -> None:
    plan = Plan(shape_of(build("qwen3_moe")).fingerprint())
    with (
        pytest.raises(LeanMoeError, match="architecture is Qwen3Moe"),
        apply(build("mixtral"), plan),
    ):
        pass


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_padding_changes_nothing_and_activates_no_expert(rule: Rule) -> None:
    model = build("deepseek_v3")
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    real = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), real], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, plan, count=True) as applied:
        bare = logits(model, input_ids=real)
        alone = [layer.slots for layer in applied.generated]
        inside = logits(model, input_ids=padded, attention_mask=mask, position_ids=place)
    torch.testing.assert_close(inside[:, 4:], bare, rtol=1e-4, atol=1e-5)
    assert [layer.slots for layer in applied.generated] == [2 * slots for slots in alone]


@pytest.mark.parametrize("rule", [Rule(guaranteed=1), Rule(budget=3)], ids=str)
def test_decode_batch_is_decoding_step_by_step(rule: Rule) -> None:
    model = build("qwen3_moe")
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    tokens = ids(4, 5)
    with apply(model, plan, decode_batch=2):
        scored = logits(model, input_ids=tokens)
    for start in (0, 2):
        cache = None
        with apply(model, plan), torch.inference_mode():
            for place in range(5):
                out = model(
                    tokens[start : start + 2, place : place + 1],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                torch.testing.assert_close(
                    out.logits[:, 0], scored[start : start + 2, place], rtol=1e-4, atol=1e-5
                )


def test_prompt_rules_spare_the_tokens_that_are_read() -> None:
    model = build("deepseek_v3")
    fingerprint = shape_of(model).fingerprint()
    last_only = (Rule(), Rule(top_k=0))
    plan = Plan.banded(fingerprint, prompt=last_only)
    with apply(model, plan, count=True) as applied:
        kept = logits(model, logits_to_keep=1)
        everything = logits(model)
    stock = logits(model)
    # The last layer's experts at a prompt token feed nothing that is ever read.
    torch.testing.assert_close(kept, stock[:, -1:], rtol=1e-5, atol=1e-6)
    assert torch.equal(everything, stock)
    assert applied.prompt[1].slots == 0
    assert applied.prompt[1].tokens == 3 * 6


@pytest.mark.parametrize("implementation", ["stock", "leanmoe"])
def test_what_is_observed_is_what_the_step_ran(implementation: str) -> None:
    model = build("deepseek_v3")
    plan = Plan.banded(shape_of(model).fingerprint(), prompt=(Rule(guaranteed=1), Rule(top_k=2)))
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        seen[layer] = (ids_TK, weights_TK)

    with apply(model, plan, experts=implementation, count=True, observe=observe) as applied:
        logits(model, logits_to_keep=1)
    for layer in (0, 1):
        used_TK = seen[layer][1] != 0
        assert len(used_TK) == ids().numel()
        counted = (applied.generated[layer], applied.prompt[layer])
        assert int(used_TK.sum()) == sum(count.slots for count in counted)


def test_generate_under_a_plan_is_greedy_decoding_of_the_planned_model() -> None:
    model = build("deepseek_v3")
    fewer = build("deepseek_v3", num_experts_per_tok=2)
    fewer.load_state_dict(model.state_dict())
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=2))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with apply(model, plan):
        planned = model.generate(ids(2, 6), **settings)
    assert torch.equal(planned, fewer.generate(ids(2, 6), **settings))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
GPU_FAMILIES = ("deepseek_v3", "qwen3_moe", "olmoe", "mixtral", "gpt_oss")
GPU_RULES = (Rule(), Rule(top_k=2, renormalise=0.0), Rule(guaranteed=1), Rule(budget=3))


@needs_gpu
@pytest.mark.parametrize("rule", GPU_RULES, ids=str)
@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_our_kernels_give_what_the_stock_experts_give(family: str, rule: Rule) -> None:
    model = build(family).cuda()
    plan = Plan.uniform(shape_of(model).fingerprint(), rule)
    inputs = ids(3, 9).cuda()
    with apply(model, plan):
        wanted = logits(model, input_ids=inputs)
    with apply(model, plan, experts="leanmoe") as applied:
        found = logits(model, input_ids=inputs)
    assert has_kernel(model)
    assert applied.implementation == "leanmoe gpu"
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4)


@needs_gpu
def test_a_reply_in_bfloat16_is_the_same_each_time() -> None:
    """Prompt, cache and decoding steps of one token, greedy."""
    model = build("qwen3_moe").to(torch.bfloat16).cuda()
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(guaranteed=2))
    with apply(model, plan, experts="leanmoe"):
        prompts = ids(2, 6).cuda()
        replies = [model.generate(prompts, max_new_tokens=8, do_sample=False) for _ in range(2)]
    assert replies[0].shape == (2, 14)
    assert torch.equal(*replies)
