"""The table against Transformers: each family's own router, its layers and its weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import CONFIG_MAPPING

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import FAMILIES, family_of
from leanmoe.models.family import REFUSED
from leanmoe.models.hf_config import COUNT_OF_EXPERTS
from leanmoe.models.shape import read_shape
from leanmoe.plan import Rule
from leanmoe.routing import route
from leanmoe.runtime import MoELayer, find_layers, shape_of
from leanmoe.runtime.model import decoder_layers
from tests import tiny

HERE = sorted(name for name in FAMILIES if name in CONFIG_MAPPING)


NOT_TEXT = {"dots3_note_vision_encoder", "vitpose_backbone"}


RUNNABLE = [name for name in HERE if FAMILIES[name].not_runnable is None]


def logits_of(output: Any) -> Tensor:
    """A router's logits; Granite's came after its ids and weights before Transformers 5.23."""
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output[0] if output[0].is_floating_point() else output[-1]
    return logits


def routed(model: Any, dtype: torch.dtype) -> list[tuple[MoELayer, Tensor, Tensor, Tensor]]:
    """Each MoE layer with its router's logits, and the ids and weights its experts were given."""
    seen = []
    generator = torch.Generator().manual_seed(5)
    for layer in find_layers(model):
        logits: list[Tensor] = []
        given: list[Tensor] = []
        hooks = (
            layer.logits_source(shape_of(model).router).register_forward_hook(
                lambda _module, _inputs, output, logits=logits: logits.append(logits_of(output))
            ),
            layer.experts.register_forward_pre_hook(
                lambda _module, inputs, given=given: given.extend(inputs)
            ),
        )
        hidden_BTD = torch.randn(1, 64, shape_of(model).hidden, generator=generator)
        with torch.inference_mode():
            if layer.block in decoder_layers(model):  # Gemma 4's router stands in the layer itself
                model(input_ids=torch.randint(64, (1, 64), generator=generator))
            else:
                layer.block(hidden_BTD.to(dtype))
        for hook in hooks:
            hook.remove()
        _hidden_TD, ids_TK, weights_TK = given
        seen.append((layer, logits[0].flatten(0, -2), ids_TK, weights_TK))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", RUNNABLE)
def test_router_is_the_familys_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    if family == "aria_text" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its router is a plain linear layer in this Transformers")
    model = tiny.build(family, dtype)
    shape = shape_of(model)
    for layer, logits_TE, ids_TK, weights_TK in routed(model, dtype):
        bias_E = layer.ranking_bias(shape.router)
        found = route(logits_TE, shape.router, shape.top_k, Rule(), bias_E)
        weights_BTK = found.weights_BTK
        if (scale_E := layer.expert_scale(shape.router)) is not None:
            weights_BTK = weights_BTK * scale_E[found.ids_BTK]
        assert torch.equal(found.ids_BTK, ids_TK)
        assert torch.equal(weights_BTK.to(weights_TK.dtype), weights_TK)


@pytest.mark.parametrize("family", HERE)
def test_layers_and_weights_are_those_transformers_builds(family: str) -> None:
    model = tiny.build(family, device="meta")
    shape = shape_of(model)
    owners = [
        re.search(r"layers\.(\d+)\..*(?<!shared_)experts\.", name)
        for name, _ in model.named_parameters()
    ]
    routed = sorted({int(owner[1]) for owner in owners if owner})
    assert sorted(shape.moe_layers + shape.hash_layers) == routed
    tensors = dict(model.named_parameters())
    if shape.router.ranking_bias:
        tensors |= {
            name: tensor
            for name, tensor in model.named_buffers()
            if name.endswith(shape.router.ranking_bias)
        }
    head = 0 if model.get_output_embeddings() is not None else shape.parameters.head
    there = sum(t.numel() for t in tensors.values())
    # Transformers' LongCat has room for up-projections of identities; checkpoints have none.
    unused = 2 * shape.expert_width * shape.hidden * shape.router.zero_experts
    assert shape.total_parameters() - head == there - unused * len(shape.moe_layers)


@pytest.mark.parametrize("family", HERE)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str) -> None:
    """A config.json of sizes alone, against the same with every default written out."""
    kind = CONFIG_MAPPING[family]
    sizes: dict[str, Any] = {
        name: value
        for name, value in tiny.settings(family).items()
        if name in tiny.SIZES and name not in ("n_group", "topk_group")
    } | tiny.NEEDED.get(family, {})
    told = {"model_type": family, **sizes}
    written_out = kind(**sizes).to_dict()
    assert read_shape(told) == read_shape(written_out)


def test_unknown_family_names_near_and_known_ones() -> None:
    with pytest.raises(LeanMoeError, match=r"'deepseek_v9' is not .* did you mean .*deepseek_v3"):
        family_of("deepseek_v9")
    with pytest.raises(LeanMoeError, match=r"known are afmoe, .* qwen3_next"):
        family_of("llama")
    with pytest.raises(LeanMoeError, match="has no model_type"):
        family_of(None)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_no_plan_can_run_on_says_why(model_type: str) -> None:
    with pytest.raises(LeanMoeError, match=f"no plan can run on {model_type}: "):
        read_shape({"model_type": "a model with images", "text_config": {"model_type": model_type}})
    assert model_type not in FAMILIES


def test_every_mixture_that_transformers_has_is_known_or_refused_by_name() -> None:
    """Each class of a config that counts experts, by the `model_type` it gives itself."""
    there = set()
    for path in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        for text in path.read_text(encoding="utf-8").split("\nclass ")[1:]:
            keys = re.findall(r"^    (\w+): ", text, re.MULTILINE)
            kind = re.search(r'^    model_type = "(.+)"', text, re.MULTILINE)
            if kind and any(COUNT_OF_EXPERTS.search(key) for key in keys):
                there.add(kind[1])
    assert len(there) > 50
    if Version(transformers.__version__) < Version("5.24"):  # a newer one may have others
        assert there <= {*FAMILIES, *REFUSED, *NOT_TEXT}


def test_every_name_asked_for_is_there() -> None:
    asked = (
        "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 qwen2_moe qwen3_moe qwen3_next olmoe mixtral "
        "gpt_oss glm4_moe ernie4_5_moe minimax minimax_m2 granitemoe granitemoeshared "
        "granitemoehybrid"
    )
    assert set(asked.split()) <= set(FAMILIES)


def test_a_family_that_cannot_run_gives_no_fingerprint() -> None:
    shape = read_shape(CONFIG_MAPPING["phimoe"]().to_dict())
    assert shape.total_parameters() > 0
    with pytest.raises(LeanMoeError, match="no plan can run on phimoe: its router"):
        shape.fingerprint()
