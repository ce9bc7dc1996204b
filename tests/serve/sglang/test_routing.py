"""One call under several bands, of which the device chooses; tests/conformance has single rules."""

from __future__ import annotations

import pytest
import torch

from leanmoe.kernels.dispatch import route_ids
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.serve.sglang.routing import BandRule, banded_config
from tests.serve.sglang.test_patch import TopKConfig, logits

BANDS = [BandRule(2, Rule(top_k=1)), BandRule(5, Rule(guaranteed=1)), BandRule(None, Rule(top_k=3))]


@pytest.mark.parametrize("skipped_id", [None, -1])
@pytest.mark.parametrize(("real", "band"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (8, 2)])
def test_real_rows_choose_the_band_of_a_captured_step(
    real: int, band: int, skipped_id: int | None
) -> None:
    real_1 = torch.tensor([real], dtype=torch.int32)
    config = banded_config(TopKConfig(), BANDS, 4, real_1, skipped_id)
    assert config.top_k == 4
    weights, ids = config.custom_routing_function(None, logits(8), 4, True)
    rule, padding = BANDS[band].rule, torch.arange(8) >= real
    wanted = route_ids(
        logits(8), Router(normalise=True), 4, rule, None, padding, skipped_id=skipped_id
    )
    slots = wanted[0].shape[1]
    assert torch.equal(ids[:, :slots], wanted[0])
    assert torch.equal(weights[:, :slots], wanted[1])
    assert not weights[:, slots:].any()
    added = ids[:, slots:]
    assert torch.equal(added, ids[:, :1].expand_as(added) if skipped_id is None else added * 0 - 1)
