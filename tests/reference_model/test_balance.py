"""Experts are balanced as DeepSeek-V3's are."""

from __future__ import annotations

import pytest
import torch

from reference_model.architecture import build, correction_bias, routers
from reference_model.balance import LoadBalancer, sequence_balance
from tests.reference_model.conftest import TINY


def test_the_bias_moves_toward_even_load() -> None:
    model = build(TINY.model, seed=0)
    gates = routers(model)
    balancer = LoadBalancer(gates, TINY.model.experts, TINY.model.context)
    load_E = torch.ones(TINY.model.experts)
    load_E[3], load_E[5] = 9.0, 0.0
    balancer.load_LE[0] = load_E
    violation_L = balancer.update_biases(gamma=0.01)
    mean = float(load_E.mean())
    bias_E = correction_bias(gates[0])
    assert bias_E[3] == pytest.approx(-0.01)
    assert bias_E[5] == pytest.approx(0.01)
    assert float(violation_L[0]) == pytest.approx(9.0 / mean)
    assert not balancer.load_LE.any()
    balancer.load_LE[0] = load_E
    before_E = bias_E.clone()
    balancer.update_biases(gamma=0.0)
    assert torch.equal(correction_bias(gates[0]), before_E)


def test_the_sequence_loss_is_one_when_even_and_larger_when_not() -> None:
    # Two sequences of 4 tokens, 4 experts, 1 slot: the first even, the second all on expert 0.
    ids_TK = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0]).unsqueeze(1)
    logits_TE = torch.zeros(8, 4)
    logits_TE[4:, 0] = 20.0  # score 1 against 0.5 for each of the others: a share of 0.4
    counts_SE, loss = sequence_balance(logits_TE, ids_TK, tokens=4)
    assert counts_SE.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]
    assert float(loss) == pytest.approx((1.0 + 4 * 0.4) / 2)
