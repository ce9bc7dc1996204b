"""Quantised checkpoints: scales, blocks and biases go with their experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leanmoe.models.hf_config import FILE
from leanmoe.models.shards import SINGLE
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.criteria import Kept
from tests import tiny

EACH = 3


def as_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts' weights in fp8 with a scale for each block, as DeepSeek-V3 publishes them."""
    found = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name and name.endswith(".weight"):
            found[name] = tensor.to(torch.float8_e4m3fn)
            found[name + "_scale_inv"] = torch.rand(2, 2)
        else:
            found[name] = tensor
    return found


def as_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts' weights in blocks of 4 bits with a scale for each, as gpt-oss is published."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, _, out = tensor.shape
            found[name + "_blocks"] = torch.randint(256, (experts, out, 2, 16), dtype=torch.uint8)
            found[name + "_scales"] = torch.randint(256, (experts, out, 2), dtype=torch.uint8)
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("family", "quantised", "wanted"),
    [
        ("deepseek_v3", as_fp8, "experts.2.down_proj.weight_scale_inv"),
        ("gpt_oss", as_mxfp4, "experts.gate_up_proj_scales"),
    ],
)
def test_everything_of_an_expert_goes_with_it(
    family: str, quantised: object, wanted: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    full, out = tmp_path / "full", tmp_path / "pruned"
    tiny.build(family).save_pretrained(full)
    assert callable(quantised)
    before = quantised(load_file(full / SINGLE))
    save_file(before, full / SINGLE, metadata={"format": "pt"})
    config = json.loads((full / FILE).read_text())
    config["quantization_config"] = {"quant_method": "fp8" if family != "gpt_oss" else "mxfp4"}
    (full / FILE).write_text(json.dumps(config))
    source = read_source(full)
    kept: Kept = tuple(
        tuple(sorted(4 * group + (layer + n) % 4 for group in range(4) for n in range(EACH)))
        for layer in range(len(source.shape.moe_layers))
    )
    write_pruned(source, kept, out, {}, lambda _: None)
    after = load_file(out / SINGLE)
    assert any(name.endswith(wanted) for name in after)
    changed = 0
    for name, tensor in after.items():
        part = source.parts.get(name)
        if part is None:
            assert torch.equal(tensor, before[name])
            continue
        changed += 1
        experts = list(kept[source.shape.moe_layers.index(part.decoder_index)])
        if part.kind == "numbered":
            assert part.expert is not None
            old = name.replace(f".experts.{part.expert}.", f".experts.{experts[part.expert]}.")
            assert torch.equal(tensor.view(torch.uint8), before[old].view(torch.uint8))
        else:
            axis = 0 if part.kind == "first_axis" else -1
            assert torch.equal(tensor, before[name].index_select(axis, torch.tensor(experts)))
    assert changed >= len(source.shape.moe_layers) * 5
    assert (
        json.loads((out / FILE).read_text())["quantization_config"] == config["quantization_config"]
    )
