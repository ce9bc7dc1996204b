"""Configs are read from folders, files and the Hub, and what is none is refused."""

from __future__ import annotations

import json
import logging
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.shape import read_shape
from tests.published import MODELS

QWEN3 = MODELS["Qwen/Qwen3-30B-A3B"].config


def test_a_multimodal_models_language_part_is_read() -> None:
    text = {**QWEN3, "model_type": "qwen3_vl_moe_text"}
    del text["architectures"], text["tie_word_embeddings"]
    outer = {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"hidden_size": 1152},
    }
    shape = read_shape(outer)
    assert shape.architecture == "Qwen3VLMoeForConditionalGeneration"
    assert shape.total_parameters() == read_shape(QWEN3).total_parameters()


def test_folders_and_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3))
    assert read_shape(tmp_path) == read_shape(str(file)) == read_shape(QWEN3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no model_type"),
        (None, "has no config.json: it is not a model's folder"),
    ],
)
def test_bad_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LeanMoeError, match=message):
        read_shape(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "./none/here", "nonsense", "", "a/b.json"])
def test_what_is_neither_file_nor_hub_name(source: str) -> None:
    with pytest.raises(LeanMoeError, match=r"does not exist: give a folder, a config\.json"):
        read_shape(source)


def test_hub_names_stay_off_the_network_where_it_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LeanMoeError, match="not in the local cache, and HF_HUB_OFFLINE forbids"):
        read_shape("nobody/nothing")


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        (False, r"could not be fetched: 404 for nobody/nothing$"),
        (True, r"and https://\S+ cannot be reached to look for it$"),
    ],
)
def test_hub_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offline: bool,
    message: str,
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name: str, _file: str, local_files_only: bool = False) -> str:
        if not local_files_only:
            logger.warning("Retrying in 8s")
        if local_files_only or offline:
            raise LocalEntryNotFoundError("not cached")
        raise OSError(f"404 for {name}\nand more lines")

    logger = logging.getLogger("huggingface_hub.utils._http")
    level, shown = logger.getEffectiveLevel(), MemoryHandler(100)
    monkeypatch.setattr(logger, "handlers", [shown])
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(LeanMoeError, match=message):
        read_shape("nobody/nothing")
    assert "fetching config.json of nobody/nothing from https://" in capsys.readouterr().err
    assert not shown.buffer  # the client's lines about each try
    assert logger.getEffectiveLevel() == level


def test_openais_own_key_and_mimos_second_one_are_read() -> None:
    assert HfConfig({"experts_per_token": 4}).whole("num_experts_per_tok") == 4
    assert HfConfig({"sliding_window_size": 128}).whole("sliding_window") == 128
