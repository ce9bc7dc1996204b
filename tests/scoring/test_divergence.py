"""Losses and divergences per document, against those of the models' own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Plan, Rule
from leanmoe.runtime import apply, partial_attention_reason, shape_of
from leanmoe.scoring.divergence import (
    CachedPrompts,
    Head,
    divergence,
    final_hidden,
    losses,
    reference,
)
from leanmoe.scoring.windows import Windows
from tests.runtime.families import CONFIGS, build

LENGTH = 24


def some_windows(rows: int = 6, vocabulary: int = 64) -> Windows:
    """Two windows a document, of different lengths."""
    draw = torch.Generator().manual_seed(3)
    ids_SN = torch.randint(1, vocabulary, (rows, LENGTH), generator=draw)
    lengths_S = torch.tensor([LENGTH, LENGTH, 17, LENGTH, 20, 9][:rows])
    documents_S = torch.arange(rows) // 2
    names = tuple(f"document {n}" for n in range(rows // 2))
    return Windows(ids_SN, lengths_S, documents_S, names)


def uniform(model: Any, rule: Rule) -> Plan:
    return Plan.uniform(shape_of(model).fingerprint(), rule)


@torch.inference_mode()
def by_hand(model: Any, windows: Windows) -> list[torch.Tensor]:
    """Each window's log-probabilities [its length, V], one window at a time, without padding."""
    rows = zip(windows.ids_SN, windows.lengths_S.tolist(), strict=True)
    return [model(ids[None, :length]).logits[0].double().log_softmax(-1) for ids, length in rows]


def sums_by_hand(
    windows: Windows, full: list[torch.Tensor], plan: list[torch.Tensor]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    kl_U, loss_U = np.zeros(windows.documents), np.zeros(windows.documents)
    for row, (p, q) in enumerate(zip(full, plan, strict=True)):
        document, targets = int(windows.documents_S[row]), windows.ids_SN[row, 1 : len(p)]
        kl_U[document] += float((p.exp() * (p - q))[:-1].sum())
        loss_U[document] -= float(q[:-1].gather(1, targets[:, None]).sum())
    return kl_U, loss_U


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_divergence_is_that_of_the_models_own_logits(family: str) -> None:
    changes = {"logits_scaling": 6.0} if family == "granitemoe" else {}
    model, windows = build(family, **changes), some_windows()
    against = reference(model, windows)
    full = by_hand(model, windows)
    with apply(model, uniform(model, Rule(top_k=2))):
        found = divergence(model, against)
        kl_U, loss_U = sums_by_hand(windows, full, by_hand(model, windows))
    np.testing.assert_allclose(found.kl_U, kl_U, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.plan.loss_U, loss_U, rtol=1e-5)
    np.testing.assert_allclose(found.full.loss_U, sums_by_hand(windows, full, full)[1], rtol=1e-5)
    assert found.plan.tokens_U.tolist() == [46, 39, 27]
    assert found.plan.names == windows.names
    with apply(model, uniform(model, Rule(top_k=2))):
        likeliest = [log.argmax(-1)[:-1] for log in by_hand(model, windows)]
    changed = [
        int((now != p.argmax(-1)[:-1]).sum()) for now, p in zip(likeliest, full, strict=True)
    ]
    assert found.flips_U.tolist() == [changed[n] + changed[n + 1] for n in (0, 2, 4)]


def test_the_full_model_does_not_diverge_from_itself() -> None:
    model, windows = build("deepseek_v3"), some_windows()
    found = divergence(model, reference(model, windows))
    assert found.kl_U.tolist() == [0.0, 0.0, 0.0]
    assert found.loss_difference == 0.0
    np.testing.assert_array_equal(found.full.loss_U, losses(model, windows).loss_U)


def test_padding_neither_counts_nor_votes() -> None:
    model = build("deepseek_v3")
    windows = some_windows()
    other = windows.ids_SN.clone()
    other[~windows.mask] = 63
    changed = Windows(other, windows.lengths_S, windows.documents_S, windows.names)
    with apply(model, uniform(model, Rule(guaranteed=1)), decode_batch=3):
        one = losses(model, windows, decode_batch=3)
        two = losses(model, changed, decode_batch=3)
    np.testing.assert_allclose(one.loss_U, two.loss_U, rtol=1e-6)


def test_company_of_the_decode_batch_matters_and_size_of_the_call_does_not() -> None:
    model, windows = build("deepseek_v3"), some_windows()
    plan = uniform(model, Rule(guaranteed=1))

    def measured(decode_batch: int, batch_tokens: int) -> float:
        with apply(model, plan, decode_batch=decode_batch):
            return losses(model, windows, "", decode_batch, batch_tokens).mean

    alone, of_three, of_six = (measured(b, 1000) for b in (1, 3, 6))
    assert len({round(loss, 6) for loss in (alone, of_three, of_six)}) == 3
    assert measured(3, 3 * LENGTH) == pytest.approx(of_three, rel=1e-6)
    with apply(model, uniform(model, Rule(top_k=1))):
        assert losses(model, windows).mean == pytest.approx(alone, rel=1e-6)


def test_scoring_reads_every_prediction_so_no_token_is_a_prompt() -> None:
    model, windows = build("deepseek_v3"), some_windows()
    fingerprint = shape_of(model).fingerprint()
    prompt = Plan.banded(fingerprint, prompt=(Rule(top_k=1),) * fingerprint.moe_layers)
    full = losses(model, windows)
    with apply(model, prompt):
        np.testing.assert_allclose(losses(model, windows).loss_U, full.loss_U, rtol=1e-6)
    after = windows.after_prompt(8)
    with apply(model, prompt, prompt_tokens=8):
        found = losses(model, after)
    assert found.tokens_U.tolist() == [30, 23, 11]
    assert found.mean != pytest.approx(losses(model, after).mean, rel=1e-6)


def test_nan_is_traced_to_its_document() -> None:
    model, windows = build("qwen3_moe"), some_windows()
    against = reference(model, windows)
    row = int(windows.batches()[0].rows_S[1])
    expected = windows.names[int(windows.documents_S[row])]

    def poison(_module: Any, _inputs: Any, output: Any) -> None:
        output[0][1] = float("nan")  # the second window of the batch

    model.base_model.register_forward_hook(poison)
    for measure in (lambda: divergence(model, against), lambda: losses(model, windows)):
        with pytest.raises(LeanMoeError, match=f"not finite numbers in document '{expected}'"):
            measure()


def test_nan_in_the_head_is_said_to_be_there() -> None:
    model, windows = build("qwen3_moe"), some_windows()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(LeanMoeError, match="output matrix of Qwen3MoeForCausalLM holds NaN"):
        losses(model, windows)


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = build("qwen3_moe")
    plain = type(model).forward

    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **settings: Any) -> Any:
            done = plain(self, *inputs, **settings)
            done.logits = done.logits.tanh() * 0.1
            return done

    model.__class__ = Capped
    with pytest.raises(LeanMoeError, match="is not linear"):
        Head.of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_short_floats_pass_the_check(dtype: torch.dtype) -> None:
    model = build("deepseek_v3").to(dtype)
    assert Head.of(model).scale == 1.0


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = build("deepseek_v3"), some_windows()
    whole = reference(model, windows)
    monkeypatch.setattr("leanmoe.scoring.divergence.SLICE_BYTES", 4 * 64 * 5)
    sliced = reference(model, windows)
    torch.testing.assert_close(whole.expected_SND, sliced.expected_SND)
    torch.testing.assert_close(whole.loss_SN, sliced.loss_SN, rtol=1e-6, atol=1e-6)


