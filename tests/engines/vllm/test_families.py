"""A tiny model of each family in vLLM under a plan, beside the same in Transformers.

One request at a time: then a step has the same tokens in both, and so have batch-aware rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leanmoe import Plan, Rule, apply
from leanmoe.models.shape import read_shape
from tests.engines.vllm.families import RUN, SIZES

PROMPT = (5, 9, 33, 12, 7, 41, 60, 3, 18, 22)
TOKENS = 12
RULE = Rule(top_k=3, guaranteed=1)
WIDE = ("gate.", "router.", "e_score", "moe_statics")


def build(family: str, folder: Path) -> Any:
    """The model, saved to `folder`, with weights wide enough that no two tokens are near."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[family]
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    settings = {name: value for name, value in SIZES.items() if name in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(settings | dict(RUN[family])))).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(mark in name for mark in WIDE):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.5
        elif tensor.dim() > 1:
            tensor.data = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
    model.save_pretrained(folder)
    return model


def in_transformers(model: Any, plan: Plan) -> list[int]:
    with apply(model, plan):
        reply = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
    found: list[int] = reply[0, len(PROMPT) :].tolist()
    return found


def in_vllm(llm: Any) -> list[int]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    (reply,) = llm.generate([{"prompt_token_ids": list(PROMPT)}], settings, use_tqdm=False)
    return list(reply.outputs[0].token_ids)


@pytest.mark.parametrize("family", RUN)
def test_a_plan_gives_the_tokens_that_it_gives_in_transformers(
    family: str, load: Any, tmp_path: Path
) -> None:
    model = build(family, tmp_path)
    fingerprint = read_shape(str(tmp_path)).fingerprint()
    here = {"model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 64}
    empty, ruled = Plan(fingerprint), Plan.uniform(fingerprint, RULE)
    assert in_vllm(load(empty, **here)) == in_transformers(model, empty)
    tokens = in_vllm(load(ruled, **here))
    assert tokens == in_transformers(model, ruled)
    assert tokens != in_transformers(model, empty)
