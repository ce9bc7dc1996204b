"""A profile measured on a tiny model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.profile.record import profile, replay
from leanmoe.routing import route
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.scoring.windows import Windows
from tests.runtime.families import build


def some_windows(documents: int = 6, length: int = 20, each: int = 2) -> Windows:
    draw = torch.Generator().manual_seed(1)
    rows = documents * each
    lengths_S = torch.full((rows,), length)
    lengths_S[1] = 7
    return Windows(
        torch.randint(3, 64, (rows, length), generator=draw),
        lengths_S,
        torch.arange(rows) // each,
        tuple(f"d{n}" for n in range(documents)),
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_every_token_is_counted_once_whatever_the_batches(family: str) -> None:
    model, windows = build(family), some_windows()
    one = profile(model, windows, trace_tokens=60, batch_tokens=20)
    two = profile(model, windows, trace_tokens=60, batch_tokens=1000)
    top_k = shape_of(model).top_k
    assert one.model == shape_of(model).fingerprint()
    assert (one.tokens, one.documents) == (windows.tokens, 6)
    for first, second in zip(one.layers, two.layers, strict=True):
        assert first.use_E.sum() == windows.tokens * top_k
        assert np.abs(first.use_E - second.use_E).sum() <= 4  # rounding may turn a near tie
        np.testing.assert_allclose(first.mass_K, second.mass_K, rtol=1e-3)
    np.testing.assert_allclose(one.trace.logits_LTE, two.trace.logits_LTE, atol=0.02)


def test_the_sample_holds_the_logits_of_its_tokens() -> None:
    model, windows = build("deepseek_v3"), some_windows()
    made = profile(model, windows, trace_tokens=30, batch_tokens=40)
    trace = made.trace
    assert trace.tokens == 30
    assert Counter(trace.document_T.tolist()) == dict.fromkeys(range(6), 5)
    assert trace.position_T.min() >= 1
    assert (np.diff(trace.document_T) >= 0).all()

    caught: dict[int, torch.Tensor] = {}
    with record(model, caught.__setitem__), torch.inference_mode():
        model(windows.ids_SN)
    for layer in find_layers(model):
        logits_NLE = caught[layer.number].view(*windows.ids_SN.shape, -1)
        for place in range(trace.tokens):
            document, position = int(trace.document_T[place]), int(trace.position_T[place])
            rows = (windows.documents_S == document).nonzero().flatten()
            off = [
                (
                    logits_NLE[row, position]
                    - torch.from_numpy(trace.logits_LTE)[layer.number, place]
                )
                for row in rows
            ]
            assert min(float(difference.abs().max()) for difference in off) < 0.01


def test_replay_of_the_sample_is_what_the_model_activates() -> None:
    model, windows = build("deepseek_v3"), some_windows(each=1)
    made = profile(model, windows, trace_tokens=10_000)
    assert made.trace.tokens == windows.tokens - len(windows.lengths_S)
    caught: dict[int, torch.Tensor] = {}
    with record(model, caught.__setitem__), torch.inference_mode():
        model(windows.ids_SN)
    shape, layer = shape_of(model), find_layers(model)[1]
    rule = Rule(threshold=0.8)
    routing = route(
        caught[layer.number].view(*windows.ids_SN.shape, -1)[windows.mask],
        shape.router,
        shape.top_k,
        rule,
        layer.ranking_bias(shape.router),
    )
    slots = float((routing.ids_BTK < shape.experts).double().sum(-1).mean())
    assert 1.2 < slots < shape.top_k - 0.2
    assert replay(made, layer.number, rule, 6, steps=2000).slots == pytest.approx(slots, rel=0.05)


def test_nan_is_named() -> None:
    model = build("deepseek_v3")
    layer = find_layers(model)[1]
    with torch.no_grad():
        layer.router.weight[0, 0] = float("nan")
    with pytest.raises(LeanMoeError, match=r"router logits are not finite"):
        profile(model, some_windows())
