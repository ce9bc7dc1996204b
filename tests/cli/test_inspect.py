"""`leanmoe inspect`: what it prints, at two widths, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from leanmoe import cli
from leanmoe.models.shape import read_shape
from tests.published import MODELS


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    return out


@pytest.fixture
def deepseek(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["deepseek-ai/DeepSeek-V3"].config))
    return str(tmp_path)


def test_json(capsys: pytest.CaptureFixture[str], deepseek: str) -> None:
    found: dict[str, Any] = json.loads(
        inspect(capsys, deepseek, "--json", "--batch-sizes", "1,32,4096", "--bandwidth", "4800")
    )
    shape = read_shape(deepseek)
    assert found["label"] == "modelled"
    assert found["expert_width"] == 2048
    assert found["total_parameters"] == shape.total_parameters()
    assert found["total_bytes"] == shape.total_bytes()
    assert found["active_bytes"] == shape.decode_bytes(8) == found["steps"][0]["bytes"]
    one, some, many = found["steps"]
    assert one["distinct"] == pytest.approx(8)
    assert one["tokens_an_expert"] == pytest.approx(1)
    assert one["bytes"] == pytest.approx(shape.decode_bytes(8))
    assert one["milliseconds"] == pytest.approx(shape.decode_bytes(8) / 4800e9 * 1e3)
    assert one["gain"]["4"] == pytest.approx(shape.decode_bytes(8) / shape.decode_bytes(4))
    assert some["distinct_if_groups_agree"] < some["distinct"] < 256
    assert many["gain"] == pytest.approx({"6": 1, "4": 1, "2": 1})


def test_models_known_here_are_shown_without_a_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, deepseek: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "deepseek-ai/DeepSeek-V3", "--json"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err.count("\n")) == (0, 1)
    assert "nothing is fetched" in err
    here, published = json.loads(out), json.loads(inspect(capsys, deepseek, "--json"))
    assert {**here, "model": ""} == {**published, "model": ""}


def test_gain_is_large_where_few_experts_are_active_and_gone_where_all_are(
    capsys: pytest.CaptureFixture[str], deepseek: str
) -> None:
    steps = json.loads(inspect(capsys, deepseek, "--json"))["steps"]
    gains = {step["tokens"]: step["gain"]["4"] for step in steps}
    assert list(gains) == [2**n for n in range(13)]
    assert gains[1] > 1.3
    assert gains[8] > gains[1]
    assert gains[512] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_the_terminal_and_says_what_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, deepseek: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = inspect(capsys, deepseek, "--bandwidth", "4800")
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    text = " ".join(out.split())
    for words in (
        "61, 58 of them with experts",
        "256 a layer, 8 a token, 1 shared; from 4 of 8 groups",
        "sigmoid, a bias ranks, weights normalised, times 2.5",
        "width 2048, 44.0 M parameters, 44.1 MB (fp8)",
        "671 B, 37.6 B active",
        "Modelled: tokens choose experts independently and evenly",
        "every token of a step uses the same groups",
    ):
        assert words in text


def test_steps_bound_by_compute_show_no_gain(capsys: pytest.CaptureFixture[str]) -> None:
    out = inspect(capsys, "reference", "--batch-sizes", "1024,2048")
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1024"], ["2048"])]
    assert rows[0][-3:] == ["+0%"] * 3
    assert rows[1][-3:] == ["–"] * 3


def test_the_model_that_ships_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys) == inspect(capsys, "reference")


def test_a_family_without_plans_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = CONFIG_MAPPING["phimoe"]().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    assert "No plan can run on phimoe: its router" in inspect(capsys, str(tmp_path))


def test_layers_without_a_score_to_rank_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """DeepSeek-V4's first layers look experts up: lower k leaves what they read as it is."""
    config = MODELS["deepseek-ai/DeepSeek-V4-Flash"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = " ".join(inspect(capsys, str(tmp_path)).split())
    assert "43, 43 of them with experts" in text
    assert "Layers 0 to 2 pick experts by token id, from a table" in text
    found = json.loads(inspect(capsys, str(tmp_path), "--json", "--batch-sizes", "1"))
    assert (found["hash_layers"], len(found["moe_layers"])) == ([0, 1, 2], 40)
    shape = read_shape(config)
    lower = found["steps"][0]["bytes"] / found["steps"][0]["gain"]["3"]
    saved = 40 * 3 * shape.expert_bytes
    assert shape.decode_bytes(6) - lower == pytest.approx(saved)


def test_experts_that_are_the_identity_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = MODELS["meituan-longcat/LongCat-Flash-Chat"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = " ".join(inspect(capsys, str(tmp_path)).split())
    assert "768 a layer, 12 a token, 2 shared; 256 are the identity, without weights" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-sizes", "1,x"), "--batch-sizes is '1,x': it must be numbers like 1,8,32"),
        (("--batch-sizes", "0"), "--batch-sizes is '0': it holds 0, and each must be 1 or more"),
        (("--bandwidth", "0"), "--bandwidth is 0: it must be above 0"),
        (("--bandwidth", "nan"), "--bandwidth is nan: it must be above 0"),
        (("nonsense",), "model 'nonsense' does not exist: give a folder"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", *arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (1, "")
    assert err.startswith(f"leanmoe: {message}")
    assert err.count("\n") == 1


def test_bytes_that_cannot_be_told_are_not_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = MODELS["Qwen/Qwen3-30B-A3B"].config
    changed = {**config, "quantization_config": {"quant_method": "new"}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    shown = " ".join(inspect(capsys, str(tmp_path)).split())
    assert "cannot be told: quantization_config: quant_method 'new' is not known" in shown
    assert "GB" not in shown
    facts = json.loads(inspect(capsys, str(tmp_path), "--json"))
    assert facts["expert_bytes"] is None
    assert "bytes" not in facts["steps"][0]


def test_a_model_that_transformers_cannot_load_as_text_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    part = {**MODELS["Qwen/Qwen3-30B-A3B"].config, "model_type": "qwen3_vl_moe_text"}
    config = {"model_type": "qwen3_vl_moe", "text_config": part}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = " ".join(inspect(capsys, str(tmp_path)).split())
    assert "no class that loads qwen3_vl_moe as a language model" in shown
