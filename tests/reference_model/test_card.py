"""The card says what its results say."""

from __future__ import annotations

from leanmoe.core.files import read_json
from reference_model.card import HERE, RESULTS, card


def test_the_packaged_card_is_what_its_results_say() -> None:
    loaded = [
        read_json(RESULTS / f"{name}.json", name) for name in ("training", "data", "evaluation")
    ]
    assert card(*loaded) == (HERE / "README.md").read_text()
    assert all(layer["unused"] == 0 for layer in loaded[2]["expert_use"])
    pair = next(entry for entry in loaded[2]["uniform_k"] if entry["k"] == 2)
    assert all(text["low"] > 0.1 for text in pair["texts"].values())
