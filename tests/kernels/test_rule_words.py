"""Rule tables as words: what is written where, and what may be written later."""

from __future__ import annotations

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.rule_words import (
    NO_BUDGET,
    WORDS,
    DeviceRules,
    TableNeeds,
    TokenRules,
    Word,
    needed,
)
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import RuleTable

ROUTER = Router(normalise=True)
FAST = RuleTable.of(
    4, [(Rule(top_k=3, guaranteed=1, budget=9, experts=(0, 2, 5)), Rule(top_k=0, threshold=0.25))]
)
PLAIN = RuleTable.of(4, [(Rule(top_k=2, renormalise=0.5), None)])


def test_each_field_lies_at_its_word() -> None:
    rules = DeviceRules([PLAIN, FAST], ROUTER, 4, 8)
    assert rules.words.shape == (2, 3, WORDS)
    reply, prompt = rules.words[1, 1], rules.words[1, 2]
    fields = (Word.SLOTS, Word.OWN, Word.MARKS, Word.MUST, Word.FULL, Word.BUDGET, Word.PER_RANK)
    assert reply[list(fields)].tolist() == [3, 1, 1, 1, 0, 9, NO_BUDGET]
    assert rules.masks[reply[Word.MASK]].tolist() == [1, 0, 1, 0, 0, 1, 0, 0]
    assert prompt[list(fields)].tolist() == [0, 0, 0, 0, 0, 9, NO_BUDGET]
    shares = rules.words.view(torch.float32)[..., [Word.THRESHOLD, Word.TOP_P, Word.RENORMALISE]]
    assert shares[1, 2].tolist() == [0.25, 2.0, 1.0]
    assert shares[0, 1].tolist() == [0.0, 2.0, 0.5]
    assert rules.words[0, :, Word.FULL].tolist() == [0, 4, 4]


def test_the_words_are_those_that_the_triton_program_reads() -> None:
    program = pytest.importorskip("leanmoe.kernels.triton.router_token_program")
    for word in Word:
        assert getattr(program, f"{word.name}_AT").value == word
    assert program.WORDS.value == WORDS


def test_rows_beyond_a_tables_own_are_the_model_as_trained() -> None:
    two = RuleTable.of(4, [(Rule(top_k=2), None), (Rule(top_k=1), None)])
    rules = DeviceRules([PLAIN, two], ROUTER, 4, 8)
    assert torch.equal(rules.words[0, 3:], rules.words[0, :1].expand(2, WORDS))


def test_other_tables_of_the_same_needs_are_written_in_place() -> None:
    needs = TableNeeds.of([PLAIN, FAST], ROUTER, 4)
    rules = DeviceRules([PLAIN], ROUTER, 4, 8, needs=needs)
    place = rules.words.data_ptr()
    rules.write([FAST])
    assert rules.words.data_ptr() == place
    assert rules.table == FAST
    assert needed(TokenRules(rules, torch.zeros(1))).has_budget
    again = DeviceRules([FAST], ROUTER, 4, 8, needs=needs)
    assert torch.equal(rules.words, again.words)


def test_tables_that_need_more_are_refused_by_name() -> None:
    rules = DeviceRules([PLAIN], ROUTER, 4, 8)
    with pytest.raises(LeanMoeError, match="masks 2: what was compiled has masks 1"):
        rules.write([FAST])
    with pytest.raises(LeanMoeError, match="has_threshold True"):
        rules.write([RuleTable.of(4, [(Rule(threshold=0.5), None)])])
    with pytest.raises(LeanMoeError, match="2 bands of rules: there is room for 1"):
        rules.write([PLAIN, PLAIN])
    with pytest.raises(LeanMoeError, match="for 1 ranks: the experts are on 2"):
        rules.check_ranks(2)
