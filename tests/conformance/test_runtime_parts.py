"""A call's prompt and reply parts in Transformers are the rule rows of a table of the same plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.routing import RuleTable, route_rows
from leanmoe.runtime.routing import LayerRouting
from leanmoe.runtime.step import served_parts
from tests.conformance.cases import ROUTERS, rules
from tests.conformance.test_implementations import by_expert

EXPERTS, TOP_K = 32, 4
REPLY, PROMPT = 1, 2


@pytest.mark.parametrize("is_fast", [False, True], ids=["reference", "fast"])
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_parts_of_a_call_are_rows_of_the_plans_table(
    is_fast: bool, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(ROUTERS)))
    router = ROUTERS[name]
    few, many = (data.draw(rules(EXPERTS, TOP_K, None)) for _ in range(2))
    prompt = data.draw(rules(EXPERTS, TOP_K, False) | st.just(Rule(top_k=0)))
    sequences, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
    read = data.draw(st.integers(1, length))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits_TE = torch.randn(sequences * length, EXPERTS, generator=generator)
    bias_E = torch.randn(EXPERTS, generator=generator) * 0.1 if router.ranking_bias else None
    padding_SN = torch.arange(length) < torch.randint(length, (sequences, 1), generator=generator)

    bands = (Band(3, (few,)), Band(None, (many,)))
    plan = Plan.banded(Fingerprint("Model", 1, 1, EXPERTS, TOP_K), bands, (prompt,))
    parts = served_parts(plan, (sequences, length), padding_SN, read)
    layer = LayerRouting(0, router, TOP_K, EXPERTS, bias_E, None, is_fast, None)
    ids_TK, weights_TK, _ = layer.choose(logits_TE, None, parts)

    is_reply_SN = (torch.arange(length) >= length - read).expand(sequences, length)
    replies = max(1, int((is_reply_SN & ~padding_SN).sum()))
    table = RuleTable.of(TOP_K, [(plan.rules_for(replies)[0], prompt)])
    rows_T = torch.where(is_reply_SN, REPLY, PROMPT).flatten()
    padding_T = padding_SN.flatten()
    wanted = route_rows(logits_TE, router, TOP_K, table, rows_T, bias_E, padding_T)
    used_TK = wanted.ids_BTK[..., : ids_TK.shape[-1]]
    assert (wanted.ids_BTK[..., ids_TK.shape[-1] :] == EXPERTS).all()
    assert ids_TK.sort(dim=-1)[0].tolist() == used_TK.sort(dim=-1)[0].tolist()
    found = wanted._replace(ids_BTK=ids_TK, weights_BTK=weights_TK)
    torch.testing.assert_close(
        by_expert(found, EXPERTS), by_expert(wanted, EXPERTS), atol=1e-5, rtol=1e-4
    )
