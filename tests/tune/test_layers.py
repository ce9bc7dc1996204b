"""Which rules are tried in a layer, what a divergence is worth, and how long a layer takes."""

from __future__ import annotations

import pytest

from leanmoe.core.schema import from_json, to_json
from leanmoe.plan import Rule
from leanmoe.results.tune import Sensitivity
from leanmoe.tune.layers import (
    LEAST_RATE,
    LayerTime,
    candidates,
    loss_rates,
)
from tests.tune.example import MODEL, anew, setting


def test_rates_put_divergence_in_nats_of_loss() -> None:
    found = setting(6.0).sensitivities
    rates = loss_rates(found)
    assert rates["decode", 2] == pytest.approx(0.5)
    free = [Sensitivity("decode", 0, Rule(top_k=4), 1, 0.1, -0.2, 4, 4)]
    assert loss_rates(free)["decode", 0] == LEAST_RATE


def test_batch_aware_rules_are_tried_for_every_concurrency_and_others_once() -> None:
    tried = candidates(MODEL, (1, 8, 32), anew)
    assert len(set(tried)) == len(tried)
    shared = [c for c in tried if c.rule.is_batch_aware]
    assert {c.decode_batch for c in shared} == {8, 32}
    assert {c.decode_batch for c in tried if c not in shared} == {1}
    for candidate in tried:
        candidate.plan(MODEL).check(MODEL)


def test_what_is_stored_is_read_as_it_was() -> None:
    for measured in setting(6.0, 8).sensitivities:
        assert from_json(Sensitivity, to_json(measured), "sensitivity") == measured
    line = LayerTime(1e-5, 1e-6, 1e-7, 2e-6, 0.01)
    assert from_json(LayerTime, to_json(line), "line") == line
    assert line.seconds(10, 4, has_rule=True) == pytest.approx(1e-5 + 4e-6 + 1e-6 + 2e-6)
