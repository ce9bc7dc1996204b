"""How far weights are normalised: chosen by loss, for all layers and where it pays in some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from leanmoe.plan import Rule
from leanmoe.stats.losses import Losses
from leanmoe.tune import renormalise
from leanmoe.tune.context import TuneContext
from leanmoe.tune.layers import candidates
from leanmoe.tune.renormalise import best_value, by_layer, chosen, refined, with_values_of
from tests.tune.example import MODEL, context

DOCUMENTS = 40


@pytest.mark.parametrize("best", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_value_of_least_loss_is_found_with_four_passes(best: float) -> None:
    asked: list[float] = []

    def measure(a: float) -> float:
        asked.append(a)
        return (a - best) ** 2

    assert best_value(measure) == best
    assert len(asked) == 4


def losses(wanted: tuple[float, ...], noise: float = 0.0) -> Callable[[tuple[Rule, ...]], Losses]:
    """Losses that rise with each layer's distance from the value it wants."""
    draw = np.random.default_rng(0)

    def measure(rules: tuple[Rule, ...]) -> Losses:
        away = sum((r.renormalise - a) ** 2 for r, a in zip(rules, wanted, strict=True))
        loss_U = 10 + away + noise * draw.normal(size=DOCUMENTS)
        names = tuple(map(str, range(DOCUMENTS)))
        return Losses(names, loss_U, np.full(DOCUMENTS, 10))

    return measure


def test_layers_that_want_another_value_get_it_and_others_stay() -> None:
    wanted = (0.25, 0.25, 0.25, 0.5, 0.5, 0.75)
    rules = (Rule(top_k=5, renormalise=0.5),) * 6
    got = by_layer(rules, losses(wanted))
    assert [rule.renormalise for rule in got] == [0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert {rule.top_k for rule in got} == {5}


def test_what_noise_alone_prefers_is_not_taken() -> None:
    rules = (Rule(top_k=5, renormalise=0.5),) * 6
    assert by_layer(rules, losses((0.5,) * 6, noise=0.1)) == rules


def test_empty_rules_stay_empty() -> None:
    rules = (Rule(), Rule(top_k=5, renormalise=0.5))
    assert by_layer(rules, losses((0.0, 0.0)))[0] == Rule()
    assert with_values_of((Rule(top_k=6), Rule(top_k=6)), rules) == (
        Rule(top_k=6),
        Rule(top_k=6, renormalise=0.5),
    )


def test_a_router_that_does_not_normalise_costs_no_pass(tmp_path: Path) -> None:
    given = context(tmp_path)
    plain = replace(given.shape.router, normalise=False)
    given = replace(given, shape=replace(given.shape, router=plain))
    assert chosen(given, "decode", 8) == 1.0
    decode = (Rule(top_k=4),) * len(given.no_rules)
    assert refined(given, (), decode, 8) == decode


def test_each_phase_and_load_is_tried_by_its_own_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = context(tmp_path), []

    def measured(_context: TuneContext, plan: object, decode_batch: int) -> Losses:
        prompt, bands = plan.prompt, plan.bands  # type: ignore[attr-defined]
        rule = bands[0].rules[0] if bands else prompt[0]
        assert not bands or prompt == given.no_rules, "prompts stay as they are while replies try"
        asked.append((decode_batch, not bands, rule.top_k, rule.guaranteed))
        return losses((0.75,))((rule,))

    monkeypatch.setattr(renormalise, "_losses", measured)
    assert chosen(given, "prompt", 1) == chosen(given, "decode", 8) == 0.75
    assert dict.fromkeys(asked) == dict.fromkeys([(1, True, 6, None), (8, False, None, 4)])
    seen = len(asked)
    assert chosen(given, "decode", 8) == 0.75
    assert len(asked) == seen, "what is stored is not measured again"


def test_candidates_start_from_the_value_of_their_phase_and_load() -> None:
    def value(phase: str, decode_batch: int) -> float:
        return 0.25 if phase == "prompt" else decode_batch / 32

    for each in candidates(MODEL, (1, 8, 32), value):
        if each.rule.top_k != 0:
            assert each.rule.renormalise == value(each.phase, each.decode_batch)
