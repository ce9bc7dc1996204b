"""What an evaluation may be asked, and what it says to anything else."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.eval.settings import EvalSettings, parse_domain, parse_tasks


def test_tasks_are_words_and_none_is_no_task() -> None:
    assert parse_tasks("--tasks", "boolq, piqa") == ("boolq", "piqa")
    assert parse_tasks("--tasks", "none") == ()


def test_a_domain_has_a_name_and_a_file() -> None:
    assert parse_domain("--domain", "code=a=b.txt") == ("code", "a=b.txt")
    with pytest.raises(LeanMoeError, match="--domain is 'code': it must be NAME=FILE"):
        parse_domain("--domain", "code")


def test_a_calibration_is_a_criterion_and_a_share() -> None:
    assert EvalSettings("m", calibrate="easy-ep:75%").calibration() == ("easy-ep", "75%")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 0.0}, "--margin is 0"),
        ({"confidence": 1.0}, "--confidence is 1.0"),
        ({"batch_draws": 0}, "--batch-draws is 0"),
        ({"engine": "sgl"}, "engine is 'sgl': it must be transformers, vllm, sglang"),
        ({"engine": "sglang", "prompts": "p.jsonl"}, "--engine sglang runs lm-evaluation"),
        ({"engine": "vllm", "prompts": "p.jsonl"}, "--prompts needs --engine transformers"),
        ({"calibrate": "easy-ep:75%"}, "none is given"),
        ({"transfer": "runs/demo"}, "--transfer works on each --domain: none is given"),
        ({"domain": (("a", "."), ("a", "."))}, "domain 'a' is given twice"),
        ({"domain": (("a", "."),), "calibrate": "easy-ep"}, "--calibrate is 'easy-ep'"),
        ({"domain": (("a", "."),), "calibrate": "easyep:9"}, "did you mean easy-ep"),
    ],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        EvalSettings("reference", **change).check()
