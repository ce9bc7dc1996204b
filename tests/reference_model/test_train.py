"""Training: it learns, resumes bit for bit, balances experts, and never falls back silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_model.architecture import build, correction_bias, count_flops, routers, to_bf16
from reference_model.balance import LoadBalancer, sequence_balance
from reference_model.card import summarise_log
from reference_model.optimiser import OptimiserSettings, rate_at
from reference_model.stream import Windows
from reference_model.train import Trainer, check_experts, train
from torch import nn

from leanmoe.core.errors import LeanMoeError
from reference_model import experts
from tests.reference_model.conftest import TINY


def test_a_tiny_run_learns_logs_and_exports(tiny_data: Path, tmp_path: Path) -> None:
    trainer = train(tiny_data, tmp_path, TINY, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    assert lines[0]["kernel"] == "aten::_grouped_mm"
    assert lines[-1]["tokens"] == trainer.tokens == TINY.tokens
    summary = summarise_log(lines)
    assert summary["tokens"] == TINY.tokens
    assert len(summary["dev_curve"]) == 3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_resumed_run_equals_an_unbroken_one(tiny_data: Path, tmp_path: Path) -> None:
    settings = replace(TINY, residual_dropout=0.1)
    # Dropout draws from the global generator, which building a model seeds.
    whole = Trainer(tiny_data, tmp_path / "whole", settings, "cpu")
    for _ in range(8):
        whole.train_step()
    first = Trainer(tiny_data, tmp_path / "parts", settings, "cpu")
    for _ in range(3):
        first.train_step()
    first.save(seconds=1.0)
    second = Trainer(tiny_data, tmp_path / "parts", settings, "cpu")
    second.resume(tmp_path / "parts" / "checkpoint.safetensors")
    for _ in range(5):
        second.train_step()
    assert second.step == whole.step
    for mine, other in zip(second.adam.masters, whole.adam.masters, strict=True):
        assert torch.equal(mine, other)
    for mine_gate, other_gate in zip(routers(second.model), routers(whole.model), strict=True):
        assert torch.equal(correction_bias(mine_gate), correction_bias(other_gate))


def test_a_checkpoint_of_another_model_or_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_data, tmp_path, TINY, "cpu")
    trainer.train_step()
    trainer.save(seconds=1.0)
    file = tmp_path / "checkpoint.safetensors"
    other_model = replace(TINY, model=replace(TINY.model, expert_intermediate=32))
    with pytest.raises(LeanMoeError, match="expert_intermediate"):
        Trainer(tiny_data, tmp_path, other_model, "cpu").resume(file)
    trainer.data_sha256 = "another"
    with pytest.raises(LeanMoeError, match="other data"):
        trainer.resume(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(LeanMoeError, match="cannot read checkpoint"):
        trainer.resume(file)


def test_max_seconds_stops_and_saves(tiny_data: Path, tmp_path: Path) -> None:
    trainer = train(tiny_data, tmp_path, TINY, device="cpu", max_seconds=0.0)
    assert trainer.tokens == 0
    assert (tmp_path / "checkpoint.safetensors").exists()


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


@pytest.mark.parametrize("implementation", ["grouped_mm", experts.NAME])
def test_training_experts_agree_with_the_plain_loop(implementation: str) -> None:
    experts.register()
    model = build(TINY.model, seed=1)
    to_bf16(model)
    for gate in routers(model):
        assert isinstance(gate.weight, nn.Parameter)
        nn.init.normal_(gate.weight, std=0.3)
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters()}
        found[name] = (out.logits.detach().float(), grads)
    logits, grads = found["eager"]
    assert (found[implementation][0] - logits).norm() < 1e-2 * logits.norm()
    for name, grad in grads.items():
        assert (found[implementation][1][name] - grad).norm() < 3e-2 * grad.norm(), name


def test_a_silent_fallback_is_refused() -> None:
    model = build(TINY.model, seed=0)
    model.set_experts_implementation("eager")
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(LeanMoeError, match="ran a loop instead"):
        check_experts(model, ids, "grouped_mm")
    assert check_experts(model, ids, "eager") == "eager loop"


def test_the_rate_rises_stays_and_falls() -> None:
    settings = OptimiserSettings(
        learning_rate=1.0, warmup_tokens=100, decay_share=0.5, final_share=0.1
    )
    rates = [rate_at(tokens, 1000, settings) for tokens in (0, 49, 100, 500, 750, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_every_epoch_covers_the_stream_once_and_differently() -> None:
    ids = torch.arange(1 + 10 * 8)
    windows = Windows(ids, length=8, seed=0)
    epochs = []
    for epoch in range(2):
        inputs, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(inputs + 1, targets)
        assert inputs.flatten().unique().numel() == inputs.numel()
        epochs.append(inputs)
    assert not torch.equal(epochs[0], epochs[1])
    again, _ = Windows(ids, length=8, seed=0).batch(0, windows.per_epoch)
    assert torch.equal(again, epochs[0])


def test_flops_by_hand() -> None:
    flops = count_flops(TINY.model)
    attention = 32 * 2 * 16 + 32 * 24 + 16 * 2 * 24 + 2 * 16 * 32
    dense = 3 * 32 * 48
    moe = 3 * 32 * 16 * 5 + 32 * 16
    assert flops.matrices == 6 * (2 * attention + dense + moe + 32 * 64)
    assert flops.attention == 2 * 3 * 2 * 2 * (16 + 16) * 16
