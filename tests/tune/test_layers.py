"""Which rules are tried in a layer, what a divergence is worth, and how long a layer takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from leanmoe.core.schema import from_json, to_json
from leanmoe.plan import Rule
from leanmoe.results.tune import Candidate, Phase, Sensitivity
from leanmoe.runtime import IMPLEMENTATION, apply, shape_of
from leanmoe.scoring.divergence import final_hidden
from leanmoe.scoring.windows import Windows
from leanmoe.tune.layers import (
    LEAST_RATE,
    LayerTime,
    Started,
    candidates,
    loss_rates,
)
from tests.runtime.families import build
from tests.tune.example import MODEL, anew, context, setting


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


def test_a_rule_for_one_phase_leaves_the_tokens_of_the_other_alone() -> None:
    for candidate in candidates(MODEL, (1, 8), anew):
        level = candidate.plan(MODEL).level
        decode = [rule for band in level.bands for rule in band.rules if not rule.is_empty]
        prompt = [rule for rule in level.prompt if not rule.is_empty]
        assert len(level.prompt) == MODEL.moe_layers
        expected: tuple[list[Rule], list[Rule]] = ([], [candidate.rule])
        assert (decode, prompt) == expected[:: 1 if candidate.phase == "prompt" else -1]


@pytest.mark.parametrize("phase", ["prompt", "decode"])
@pytest.mark.parametrize("reply", [0, 4])
def test_a_layer_goes_on_from_what_the_full_model_made(
    tmp_path: Path, phase: Phase, reply: int
) -> None:
    """As the whole forward under the plan, whose other tokens and layers have no rule."""
    model = build("deepseek_v3")
    shared = replace(context(tmp_path), model=model, shape=shape_of(model))
    ids_SN = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(3))
    (batch,) = Windows.of_ids(ids_SN).after_prompt(16, reply).batches(decode_batch=2)
    started = Started.of(shared, batch, phase)
    with shared.full():
        full = final_hidden(model, batch)
    for layer in range(shared.fingerprint.moe_layers):
        plan = Candidate(phase, layer, Rule(top_k=1), 2).plan(shared.fingerprint)

        under = partial(apply, model, plan, experts=IMPLEMENTATION, decode_batch=2)
        with under(prompt_tokens=batch.prompt_in_call):
            whole = final_hidden(model, batch)[:, 16:]
        with under(prompt_tokens=started.prompt_tokens):
            found = started.final_hidden(model, layer)[:, 16:]
        torch.testing.assert_close(found, whole)
        is_read = phase == "decode" or layer < shared.fingerprint.moe_layers - 1
        assert torch.allclose(found, full[:, 16:]) is not is_read
