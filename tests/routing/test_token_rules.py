"""threshold and top_p on a token's slots, by hand."""

from __future__ import annotations

import torch

from leanmoe.models.families import Router
from leanmoe.plan import Rule
from leanmoe.routing.token_rules import wanted

GATES = torch.tensor([[0.5, 0.25, 0.125, 0.125]])


def kept(rule: Rule, gates: torch.Tensor = GATES, router: Router | None = None) -> list[bool]:
    return wanted(gates, rule, router or Router())[0].tolist()


def test_threshold_is_a_share_of_the_best_gate_and_meeting_it_is_enough() -> None:
    assert kept(Rule(threshold=0.5)) == [True, True, False, False]
    assert kept(Rule(threshold=0.51)) == [True, False, False, False]
    assert kept(Rule(threshold=1.0)) == [True, False, False, False]


def test_the_best_gate_need_not_rank_first() -> None:
    gates = torch.tensor([[0.1, 0.5, 0.4, 0.0]])
    assert kept(Rule(threshold=0.5), gates) == [False, True, True, False]


def test_top_p_is_the_shortest_prefix_that_reaches_it() -> None:
    assert kept(Rule(top_p=0.5)) == [True, False, False, False]
    assert kept(Rule(top_p=0.51)) == [True, True, False, False]
    assert kept(Rule(top_p=1.0)) == [True, True, True, True]


def test_both_keep_a_slot_even_where_threshold_drops_the_first() -> None:
    gates = torch.tensor([[0.1, 0.8, 0.06, 0.04]])
    assert kept(Rule(threshold=0.5, top_p=0.1), gates) == [False, True, False, False]


def test_gates_that_are_all_zero_keep_one_slot_at_least() -> None:
    for rule in (Rule(threshold=0.5), Rule(top_p=0.5), Rule(threshold=0.5, top_p=0.5)):
        assert any(kept(rule, torch.zeros(1, 4)))


def test_logits_that_were_picked_are_compared_as_the_weights_they_become() -> None:
    router = Router("softmax_after_top_k", score_dtype="logits")
    logits = GATES.log() - 7.0
    assert kept(Rule(threshold=0.4), logits, router) == [True, True, False, False]
    assert kept(Rule(top_p=0.7), logits, router) == [True, True, False, False]
