"""What cannot run is refused before its weights are read: the checkpoints here have none."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.reference import path as reference
from leanmoe.runtime import load_model, model, require_batching
from leanmoe.runtime.loading import check_tokens
from tests.runtime.families import build

VOCABULARY = 8192
"""As many as the reference model's tokenizer needs."""


def without_weights(folder: Path, family: str) -> str:
    config = build(family).config
    config.vocab_size = VOCABULARY
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference() / name, folder / name)
    return str(folder)


def test_caches_that_cannot_be_held_end_a_bench_before_weights_are_read(tmp_path: Path) -> None:
    name = without_weights(tmp_path, "qwen3_next")
    with pytest.raises(LeanMoeError, match="no cache for layers of linear_attention: measure"):
        load_model(name, require=require_batching)
    with pytest.raises(LeanMoeError, match="cannot be loaded"):
        load_model(name)


def test_layers_that_are_not_where_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = without_weights(tmp_path, "qwen3_moe")
    monkeypatch.setattr(model, "_is_experts", lambda _: False)
    with pytest.raises(LeanMoeError, match=r"MoE layers were found at \[\]"):
        load_model(name)


def test_a_multimodal_model_that_no_class_loads_as_text(tmp_path: Path) -> None:
    outer: Any = CONFIG_MAPPING["qwen3_vl_moe"]
    outer(architectures=["Qwen3VLMoeForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(LeanMoeError, match="no class that loads qwen3_vl_moe"):
        load_model(str(tmp_path))


def test_a_tokenizer_beyond_the_embedding_is_named_before_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tokenizer(added: dict[int, str]) -> SimpleNamespace:
        return SimpleNamespace(
            get_vocab=lambda: {str(number): number for number in range(12)},
            added_tokens_decoder=added,
        )

    check_tokens(tokenizer({}), 12)
    with pytest.raises(LeanMoeError, match="token ids up to 11, the model's embedding 8 rows"):
        check_tokens(tokenizer({}), 8)
    assert capsys.readouterr().err == ""
    check_tokens(tokenizer({10: "<a>", 11: "<b>"}), 10)
    assert "2 added tokens of the tokenizer (ids from 10)" in capsys.readouterr().err
