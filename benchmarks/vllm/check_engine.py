"""What one engine of `vllm.check` does: greedy replies, and NaN in the weights of skipped experts.

Letters: T tokens (rows of a step), E experts, K slots of a token, D hidden width.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

ROWS = (1, 2, 5, 8, 16, 17, 64, 256, 1024, 4096)
"""Rows of the steps that are computed with NaN in skipped experts."""
NAN_OF_FP8 = 0x7F
"""The bits of NaN in float8_e4m3fn."""


def run(folder: Path) -> None:
    """Does what `folder`/told.json says, in a process of its own; writes found.json beside it."""
    told = json.loads((folder / "told.json").read_text())
    from vllm import LLM

    if told["is_blind"]:
        ignore_padding()
    llm = LLM(**told["settings"])
    found: dict[str, Any] = {
        "tokens": {
            str(count): [
                greedy(llm, count, told["tokens"], seed) for seed in range(told["batches"])
            ]
            for count in told["replies"]
        },
        "workers": llm.collective_rpc("leanmoe_statistics"),
    }
    if told["tries_nan"]:
        found["nan"] = nan_in_skipped_experts(told["rows"])
    (folder / "found.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def greedy(llm: Any, count: int, tokens: int, seed: int) -> list[list[int]]:
    """The replies to `count` prompts of different lengths, all asked at the same time."""
    from vllm import SamplingParams

    random = Random(1000 * count + seed)
    prompts = [
        {"prompt_token_ids": [random.randrange(2048) for _ in range(5 + 3 * number)]}
        for number in range(count)
    ]
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    replies = llm.generate(prompts, wanted, use_tqdm=False)
    return [list(reply.outputs[0].token_ids) for reply in replies]


def ignore_padding() -> None:
    """Has padding rows vote: a control, whose replies must differ from those of exact steps."""
    from importlib import import_module

    layer_routing: Any = import_module("leanmoe.serve.vllm.layer_routing")
    stock = layer_routing.route_ids

    def route_ids(*arguments: Any, **others: Any) -> Any:
        return stock(*arguments[:5], None, *arguments[6:], **others)

    layer_routing.route_ids = route_ids


def nan_in_skipped_experts(rows: list[int]) -> list[dict[str, Any]]:
    """What every planned layer computes for steps of so many rows, NaN in what is skipped."""
    from leanmoe.serve.vllm.patch import process_plugin

    model = process_plugin().model
    assert model is not None
    return [
        {"layer": layer, "rows": count} | of_layer(model.runners[layer], routing, count)
        for layer, routing in sorted(model.layers.items())
        for count in rows
    ]


def of_layer(runner: Any, routing: Any, rows: int) -> dict[str, Any]:
    """One layer's step of `rows` rows: whether NaN in experts that no row uses changes any bit.

    The workspace is NaN, too: the step before it computes with NaN in all experts. "apart" is the
    largest difference to the same step with the token's best expert in skipped slots, weight 0,
    over the largest value.
    """
    import torch

    layer = runner.routed_experts
    method = layer.quant_method
    where = layer.w13_weight.device
    generator = torch.Generator(device=where).manual_seed(rows)
    hidden_TD = torch.randn(
        rows, width_of(layer), generator=generator, device=where, dtype=torch.bfloat16
    )
    logits_TE = torch.randn(
        rows, routing.plan.model.experts, generator=generator, device=where, dtype=torch.bfloat16
    )
    with torch.inference_mode():
        make_values(layer)
        weights_TK, ids_TK = runner.router.select_experts(
            hidden_states=hidden_TD,
            router_logits=logits_TE,
            topk_indices_dtype=method.topk_indices_dtype,
            input_ids=None,
        )

        def compute(ids: Any) -> Any:
            return method.apply(layer, hidden_TD, weights_TK, ids, None, None).clone()

        is_skipped_TK = (ids_TK < 0) | (ids_TK >= routing.plan.model.experts)
        wanted_TD = compute(ids_TK)
        repeated_TD = compute(torch.where(is_skipped_TK, ids_TK[:, :1], ids_TK))
        tensors = tensors_of(layer)
        kept = [tensor.clone() for tensor in tensors]
        used_E = torch.unique(ids_TK[~is_skipped_TK]).long()
        for tensor in tensors:
            fill_nan(tensor)
        compute(ids_TK)
        for tensor, whole in zip(tensors, kept, strict=True):
            bits(tensor)[used_E] = bits(whole)[used_E]
        found_TD = compute(ids_TK)
        for tensor, whole in zip(tensors, kept, strict=True):
            bits(tensor).copy_(bits(whole))
    apart = (wanted_TD - repeated_TD).abs().max() / repeated_TD.abs().max()
    return {
        "experts_unused": int(routing.plan.model.experts - len(used_E)),
        "slots_skipped": round(float(is_skipped_TK.float().mean()), 4),
        "is_finite": bool(torch.isfinite(wanted_TD).all()),
        "is_same": bool(torch.equal(found_TD, wanted_TD)),
        "apart": float(apart),
    }


def width_of(layer: Any) -> int:
    """The hidden width D, of weights (E, 2M, D)."""
    return int(layer.w13_weight.shape[2])


def tensors_of(layer: Any) -> list[Any]:
    """The weights (E, ...) of a layer's experts and, where they are quantised, their scales."""
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    found = [layer.w13_weight.data, layer.w2_weight.data, config.w1_scale, config.w2_scale]
    return [tensor for tensor in found if tensor is not None]


def make_values(layer: Any) -> None:
    """Draws weights of fp8: dummy ones are so small that they are 0."""
    import torch

    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    if config.w1_scale is None:
        return
    generator = torch.Generator(device=layer.w13_weight.device).manual_seed(0)
    for weight in (layer.w13_weight.data, layer.w2_weight.data):
        drawn = torch.randn(weight.shape, generator=generator, device=weight.device)
        bits(weight).copy_(bits(drawn.to(weight.dtype)))
    for scale in (config.w1_scale, config.w2_scale):
        scale.fill_(0.02)


def bits(tensor: Any) -> Any:
    """A tensor of fp8 as bytes, which can be indexed and filled; any other as it is."""
    import torch

    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


def fill_nan(tensor: Any) -> None:
    """Makes every value NaN."""
    import torch

    bits(tensor).fill_(NAN_OF_FP8 if tensor.dtype is torch.float8_e4m3fn else float("nan"))
