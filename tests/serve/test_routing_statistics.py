"""What the last step ran, read from the ids and weights that its routing wrote."""

from __future__ import annotations

import pytest
import torch

from leanmoe.serve.routing_statistics import RoutingStatistics

IDS = torch.tensor([[0, 5], [5, 5], [2, 0]])
WEIGHTS = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.5, 0.5]])


def test_nothing_ran_before_the_first_step() -> None:
    report = RoutingStatistics(2, 8).read()
    assert report.layers == (None, None)
    assert report.to_json() == {"rows": 0, "is_captured": False, "layers": [None, None]}


def test_a_slot_of_weight_0_and_padding_are_not_counted() -> None:
    statistics = RoutingStatistics(2, 8)
    statistics.note(1, IDS, WEIGHTS, torch.tensor([False, False, True]))
    report = statistics.read().to_json()
    assert (report["rows"], report["is_captured"]) == (3, False)
    assert report["layers"][0] is None, "another process runs it"
    assert report["layers"][1] == {"tokens": 2, "distinct": 2, "activated": 1.5}


def test_the_last_step_of_a_layer_stands_for_it() -> None:
    statistics = RoutingStatistics(1, 8)
    statistics.note(0, IDS, WEIGHTS, None)
    statistics.note(0, torch.tensor([[8, 7]]), torch.tensor([[0.0, 1.0]]), None)
    (counts,) = statistics.read().layers
    assert counts is not None
    assert counts.distinct_per_step == 1
    assert counts.slots_per_token == pytest.approx(1)


def test_a_row_that_uses_no_expert_is_no_token() -> None:
    statistics = RoutingStatistics(1, 8)
    statistics.note(0, IDS, torch.zeros(3, 2), None)
    assert statistics.read().to_json()["layers"] == [{"tokens": 0, "distinct": 0, "activated": 0.0}]


def test_tokens_are_counted_by_the_rule_that_they_are_under() -> None:
    """Row 2 is one of prompts that may use no expert, and is a token all the same."""
    statistics = RoutingStatistics(2, 8)
    statistics.rule_rows = lambda rows: torch.tensor([1, 2, 2, 0, 0])[:rows]
    ids = torch.tensor([[0, 5], [8, 8], [2, 0], [0, 0], [3, 4]])
    weights = torch.tensor([[0.6, 0.4], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.5, 0.5]])
    statistics.note(0, ids, weights, None)
    first, other = statistics.read().to_json()["layers"]
    assert other is None
    assert (first["tokens"], first["distinct"], first["activated"]) == (4, 5, 1.5)
    assert first["by_rule_row"] == {
        "0": {"tokens": 1, "distinct": 2, "activated": 2.0},
        "1": {"tokens": 1, "distinct": 2, "activated": 2.0},
        "2": {"tokens": 2, "distinct": 2, "activated": 1.0},
    }
