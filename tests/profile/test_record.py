"""What routers choose on text, against counts by hand; and decode steps drawn and routed again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import Router
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.profile.record import count_choices, distinct_curve, draw_steps, profile, replay
from leanmoe.profile.saved import Trace
from leanmoe.routing import BatchScope, route
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.scoring.windows import Windows
from tests.profile.example import DOCUMENTS, EACH, EXPERTS, TOP_K, made_up_profile
from tests.runtime.families import CONFIGS, build


def some_windows(documents: int = 6, length: int = 20, each: int = 2) -> Windows:
    draw = torch.Generator().manual_seed(1)
    rows = documents * each
    lengths_S = torch.full((rows,), length)
    lengths_S[1] = 7
    return Windows(
        torch.randint(3, 64, (rows, length), generator=draw),
        lengths_S,
        torch.arange(rows) // each,
        tuple(f"d{n}" for n in range(documents)),
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_every_token_is_counted_once_whatever_the_batches(family: str) -> None:
    model, windows = build(family), some_windows()
    one = profile(model, windows, trace_tokens=60, batch_tokens=20)
    two = profile(model, windows, trace_tokens=60, batch_tokens=1000)
    top_k = shape_of(model).top_k
    assert one.model == shape_of(model).fingerprint()
    assert (one.tokens, one.documents) == (windows.tokens, 6)
    for first_E, second_E in zip(one.use_LE, two.use_LE, strict=True):
        assert first_E.sum() == windows.tokens * top_k
        assert np.abs(first_E - second_E).sum() <= 4  # rounding may turn a near tie
    np.testing.assert_allclose(one.mass_LK, two.mass_LK, rtol=1e-3)
    np.testing.assert_allclose(one.trace.logits_LTE, two.trace.logits_LTE, atol=0.02)


def test_the_sample_holds_the_logits_of_its_tokens() -> None:
    model, windows = build("deepseek_v3"), some_windows()
    made = profile(model, windows, trace_tokens=30, batch_tokens=40)
    trace = made.trace
    assert trace.tokens == 30
    assert Counter(trace.document_T.tolist()) == dict.fromkeys(range(6), 5)
    assert trace.position_T.min() >= 1
    assert (np.diff(trace.document_T) >= 0).all()

    caught: dict[int, torch.Tensor] = {}
    with record(model, caught.__setitem__), torch.inference_mode():
        model(windows.ids_SN)
    for layer in find_layers(model):
        logits_NLE = caught[layer.number].view(*windows.ids_SN.shape, -1)
        for place in range(trace.tokens):
            document, position = int(trace.document_T[place]), int(trace.position_T[place])
            rows = (windows.documents_S == document).nonzero().flatten()
            off = [
                (
                    logits_NLE[row, position]
                    - torch.from_numpy(trace.logits_LTE)[layer.number, place]
                )
                for row in rows
            ]
            assert min(float(difference.abs().max()) for difference in off) < 0.01


def test_replay_of_the_sample_is_what_the_model_activates() -> None:
    model, windows = build("deepseek_v3"), some_windows(each=1)
    made = profile(model, windows, trace_tokens=10_000)
    assert made.trace.tokens == windows.tokens - len(windows.lengths_S)
    caught: dict[int, torch.Tensor] = {}
    with record(model, caught.__setitem__), torch.inference_mode():
        model(windows.ids_SN)
    shape, layer = shape_of(model), find_layers(model)[1]
    rule = Rule(threshold=0.8)
    routing = route(
        caught[layer.number].view(*windows.ids_SN.shape, -1)[windows.mask],
        shape.router,
        shape.top_k,
        rule,
        layer.ranking_bias(shape.router),
    )
    slots = float((routing.ids_BTK < shape.experts).double().sum(-1).mean())
    assert 1.2 < slots < shape.top_k - 0.2
    assert replay(made, layer.number, rule, 6, steps=2000).slots == pytest.approx(slots, rel=0.05)


def test_nan_is_named() -> None:
    model = build("deepseek_v3")
    layer = find_layers(model)[1]
    with torch.no_grad():
        layer.router.weight[0, 0] = float("nan")
    with pytest.raises(LeanMoeError, match=r"router logits are not finite"):
        profile(model, some_windows())


SIGMOID = Router("sigmoid")


def gates(*rows: list[float]) -> torch.Tensor:
    """Logits whose sigmoids are these gates."""
    return torch.tensor(rows).logit()


def test_counts_made_by_hand() -> None:
    logits = gates([0.6, 0.2, 0.1, 0.05], [0.1, 0.3, 0.2, 0.5], [0.8, 0.4, 0.1, 0.3])
    use_E, mass_K = count_choices(logits, SIGMOID, 2, None)
    assert use_E.tolist() == [2, 3, 0, 1]
    best = [0.6 / 0.8, 0.5 / 0.8, 0.8 / 1.2]
    np.testing.assert_allclose(mass_K, [sum(best), 3.0], rtol=1e-6)


def test_the_bias_ranks_but_does_not_weigh() -> None:
    use_E, mass_K = count_choices(gates([0.6, 0.2, 0.1]), SIGMOID, 2, torch.tensor([0.0, 0.0, 0.7]))
    assert use_E.tolist() == [1, 0, 1]
    # Expert 2 is ranked first: keeping the best one keeps a seventh of the mass.
    np.testing.assert_allclose(mass_K, [1 / 7, 1.0], rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 60),
    cut=st.integers(0, 60),
    scoring=st.sampled_from(["sigmoid", "softmax", "softmax_after_top_k"]),
    seed=st.integers(0, 99),
)
def test_chunks_add_up_to_the_whole(tokens: int, cut: int, scoring: Any, seed: int) -> None:
    logits_TE = torch.randn((tokens, 16), generator=torch.Generator().manual_seed(seed))
    router = Router(scoring, groups=4, groups_used=2)
    use_E, mass_K = count_choices(logits_TE, router, 4, None)
    parts = [count_choices(part, router, 4, None) for part in (logits_TE[:cut], logits_TE[cut:])]
    assert use_E.sum() == tokens * 4
    assert torch.equal(use_E, parts[0][0] + parts[1][0])
    np.testing.assert_allclose(mass_K, parts[0][1] + parts[1][1])
    np.testing.assert_allclose(mass_K[-1], tokens)
    assert (np.diff(mass_K) >= 0).all()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_experts_are_those_the_model_itself_uses(family: str) -> None:
    model = build(family)
    shape, (layer, *_) = shape_of(model), find_layers(model)
    counted: list[torch.Tensor] = []
    used: list[torch.Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: used.append(inputs[1]))

    def sink(number: int, logits_TE: torch.Tensor) -> None:
        if number == layer.number:
            bias_E = layer.ranking_bias(shape.router)
            counted.append(count_choices(logits_TE, shape.router, shape.top_k, bias_E)[0])

    ids_SN = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    with record(model, sink), torch.inference_mode():
        model(ids_SN)
    wanted = torch.bincount(used[0].flatten(), minlength=shape.experts)
    assert counted[0].tolist() == wanted.tolist()


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    tokens=st.integers(1, 20),
    steps=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_step_has_a_token_of_each_of_as_many_documents_as_possible(
    counts: list[int], tokens: int, steps: int, seed: int
) -> None:
    document_T = np.repeat(np.arange(len(counts), dtype=np.int32) * 3, counts)
    trace = Trace(np.zeros((1, len(document_T), 4), np.float16), document_T, document_T)
    if tokens > trace.tokens:
        with pytest.raises(LeanMoeError, match=f"tokens in a step is {tokens}: it must be 1 to"):
            draw_steps(trace, tokens, steps, seed)
        return
    places_SB = draw_steps(trace, tokens, steps, seed)
    assert places_SB.shape == (steps, tokens)
    assert torch.equal(places_SB, draw_steps(trace, tokens, steps, seed))
    for step in places_SB.tolist():
        times = np.bincount(document_T[step] // 3, minlength=len(counts))
        assert times.max() - times.min() <= 1
        if tokens <= len(counts) * min(counts):
            assert len(set(step)) == tokens


def test_every_token_comes_up_equally_often() -> None:
    trace = made_up_profile().trace
    drawn = draw_steps(trace, 4, 12_000).flatten()
    times = torch.bincount(drawn, minlength=trace.tokens).double()
    assert times.mean() == 100
    assert times.std() < 13  # Poisson: 10


def test_even_independent_use_is_the_uniform_formula() -> None:
    for point in distinct_curve(made_up_profile(bias=False), 0):
        assert point.uniform == distinct_uniform(EXPERTS, TOP_K, point.tokens)
        assert point.measured == pytest.approx(point.uniform, abs=4 * point.error + 0.15)
        assert point.documents == min(point.tokens, DOCUMENTS)


def test_rules_activate_what_they_say() -> None:
    made = made_up_profile()
    full = replay(made, 1, Rule(), 8)
    assert (full.slots, full.over_budget) == (TOP_K, 0.0)
    assert replay(made, 1, Rule(top_k=2), 8).slots == 2
    assert replay(made, 1, Rule(top_k=2), 8).distinct < full.distinct
    few = replay(made, 1, Rule(budget=6), 8)
    assert few.distinct <= 6 or few.over_budget > 0
    assert replay(made, 1, Rule(budget=1), 8).over_budget == 1.0
    scope = replay(made, 1, Rule(guaranteed=1), 8)
    assert scope.distinct == pytest.approx(replay(made, 1, Rule(top_k=1), 8).distinct)
    assert 1 < scope.slots <= TOP_K
    assert replay(made, 1, Rule(experts=(0, 3, 5, 7)), 64).distinct == 4


@pytest.mark.parametrize("rule", [Rule(guaranteed=2), Rule(budget_per_rank=3)])
def test_batch_scopes_and_ranks_are_counted_apart(rule: Rule) -> None:
    """Beside the reference routing, a batch scope at a time."""
    made, tokens, scopes, steps = made_up_profile(), 6, 2, 8
    placement = Placement.linear(EXPERTS, 4)
    found = replay(made, 1, rule, tokens, steps, 0, BatchScope(placement), scopes)
    assert made.bias_LE is not None
    bias_E = torch.from_numpy(made.bias_LE[1])
    logits_TE = torch.from_numpy(made.trace.logits_LTE[1]).float()
    distinct, most, slots = [], [], []
    for places_B in draw_steps(made.trace, tokens, steps, 0):
        active = set()
        for mine in places_B.chunk(scopes):
            routing = route(
                logits_TE[mine], made.router, TOP_K, rule, bias_E, scope=BatchScope(placement)
            )
            used = routing.ids_BTK[routing.ids_BTK < EXPERTS].tolist()
            active |= set(used)
            slots.append(len(used))
        distinct.append(len(active))
        most.append(max(sum(placement.rank_of[e] == rank for e in active) for rank in range(4)))
    assert found.distinct == pytest.approx(np.mean(distinct))
    assert found.most_loaded == pytest.approx(np.mean(most))
    assert found.slots == pytest.approx(sum(slots) / (steps * tokens))


def test_batch_scopes_share_a_step_evenly() -> None:
    with pytest.raises(LeanMoeError, match="scopes is 4: it must divide the 6 tokens"):
        replay(made_up_profile(), 0, Rule(guaranteed=1), 6, scopes=4)
    with pytest.raises(LeanMoeError, match="placement is of 8 experts"):
        replay(
            made_up_profile(), 0, Rule(guaranteed=1), 6, scope=BatchScope(Placement.linear(8, 2))
        )


def test_rules_are_compared_on_the_same_steps() -> None:
    made = made_up_profile()
    loose, tight = (replay(made, 0, Rule(threshold=t), 3, steps=2) for t in (1e-6, 1e-5))
    assert (loose.slots, loose.distinct) == (tight.slots, tight.distinct)


def test_more_steps_are_surer() -> None:
    made = made_up_profile()
    few, many = (replay(made, 0, Rule(), 4, steps=steps) for steps in (50, 5000))
    assert few.distinct_error == pytest.approx(10 * many.distinct_error, rel=0.3)
    assert few.distinct == pytest.approx(many.distinct, abs=4 * few.distinct_error)


@pytest.mark.parametrize(
    ("layer", "rule", "tokens", "message"),
    [
        (2, Rule(), 1, "layer is 2: it must be 0 to 1"),
        (0, Rule(budget=17), 1, "budget is 17"),
        (0, Rule(), DOCUMENTS * EACH + 1, "tokens in a step is 481: it must be 1 to 480"),
        (0, Rule(), 0, "tokens in a step is 0"),
    ],
)
def test_what_is_out_of_range_is_named(layer: int, rule: Rule, tokens: int, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        replay(made_up_profile(), layer, rule, tokens)
