"""The tuner without a GPU: what it tries, picks and writes; times are made up."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmoe.cli import main
from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton import tune_tiles
from leanmoe.kernels.triton.config import ExpertsConfig
from leanmoe.kernels.triton.experts import experts_gpu
from leanmoe.kernels.triton.launch import ExpertsCall
from leanmoe.kernels.triton.tune_tiles import Tuner, random_call, random_weights
from leanmoe.kernels.triton.tuned_tiles import Shape, Tuned, file_name
from tests.kernels.triton.routed import DEVICE

SMALL = Shape(8, 256, 128, 2, "float16")


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that compiles nothing and times in order: later calls are faster."""
    seen: list[str] = []

    def time_calls(*_: Any, is_rough: bool = False) -> float:
        seen.append("rough" if is_rough else "careful")
        return 1000.0 - len(seen)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_tiles, "time_calls", time_calls)
    monkeypatch.setattr(tune_tiles, "_compile", lambda *_: None)
    monkeypatch.setattr(tune_tiles, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    monkeypatch.setattr(
        tune_tiles, "random_weights", lambda shape, device=DEVICE: random_weights(shape, device)
    )
    monkeypatch.setattr(
        tune_tiles, "random_call", lambda shape, size, seed: random_call(shape, size, seed, DEVICE)
    )
    return seen


def test_finds_a_config_for_every_number_of_tokens(pretending: list[str]) -> None:
    stages: list[str] = []
    tuner = Tuner([SMALL, SMALL], [4, 1, 1], lambda s, *_: stages.append(s))
    for shape, found in tuner.tune():
        assert shape == SMALL
        assert [tokens for tokens, _, _ in found] == [1, 4]
        for tokens, config, _ in found:
            assert not config.is_direct or tokens <= config.BLOCK_M
    assert {"rough", "careful"} == set(pretending)
    assert any(stage.startswith("compiling") for stage in stages)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_all_that_is_timed_was_compiled_ahead(
    pretending: list[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A program that was not is compiled while its turn to be timed has come: seconds for each."""
    compiled: set[str] = set()
    launched: set[str] = set()

    def named(seen: set[str]) -> Any:
        def run(_: Any, program: Any, __: Any, *arguments: Any, **options: Any) -> None:
            fixed = [each for each in arguments if isinstance(each, dict)]
            seen.add(f"{program.__name__} {fixed} {sorted(options.items())}")

        return run

    def compile_(shape: Shape, tokens: int, config: ExpertsConfig, product: str) -> None:
        call = tune_tiles._compiled_call(shape, tokens, config)
        blocks = () if config.is_direct else tune_tiles._empty_blocks()
        (call.first_product if product == tune_tiles.FIRST else call.second_product)(*blocks)

    def time_calls(calls: Any, **_: Any) -> float:
        if getattr(calls[0], "func", None) is None:  # a product, not the whole op
            calls[0]()
        pretending.append("x")
        return 1000.0 - len(pretending)

    monkeypatch.setattr(tune_tiles, "_compile", compile_)
    monkeypatch.setattr(tune_tiles, "time_calls", time_calls)
    monkeypatch.setattr(tune_tiles._Compiled, "run", named(compiled))
    monkeypatch.setattr(ExpertsCall, "run", named(launched))
    monkeypatch.setattr(tune_tiles, "error_of", lambda *_: 0.0)
    shape = Shape(8, 512, 256, 2, dtype)
    assert len(list(Tuner([shape], [1, 40, 700], lambda *_: None).tune())) == 1
    assert launched
    assert launched <= compiled


def test_a_tile_that_fails_does_not_end_the_search(
    pretending: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> float:
        pretending.append("x")
        if len(pretending) % 3 == 0:
            raise RuntimeError("out of shared memory")
        return float(len(pretending))

    monkeypatch.setattr(tune_tiles, "time_calls", fails)
    tuner = Tuner([SMALL], [1], lambda *_: None)
    assert len(list(tuner.tune())) == 1
    assert any("out of shared memory" in failure for failure in tuner.failures)


@pytest.mark.usefixtures("pretending")
def test_a_config_that_is_too_far_off_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts_gpu

    def miscompiled(*call: Any, config: ExpertsConfig) -> torch.Tensor:
        return right(*call, config=config) * (1.02 if config.fused_sum else 1.0)

    monkeypatch.setattr(tune_tiles, "experts_gpu", miscompiled)
    tuner = Tuner([SMALL], [1], lambda *_: None)
    ((_, [(_, config, _)]),) = list(tuner.tune())
    assert not config.fused_sum
    ((_, [(_, config, _)]),) = list(Tuner([SMALL], [1], lambda *_: None, most_error=0.03).tune())
    assert config.fused_sum  # tried last, and later calls are faster
    assert "2.0% off float64, 1.0% is the most" in tuner.failures
    monkeypatch.setattr(tune_tiles, "experts_gpu", lambda hidden, *_, **__: hidden * float("nan"))
    with pytest.raises(LeanMoeError, match="nan% off float64"):
        list(tuner.tune())


@pytest.mark.usefixtures("pretending")
def test_writes_a_file_that_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    command = ["kernels", "tune", "--shape", "8,256,128,2", "--dtype", "float16"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--tokens", "1,8", "-o", str(tmp_path), "--json"])
    assert not stopped.value.code
    printed = json.loads(capsys.readouterr().out)
    path = tmp_path / file_name("Some GPU", SMALL)
    assert [entry["file"] for entry in printed["written"]] == [str(path)]
    tuned = Tuned.load(path)
    assert tuned.shape == SMALL
    assert tuned.nearest(5) == tuned.buckets[1].config
    assert tuned.nearest(500) == tuned.buckets[1].config
    assert tuned.provenance["commit"]
