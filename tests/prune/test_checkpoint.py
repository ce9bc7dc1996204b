"""Pruned checkpoints: stock Transformers runs them as the full model runs under the plan."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from leanmoe import apply
from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import FAMILIES
from leanmoe.models.hf_config import FILE
from leanmoe.models.shape import MoEShape
from leanmoe.models.shards import INDEX, SINGLE
from leanmoe.prune import checkpoint
from leanmoe.prune.checkpoint import RECORD, STATE, read_source, write_pruned
from leanmoe.prune.criteria import Kept, as_plan
from leanmoe.runtime import shape_of
from tests import tiny

NOT_BUILT = {"kimi_k2", "step3p5"}
"""Runs as deepseek_v3, and within a model with images alone: Transformers builds neither alone."""
REFUSED = {"deepseek_v4", "longcat_flash"}
"""A checkpoint with fewer of their experts cannot be written."""
NO_ROUND_TRIP = {"bailing_hybrid", "glm4v_moe_text", "mimo_v2_flash", "mistral4"}
"""Transformers cannot load these again as it saved them, so tiny: unpruned ones neither."""
BUILT = sorted(
    n for n, family in FAMILIES.items() if not family.not_runnable and n not in NOT_BUILT
)
RUN = [family for family in BUILT if family not in NO_ROUND_TRIP | REFUSED]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def keep_some(shape: MoEShape, each: int = 3) -> Kept:
    """In each of 4 groups 3 experts, others in every layer."""
    return tuple(
        tuple(4 * group + (layer + n) % 4 for group in range(4) for n in range(each))
        for layer in range(len(shape.moe_layers))
    )


def sorted_kept(shape: MoEShape) -> Kept:
    return tuple(tuple(sorted(experts)) for experts in keep_some(shape))


def saved(family: str, folder: Path, shard: str = "5GB") -> Any:
    model = tiny.build(family)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder: Path, model: Any) -> Any:
    kind = AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModel
    if type(model).__name__ == "Qwen3OmniMoeThinkerTextModel":
        kind = type(model)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def output(model: Any) -> torch.Tensor:
    found = model(input_ids=IDS)
    result: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return result


def prune(source: Path, folder: Path, kept: Kept) -> None:
    write_pruned(read_source(source), kept, folder, {"criterion": "test"}, lambda _: None)


@pytest.mark.parametrize("family", RUN)
def test_a_pruned_checkpoint_is_the_model_under_the_plan(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "full")
    source = read_source(tmp_path / "full")
    kept = sorted_kept(source.shape)
    prune(tmp_path / "full", tmp_path / "pruned", kept)
    pruned = load(tmp_path / "pruned", model)
    with apply(model, as_plan(kept, source.shape)):
        masked = output(model)
    torch.testing.assert_close(output(pruned), masked, rtol=0, atol=2e-6)
    assert not torch.allclose(output(model), masked)
    config = json.loads((tmp_path / "pruned" / FILE).read_text())
    assert set(config) == set(json.loads((tmp_path / "full" / FILE).read_text()))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_of_which_no_checkpoint_can_be_written(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "full")
    kept = sorted_kept(read_source(tmp_path / "full").shape)
    with pytest.raises(LeanMoeError, match=f"{family} has .* set --as-plan"):
        prune(tmp_path / "full", tmp_path / "pruned", kept)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("family", sorted(NO_ROUND_TRIP))
def test_tensors_are_the_sources_own_rows(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "full")
    source = read_source(tmp_path / "full")
    kept = sorted_kept(source.shape)
    prune(tmp_path / "full", tmp_path / "pruned", kept)
    with (
        safe_open(tmp_path / "full" / SINGLE, "pt") as full,
        safe_open(tmp_path / "pruned" / SINGLE, "pt") as pruned,
    ):
        for name in pruned.keys():  # noqa: SIM118, no mapping
            part = source.parts.get(name)
            if part is None:
                assert torch.equal(pruned.get_tensor(name), full.get_tensor(name))
                continue
            experts = list(kept[source.shape.moe_layers.index(part.decoder_index)])
            if part.kind == "numbered":
                assert part.expert is not None
                old = name.replace(f".experts.{part.expert}.", f".experts.{experts[part.expert]}.")
                assert torch.equal(pruned.get_tensor(name), full.get_tensor(old))
            else:
                whole = full.get_tensor(name)
                axis = 0 if part.kind == "first_axis" else -1
                wanted = whole.index_select(axis, torch.tensor(experts))
                assert torch.equal(pruned.get_tensor(name), wanted)


def test_a_head_for_several_tokens_is_left_out_whole(tmp_path: Path) -> None:
    model = saved("qwen3_next", tmp_path / "full")
    path = tmp_path / "full" / SINGLE
    trunk = load_file(path)
    head = {
        "mtp." + name.removeprefix("model.").replace("layers.3", "layers.0"): tensor.clone()
        for name, tensor in trunk.items()
        if name.startswith("model.layers.3.")
    }
    save_file({**trunk, **head, "mtp.norm.weight": torch.ones(32)}, path, {"format": "pt"})
    config = json.loads((tmp_path / "full" / FILE).read_text())
    (tmp_path / "full" / FILE).write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}))
    kept = sorted_kept(read_source(tmp_path / "full").shape)
    prune(tmp_path / "full", tmp_path / "pruned", kept)
    assert not [name for name in load_file(tmp_path / "pruned" / SINGLE) if "mtp" in name]
    assert json.loads((tmp_path / "pruned" / FILE).read_text())["mtp_num_hidden_layers"] == 0
    with apply(model, as_plan(kept, read_source(tmp_path / "full").shape)):
        masked = output(model)
    pruned = load(tmp_path / "pruned", model)
    torch.testing.assert_close(output(pruned), masked, rtol=0, atol=2e-6)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    saved("glm4_moe", tmp_path / "full", "20KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 3
    return tmp_path / "full"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_and_index_fit_together(sharded: Path, tmp_path: Path) -> None:
    before = contents(sharded)
    source = read_source(sharded)
    prune(sharded, tmp_path / "out", sorted_kept(source.shape))
    assert contents(sharded) == before, "the source was touched"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    found: dict[str, str] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= dict.fromkeys(shard.keys(), path.name)
    assert found == index["weight_map"]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["criterion"] == "test"
    assert len(record["kept"]) == len(source.shape.moe_layers)
    assert not (tmp_path / "out" / STATE).exists()


def test_an_interrupted_run_does_not_load_and_goes_on(sharded: Path, tmp_path: Path) -> None:
    source, out = read_source(sharded), tmp_path / "out"
    kept = sorted_kept(source.shape)
    done: list[Any] = []
    real = checkpoint._write_shard

    def stop_at_third(*arguments: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[1])
        real(*arguments)

    with patch.object(checkpoint, "_write_shard", stop_at_third), pytest.raises(KeyboardInterrupt):
        prune(sharded, out, kept)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    times = {path: path.stat().st_mtime_ns for path in done}
    prune(sharded, out, kept)
    assert {path: path.stat().st_mtime_ns for path in done} == times, "finished shards were redone"
    fresh = tmp_path / "fresh"
    prune(sharded, fresh, kept)
    assert contents(out) == contents(fresh)


def test_an_unfinished_run_with_other_settings_is_not_gone_on_with(
    sharded: Path, tmp_path: Path
) -> None:
    source, out = read_source(sharded), tmp_path / "out"
    kept = sorted_kept(source.shape)
    with (
        patch.object(checkpoint, "_write_shard", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        prune(sharded, out, kept)
    other = (tuple(e for e in range(16) if e % 4 < 3), *kept[1:])
    if other == kept:
        other = (tuple(e for e in range(16) if e % 4 > 0), *kept[1:])
    with pytest.raises(LeanMoeError, match="other settings"):
        prune(sharded, out, other)


def test_bad_sources_are_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    with pytest.raises(LeanMoeError, match=f"{shards[1].name} is truncated"):
        read_source(sharded)
    shards[1].write_bytes(b"12")
    with pytest.raises(LeanMoeError, match=f"{shards[1].name} is damaged"):
        read_source(sharded)
    shards[1].unlink()
    with pytest.raises(LeanMoeError, match=f"{shards[1].name} of the checkpoint is missing"):
        read_source(sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(LeanMoeError, match="no plain file name"):
        read_source(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(LeanMoeError, match=f"neither {INDEX} nor {SINGLE}"):
        read_source(sharded)


def test_an_output_that_exists_is_left_alone(sharded: Path, tmp_path: Path) -> None:
    kept = sorted_kept(read_source(sharded).shape)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(LeanMoeError, match="exists and is not empty"):
        prune(sharded, out, kept)
    assert contents(out) == {"mine.txt": b"mine"}
    with pytest.raises(LeanMoeError, match="is the source itself"):
        prune(sharded, sharded, kept)


def test_too_little_space_is_said_before_anything_is_written(sharded: Path, tmp_path: Path) -> None:
    kept = sorted_kept(read_source(sharded).shape)
    little = shutil._ntuple_diskusage(10, 9, 1)
    with (
        patch.object(shutil, "disk_usage", return_value=little),
        pytest.raises(LeanMoeError, match=r"needs [1-9][\d.]* kB in .*, where 1 B are free"),
    ):
        prune(sharded, tmp_path / "out", kept)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (((0, 1, 4, 5, 8, 9, 12, 13), (0, 1, 4, 5)), "keep 4 to 8 experts"),
        (((0, 1, 2, 5, 8, 9, 12, 13),) * 3, "must be equal"),
        (((0, 4, 8, 12),) * 3, "leaves 2 in the 2 groups"),
    ],
)
def test_what_stock_engines_cannot_run_is_refused(
    sharded: Path, tmp_path: Path, kept: Kept, message: str
) -> None:
    layers = len(read_source(sharded).shape.moe_layers)
    kept = (*kept, *kept[-1:] * layers)[:layers]
    with pytest.raises(LeanMoeError, match=message):
        prune(sharded, tmp_path / "out", kept)
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """64 MB of weights in shards of 4 MB: a few shards more than before, not all of them."""
    wide = {"hidden_size": 512, "moe_intermediate_size": 192}
    with patch.dict(tiny.SIZES, wide):
        saved("glm4_moe", tmp_path / "full", "4MB")
    source = read_source(tmp_path / "full")
    assert sum(source.bytes.values()) > 50e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_pruned(source, sorted_kept(source.shape), tmp_path / "out", {}, lambda _: None)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 24e6


def test_whatever_counts_heads_that_are_left_out_says_none() -> None:
    shape = shape_of(tiny.build("glm4_moe"))
    counts = {"num_nextn_predict_layers": 1, "mtp_num_layers": 2, "num_mtp_layers": 1}
    others = {"mtp_loss_scaling_factor": 0.1, "num_experts_per_tok": 4}
    found = checkpoint.pruned_config({**counts, **others, "use_mtp": True}, shape, 8, {})
    assert found == {**dict.fromkeys(counts, 0), **others, "use_mtp": False}


def test_counts_of_experts_that_are_lists_change_in_each_place() -> None:
    config = {"moe_num_experts": [16, 8], "text_config": {"num_experts": [1, 16, 16]}}
    shape = shape_of(tiny.build("glm4_moe"))
    found = checkpoint.pruned_config(config, shape, 8, {})
    assert found == {"moe_num_experts": [8, 8], "text_config": {"num_experts": [1, 8, 8]}}
