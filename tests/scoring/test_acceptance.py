"""Acceptance against the overlap of the two models' whole distributions."""

from __future__ import annotations

import pytest
import torch

from leanmoe.plan import Plan, Rule
from leanmoe.runtime import apply, shape_of
from leanmoe.scoring.acceptance import Acceptance
from leanmoe.scoring.windows import Windows
from tests.runtime.families import build


def test_acceptance_is_the_overlap_of_the_distributions() -> None:
    model = build("deepseek_v3")
    ids_SN = torch.randint(1, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    against = Acceptance(model, Windows.of_ids(ids_SN))
    plan = Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=1))
    with torch.inference_mode():
        full = model(ids_SN).logits[:, :-1].double().softmax(-1)
        with apply(model, plan):
            less = model(ids_SN).logits[:, :-1].double().softmax(-1)
            found = against.of(model)
    assert found == pytest.approx(float(torch.minimum(full, less).sum(-1).mean()), abs=1e-5)
    assert found < 0.9999
    assert against.of(model) == pytest.approx(1.0, abs=1e-6)
