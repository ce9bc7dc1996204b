"""Replies that branch: what one pass scores is what a service would compute reply by reply."""

from __future__ import annotations

import pytest
import torch

from leanmoe import Plan, Rule, apply
from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime import partial_attention_reason, shape_of
from leanmoe.scoring.forward import final_hidden
from leanmoe.scoring.windows import Windows
from tests.runtime.families import build

LENGTH, PROMPT, REPLY = 24, 10, 5


def windows(rows: int = 4) -> Windows:
    ids = torch.randint(3, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    return Windows.of_ids(ids).after_prompt(PROMPT, REPLY)


def one_by_one(model: object, plan: Plan, row: torch.Tensor) -> list[torch.Tensor]:
    """Each reply in a pass of its own: its prompt, then its tokens under the decode rules."""
    found = []
    for start in range(PROMPT, LENGTH, REPLY):
        end = min(start + REPLY, LENGTH)
        with apply(model, plan, prompt_tokens=start, decode_batch=1), torch.inference_mode():
            done = model.base_model(input_ids=row[None, :end], use_cache=False)  # type: ignore[attr-defined]
        found += list(done[0][0, start:end])
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "olmoe"])
def test_one_pass_scores_every_reply_as_if_alone(family: str) -> None:
    model = build(family)
    fingerprint = shape_of(model).fingerprint()
    layers = fingerprint.moe_layers
    plan = Plan(
        fingerprint,
        Plan.uniform(fingerprint, Rule(top_k=3, keep_weights=True)).bands,
        (Rule(top_k=1),) * layers,
    )
    scored = windows()
    batch = scored.batches()[0]
    with apply(model, plan, prompt_tokens=batch.prompt_in_call, decode_batch=1):
        whole = final_hidden(model, batch)
    assert whole.shape[:2] == batch.ids_SN.shape
    for number, row in enumerate(batch.ids_SN):
        alone = one_by_one(model, plan, row)
        torch.testing.assert_close(whole[number, PROMPT:], torch.stack(alone))


def test_an_empty_plan_gives_the_models_own_predictions() -> None:
    model = build("deepseek_v3")
    scored = windows()
    batch = scored.batches()[0]
    plain = Windows.of_ids(scored.ids_SN).after_prompt(PROMPT).batches()[0]
    branched, whole = final_hidden(model, batch), final_hidden(model, plain)
    torch.testing.assert_close(branched[:, PROMPT:], whole[:, PROMPT:])
    assert torch.equal(batch.predicted, plain.predicted)


def test_replies_need_full_windows_and_full_attention() -> None:
    padded = Windows(
        torch.zeros(2, 20, dtype=torch.int64), torch.tensor([20, 9]), torch.arange(2), ("a", "b")
    )
    with pytest.raises(LeanMoeError, match="padded"):
        padded.after_prompt(4, 2)
    assert partial_attention_reason(build("deepseek_v3").config) is None
    assert "sliding" in (partial_attention_reason(build("gpt_oss").config) or "")