PROMPT, REPLY = 10, 5


def reply_windows(rows: int = 4) -> Windows:
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
    plan = Plan.banded(
        fingerprint,
        Plan.uniform(fingerprint, Rule(top_k=3, renormalise=0.0)).bands,
        (Rule(top_k=1),) * layers,
    )
    scored = reply_windows()
    batch = scored.batches()[0]
    with apply(model, plan, prompt_tokens=batch.prompt_in_call, decode_batch=1):
        whole = final_hidden(model, batch)
    assert whole.shape[:2] == batch.ids_SN.shape
    for number, row in enumerate(batch.ids_SN):
        alone = one_by_one(model, plan, row)
        torch.testing.assert_close(whole[number, PROMPT:], torch.stack(alone))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_replies_run_on_cached_prompts_as_they_do_beside_them(family: str) -> None:
    model = build(family)
    if reason := partial_attention_reason(model.config):
        pytest.skip(f"its replies never share a row: {reason}")
    fingerprint, (batch,) = shape_of(model).fingerprint(), reply_windows().batches(decode_batch=2)
    nothing = (Rule(),) * fingerprint.moe_layers
    rules = (Rule(guaranteed=1, renormalise=0.0),) * fingerprint.moe_layers
    plan = Plan.banded(fingerprint, (Band(None, rules),), nothing)
    prompts = CachedPrompts.of(model, batch)
    for _ in range(2):  # a cache can be used again
        with apply(model, plan, decode_batch=2, prompt_tokens=0, count=True) as alone:
            found = prompts.final_hidden(model)
    with apply(
        model, plan, decode_batch=2, prompt_tokens=batch.prompt_in_call, count=True
    ) as beside:
        whole = final_hidden(model, batch)
    torch.testing.assert_close(found[:, PROMPT:], whole[:, PROMPT:])
    assert not torch.equal(whole[:, PROMPT:], final_hidden(model, batch)[:, PROMPT:])
    assert alone.generated == beside.generated


def test_an_empty_plan_gives_the_models_own_predictions() -> None:
    model = build("deepseek_v3")
    scored = reply_windows()
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
