"""Proofs of levels: read back as written, and no claim that its own numbers do not bear out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import Margin
from leanmoe.core.schema import fields_to_json, from_json
from leanmoe.plan import KindProof, LevelProof


def proof(margin: Margin) -> LevelProof:
    """A proof within the margin on two kinds of text, code the worst."""
    return LevelProof(
        kinds=(
            KindProof("prose", "prose.txt", 0.1 * margin.value, 0.5 * margin.value),
            KindProof("code", "code.txt", 0.2 * margin.value, 0.9 * margin.value),
        ),
        margin=margin,
        confidence=0.95,
        concurrency=(1, 8),
        engine="transformers",
        implementation="leanmoe (cpu)",
        dtype="float32",
        hardware="a processor",
        versions={"leanmoe": "0.1.0", "torch": "2.11.0"},
        commit="abc",
    )


PROOF = proof(Margin(0.005))


@pytest.mark.parametrize("margin", [Margin(0.005), Margin(0.01, in_nats=True)])
def test_a_proof_is_read_back(margin: Margin) -> None:
    written = json.loads(json.dumps(fields_to_json(proof(margin))))
    assert from_json(LevelProof, written, "proof") == proof(margin)


def test_a_level_is_as_good_as_on_its_worst_kind() -> None:
    assert PROOF.worst.kind == "code"
    assert (PROOF.loss, PROOF.bound) == (PROOF.kinds[1].loss, PROOF.kinds[1].bound)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ()}, r"kinds are \[\]: at least one"),
        ({"kinds": PROOF.kinds[:1] * 2}, r"kinds are \['prose', 'prose'\]"),
        ({"confidence": 1.0}, r"confidence is 1\.0: it must be above 0 and below 1"),
        ({"confidence": float("nan")}, "confidence is nan"),
        ({"concurrency": ()}, r"concurrency is \[\]: it must hold whole numbers from 1"),
        ({"concurrency": (0, 8)}, r"concurrency is \[0, 8\]"),
        ({"concurrency": (8, 1)}, r"concurrency is \[8, 1\]"),
        ({"concurrency": (8, 8)}, r"concurrency is \[8, 8\]"),
        ({"margin": Margin(0.004)}, r"at most the margin, 0\.4%"),
        ({"kinds": (KindProof("code", "", 0.003, 0.002),)}, "the bound must be at least the loss"),
        ({"kinds": (KindProof("code", "", 0.003, float("nan")),)}, "bound nan"),
    ],
)
def test_claims_that_do_not_hold_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        replace(PROOF, **changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence", "high", r"proof\.confidence is 'high': it must be a number"),
        ("confidence", 1e999, r"proof\.confidence is inf: it must be a finite number"),
        ("margin", {"value": 2}, r"proof\.margin: .*must be above 0 and below 1"),
        ("kinds", [{"kind": "code"}], r"proof\.kinds\[0\]\.source is missing"),
        ("gain", 2, r"proof has an unknown field 'gain'"),
        ("concurrency", [1.5], r"proof\.concurrency\[0\] is 1\.5: it must be a whole number"),
    ],
)
def test_malformed_proofs_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        from_json(LevelProof, {**fields_to_json(PROOF), field: value}, "proof")
