"""Experts are balanced as DeepSeek-V3's are."""

from __future__ import annotations

import pytest
import torch

from reference_model.architecture import build, correction_bias, routers
from reference_model.balance import LoadBalancer, balance_loss
from tests.reference_model.conftest import TINY, TINY_SOFTMAX


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


def test_a_router_without_bias_is_balanced_by_the_loss_of_the_whole_batch() -> None:
    sizes = TINY_SOFTMAX.model
    model = build(sizes, seed=0)
    balancer = LoadBalancer(routers(model), sizes.experts, sizes.context)
    ids_SN = torch.randint(sizes.vocab_size, (2, sizes.context))
    weights = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.5)
    optimiser = torch.optim.Adam(weights, lr=0.02)
    losses, uneven = [], []
    for _ in range(40):
        optimiser.zero_grad()
        model.model(input_ids=ids_SN, use_cache=False)
        loss = balancer.take_loss()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        uneven.append(float(balancer.update_biases(gamma=1.0).max()))
    assert losses[-1] < losses[0] - 0.1
    assert uneven[-1] < 0.8 * uneven[0]


def test_the_sequence_loss_is_one_when_even_and_larger_when_not() -> None:
    # Two sequences of 4 tokens, 4 experts, 1 slot: the first even, the second all on expert 0.
    ids_TK = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0]).unsqueeze(1)
    logits_TE = torch.zeros(8, 4)
    logits_TE[4:, 0] = 20.0  # score 1 against 0.5 for each of the others: a share of 0.4
    counts_SE, loss = balance_loss(logits_TE.sigmoid(), ids_TK, tokens=4)
    assert counts_SE.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]
    assert float(loss) == pytest.approx((1.0 + 4 * 0.4) / 2)
