"""Every tile that comes with leanmoe computes what it should, on the GPU at hand.

Compilers err: a program may be right in the interpreter and wrong on a GPU, with one tile and not
with another. Layers have the shipped widths and fewer experts, with as many rows each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights
from leanmoe.kernels.triton import tuned_tiles as module
from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.tune_tiles import MOST_ERROR, error_of, random_call, random_weights
from leanmoe.kernels.triton.tuned_tiles import (
    SHIPPED,
    Bucket,
    Shape,
    Tuned,
    capability_of,
    config_for,
    file_name,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
EXPERTS = 16
SMALL = Shape(8, 256, 128, 2, "float16")


def shipped() -> Iterator[tuple[str, Tuned, int, ExpertsConfig]]:
    """Each config of each file once, with the most tokens it was found for."""
    for path in sorted(SHIPPED.glob("*.json")):
        tuned = Tuned.load(path)
        most = {bucket.config: bucket.tokens for bucket in tuned.buckets}
        for config, tokens in most.items():
            yield f"{path.stem}-{tokens}", tuned, tokens, config


CASES = list(shipped())


@lru_cache(maxsize=1)
def layer(shape: Shape) -> ExpertWeights:
    return random_weights(shape)


@needs_gpu
@pytest.mark.parametrize(("tuned", "tokens", "config"), [case[1:] for case in CASES], ids=[
    case[0] for case in CASES
])  # fmt: skip
def test_a_shipped_tile_computes_what_it_should(
    tuned: Tuned, tokens: int, config: ExpertsConfig
) -> None:
    if tuned.capability != capability_of():
        pytest.skip(f"tiles of compute capability {tuned.capability}, this GPU has another")
    shape = replace(tuned.shape, experts=EXPERTS)
    few = tokens if config.is_direct else max(EXPERTS, tokens * EXPERTS // tuned.shape.experts)
    for number in {few, max(1, few * 3 // 4)}:
        error = error_of(config, layer(shape), random_call(shape, number, number))
        assert error <= MOST_ERROR[shape.dtype], f"{error:.1%} off at {number} tokens"


def test_a_users_own_config_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(SMALL, "cpu")
    mine = ExpertsConfig(16, 0, False, Tile(32, 32), Tile(16, 64))
    tuned = Tuned("interpreter", "", SMALL, (Bucket(64, mine),), {})
    (tmp_path / file_name("interpreter", SMALL)).write_text(json.dumps(tuned.to_json()))
    monkeypatch.setenv("LEANMOE_TUNED", str(tmp_path))
    module._find.cache_clear()
    assert config_for(weights, 3, 2) == mine
    assert config_for(weights, 3, 1) == mine, "fewer slots: the nearest there is"
    monkeypatch.delenv("LEANMOE_TUNED")
    module._find.cache_clear()
    assert config_for(weights, 3, 2) != mine


def test_a_gpu_nobody_tuned_takes_the_tiles_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(gpu: str, capability: str, slots: int) -> None:
        shape = replace(SMALL, slots=slots)
        found = Tuned(gpu, capability, shape, (Bucket(64, ExpertsConfig()),), {})
        (tmp_path / file_name(gpu, shape)).write_text(json.dumps(found.to_json()))

    keep("NVIDIA H200", "9.0", 2)
    keep("NVIDIA A100", "8.0", 2)
    monkeypatch.setenv("LEANMOE_TUNED", str(tmp_path))
    module._find.cache_clear()
    found = module._find("NVIDIA H100", "9.0", SMALL)
    assert found is not None
    assert found.gpu == "NVIDIA H200"
    assert module._find("NVIDIA L4", "8.9", SMALL) is None
    keep("NVIDIA H100", "9.0", 4)
    module._find.cache_clear()
    found = module._find("NVIDIA H100", "9.0", SMALL)
    assert found is not None
    assert (found.gpu, found.shape.slots) == ("NVIDIA H100", 4)
    module._find.cache_clear()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda p: p.name)
def test_shipped_files_are_whole(path: Path) -> None:
    tuned = Tuned.load(path)
    assert path.name == file_name(tuned.gpu, tuned.shape)
    assert {"date", "commit", "versions", "microseconds"} <= set(tuned.provenance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leanmoe_kernels": 1}, "tuned-kernels file .*x.json has schema version 1: .* reads 2"),
        ({"buckets": []}, "they must ascend"),
        ({"buckets": [{"tokens": 1}]}, "config is missing"),
        ({"shape": {"experts": 1}}, "hidden is missing"),
        ({"buckets": [{"tokens": 1, "config": {"BLOCK_X": 16}}]}, "unknown field 'BLOCK_X'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps(
            {**Tuned("g", "9.0", SMALL, (Bucket(1, ExpertsConfig()),), {}).to_json(), **change}
        )
    )
    with pytest.raises(LeanMoeError, match=message):
        Tuned.load(path)


def test_a_shape_of_any_number_of_slots_names_none() -> None:
    assert str(SMALL) == "8 experts of 256 x 128 in float16, 2 slots a token"
    assert str(replace(SMALL, slots=0)) == "8 experts of 256 x 128 in float16"
