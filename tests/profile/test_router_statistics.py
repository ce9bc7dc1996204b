"""What a layer's router chose, against counts made by hand and by the model's own router."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.models.families import Router
from leanmoe.profile.record import (
    BINS,
    LayerStatistics,
)
from leanmoe.profile.saved import QUANTILES
from leanmoe.runtime import find_layers, record, shape_of
from tests.runtime.families import CONFIGS, build

SIGMOID = Router("sigmoid")


def gates(*rows: list[float]) -> torch.Tensor:
    """Logits whose sigmoids are these gates."""
    return torch.tensor(rows).logit()


def test_counts_made_by_hand() -> None:
    counts = LayerStatistics(SIGMOID, experts=4, top_k=2, bias_E=None)
    counts.add(gates([0.6, 0.2, 0.1, 0.05], [0.1, 0.3, 0.2, 0.5]))
    counts.add(gates([0.8, 0.4, 0.1, 0.3]))
    found = counts.result()
    assert found.tokens == 3
    assert found.use_E.tolist() == [2, 3, 0, 1]
    np.testing.assert_allclose(found.gate_E, [0.7, 0.3, 0.0, 0.5], rtol=1e-6)
    assert found.together_EE.tolist() == [[2, 2, 0, 0], [2, 3, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    best = [0.6 / 0.8, 0.5 / 0.8, 0.8 / 1.2]
    np.testing.assert_allclose(found.mass_K, [sum(best) / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        found.mass_quantiles_QK[:, 0], np.sort(best)[[0, 0, 1, 2, 2]], atol=2 / BINS
    )


def test_the_bias_ranks_but_does_not_weigh() -> None:
    counts = LayerStatistics(SIGMOID, 3, 2, torch.tensor([0.0, 0.0, 0.7]))
    counts.add(gates([0.6, 0.2, 0.1]))
    found = counts.result()
    assert found.use_E.tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.gate_E, [0.6, 0.0, 0.1], rtol=1e-5)
    # Expert 2 is ranked first: keeping the best one keeps a seventh of the mass.
    np.testing.assert_allclose(found.mass_K, [1 / 7, 1.0], rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 60),
    cut=st.integers(0, 60),
    scoring=st.sampled_from(["sigmoid", "softmax", "softmax_after_top_k"]),
    seed=st.integers(0, 99),
)
def test_chunks_add_up_to_the_whole(tokens: int, cut: int, scoring: Any, seed: int) -> None:
    logits_TE = torch.randn((tokens, 16), generator=torch.Generator().manual_seed(seed))
    router = Router(scoring, groups=4, groups_used=2)
    whole, parts = (LayerStatistics(router, 16, 4, None) for _ in range(2))
    whole.add(logits_TE)
    for part in (logits_TE[:cut], logits_TE[cut:]):
        parts.add(part)
    one, two = whole.result(), parts.result()
    assert one.use_E.sum() == tokens * 4
    assert (one.together_EE == two.together_EE).all()
    assert (np.diag(one.together_EE) == one.use_E).all()
    np.testing.assert_allclose(one.gate_E, two.gate_E)
    np.testing.assert_allclose(one.mass_K, two.mass_K)
    np.testing.assert_allclose(one.mass_K[-1], 1.0)
    assert (np.diff(one.mass_K) >= 0).all()
    assert (one.mass_quantiles_QK == two.mass_quantiles_QK).all()
    assert (np.diff(one.mass_quantiles_QK, axis=0) >= 0).all()


def test_quantiles_are_those_of_the_tokens() -> None:
    logits_TE = torch.randn((5000, 8), generator=torch.Generator().manual_seed(0))
    counts = LayerStatistics(SIGMOID, 8, 3, None)
    counts.add(logits_TE)
    best_TK = logits_TE.sigmoid().topk(3).values.double()
    share_TK = best_TK.cumsum(-1) / best_TK.sum(-1, keepdim=True)
    wanted_QK = torch.quantile(share_TK, torch.tensor(QUANTILES, dtype=torch.float64), dim=0)
    np.testing.assert_allclose(counts.result().mass_quantiles_QK, wanted_QK, atol=2 / BINS)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_experts_are_those_the_model_itself_uses(family: str) -> None:
    model = build(family)
    shape, (layer, *_) = shape_of(model), find_layers(model)
    counts = LayerStatistics(
        shape.router, shape.experts, shape.top_k, layer.ranking_bias(shape.router)
    )
    used: list[torch.Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: used.append(inputs[1]))

    def sink(number: int, logits_TE: torch.Tensor) -> None:
        if number == layer.number:
            counts.add(logits_TE)

    ids_SN = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    with record(model, sink), torch.inference_mode():
        model(ids_SN)
    wanted = torch.bincount(used[0].flatten(), minlength=shape.experts)
    assert counts.result().use_E.tolist() == wanted.tolist()
