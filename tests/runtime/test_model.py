"""A loaded model: its MoE layers, what enters them, and a forward from the middle."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.cpu.threads import openmp_functions
from leanmoe.models.reference import path as reference
from leanmoe.runtime import find_layers, load_model, release_threads, require_batching, resume_from
from leanmoe.runtime import model as module
from leanmoe.runtime.model import batching_reason, check_tokens, keep_hidden, require_rows
from tests.runtime.families import build
from tests.runtime.test_apply import logits


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "gpt_oss"])
def test_resuming_gives_the_logits_of_the_whole_model(family: str) -> None:
    model = build(family)
    with keep_hidden(model, [1, 2]) as kept:
        logits(model)
    stock = logits(model)
    for index, hidden in kept.items():
        with resume_from(model, index, hidden):
            assert torch.equal(logits(model), stock)
    assert torch.equal(logits(model), stock)


def test_one_experts_rows_are_those_of_all_outputs() -> None:
    layer = find_layers(build("qwen3_moe"))[0]
    hidden_TD = torch.randn(3, layer.experts.down_proj.shape[1])
    ids_TK = torch.tensor([[0, 2], [2, 1], [layer.experts.num_experts, 0]])
    seen = 0
    with torch.inference_mode():
        whole_TED = layer.all_outputs(hidden_TD)
        for expert, rows_X, slots_X, outputs_XD in layer.outputs_by_expert(hidden_TD, ids_TK):
            assert ids_TK[rows_X, slots_X].eq(expert).all()
            torch.testing.assert_close(outputs_XD, whole_TED[rows_X, expert])
            seen += len(rows_X)
    assert seen == 5, "a skipped slot has no row"


def test_released_threads_come_back_with_the_next_operation() -> None:
    matrix = torch.ones(300, 300)
    assert release_threads() == bool(openmp_functions("omp_pause_resource_all"))
    assert float((matrix @ matrix).sum()) == 300.0**3


@pytest.mark.parametrize(
    ("config", "is_stateful", "reason"),
    [
        ({}, False, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False, None),
        ({"layer_types": ["full_attention", "linear_attention"]}, True, "of linear_attention"),
        ({"layer_types": None}, True, "that keep a state"),
        ({"qk_head_dim": 24, "v_head_dim": 24}, False, None),
        ({"qk_head_dim": 24, "v_head_dim": 16}, False, "keys 24 wide beside values 16 wide"),
    ],
)
def test_why_caches_cannot_be_held(
    config: dict[str, object], is_stateful: bool, reason: str | None
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config), _is_stateful=is_stateful)
    found = batching_reason(model)
    assert found is None if reason is None else found is not None and found.endswith(reason)


def test_a_tokenizer_beyond_the_embedding_is_named_before_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Numbers:
        bos_token_id = 1

        def __init__(self, added: dict[int, str], starts: int = 1) -> None:
            self.added_tokens_decoder, self.starts = added, starts

        def get_vocab(self) -> dict[str, int]:
            return {str(number): number for number in range(12)}

        def __call__(self, _text: str) -> dict[str, list[int]]:
            return {"input_ids": [1] * self.starts + [2]}

    check_tokens(Numbers({}), 12)
    with pytest.raises(LeanMoeError, match="token ids up to 11, the model's embedding 8 rows"):
        check_tokens(Numbers({}), 8)
    assert capsys.readouterr().err == ""
    check_tokens(Numbers({10: "<a>", 11: "<b>"}), 10)
    assert "2 added tokens of the tokenizer (ids from 10)" in capsys.readouterr().err
    check_tokens(Numbers({}, 2), 12)
    assert "puts its start token in front of a text twice" in capsys.readouterr().err


def test_an_added_token_beyond_the_embedding_is_named_where_a_text_holds_it() -> None:
    table = torch.nn.Embedding(10, 2)
    table.register_forward_pre_hook(require_rows)
    assert table(torch.tensor([[9]])).shape == (1, 1, 2)
    with pytest.raises(LeanMoeError, match="the text has token id 10, an added token beyond"):
        table(torch.tensor([[3, 10]]))


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
    monkeypatch.setattr(module, "_is_experts", lambda _: False)
    with pytest.raises(LeanMoeError, match=r"MoE layers were found at \[\]"):
        load_model(name)


def test_a_multimodal_model_that_no_class_loads_as_text(tmp_path: Path) -> None:
    outer: Any = CONFIG_MAPPING["qwen3_vl_moe"]
    outer(architectures=["Qwen3VLMoeForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(LeanMoeError, match="no class that loads qwen3_vl_moe"):
        load_model(str(tmp_path))
