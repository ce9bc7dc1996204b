"""What stages share: stored results by name, replays once, windows without padding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.text import Document
from leanmoe.plan import Rule
from leanmoe.results.tune import TextPart
from leanmoe.tune.context import LAYER_TIMES, SENSITIVITY, digest, full_windows
from leanmoe.tune.settings import TuneSettings
from tests.tune.example import context

SETTINGS = TuneSettings("reference")


@dataclass(frozen=True)
class Letters:
    """A tokenizer: one token a letter."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **_settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_stage_is_computed_once_for_what_it_is_about(tmp_path: Path) -> None:
    computed: list[int] = []

    def compute() -> TextPart:
        computed.append(1)
        return TextPart(len(computed), 2)

    for _ in range(2):
        assert context(tmp_path).take(LAYER_TIMES, TextPart, compute, 8).documents == 1
    assert context(tmp_path).take(LAYER_TIMES, TextPart, compute, 32).documents == 2
    assert {"layer-times-8.json", "layer-times-32.json"} <= {f.name for f in tmp_path.iterdir()}


def test_several_results_of_a_stage_are_stored_as_one(tmp_path: Path) -> None:
    sizes = (TextPart(1, 2), TextPart(3, 4))
    shared, kind = context(tmp_path), tuple[TextPart, ...]
    assert shared.take(SENSITIVITY, kind, lambda: sizes, "decode", 8) == sizes
    assert shared.take(SENSITIVITY, kind, tuple, "decode", 8) == sizes


def test_a_replay_is_made_once(tmp_path: Path) -> None:
    shared = context(tmp_path)
    assert shared.activity(0, Rule(top_k=2), 4) is shared.activity(0, Rule(top_k=2), 4)
    assert shared.activity(0, Rule(top_k=2), 4) != shared.activity(0, Rule(top_k=2), 8)
    assert shared.activity(0, Rule(top_k=2), 4).slots == 2


def test_a_digest_tells_rules_and_their_order_apart() -> None:
    one, other = (Rule(top_k=2), Rule()), (Rule(), Rule(top_k=2))
    assert digest(one) == digest(list(one))
    assert len({digest(one), digest(other), digest(one, 8), digest(one, None)}) == 4


def test_windows_are_full_and_documents_without_one_are_left_out() -> None:
    documents = tuple(Document(f"d{n}", "x" * length) for n, length in enumerate((40, 12, 32)))
    windows = full_windows(documents, Letters(), 16, 48, SETTINGS)
    assert windows.ids_SN.shape == (3, 16)
    assert (windows.lengths_S == 16).all()
    assert set(windows.names) == {"d0", "d2"}
    assert set(windows.documents_S.tolist()) == {0, 1}


def test_text_without_a_full_window_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="none of its 1 documents has 16 tokens"):
        full_windows((Document("d", "too short"),), Letters(), 16, 48, SETTINGS)
