"""Each library's own rules of which module has which format."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.families import family_of
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.modules import Module, Part, UnknownFormatError, modules
from leanmoe.models.quantisation import rule_of
from tests.published import MODELS

LAYER = "model.layers.3"
EXPERT = Module("expert", (f"{LAYER}.mlp.experts.0.down_proj", f"{LAYER}.mlp.experts.down_proj"), 1)
QUERY = Module("mixers", (f"{LAYER}.self_attn.q_proj",), 1)
SHARED = Module("shared", (f"{LAYER}.mlp.shared_experts.up_proj",), 1)
DENSE = Module("dense", ("model.layers.0.mlp.gate_proj",), 1)
HEAD = Module("head", ("lm_head",), 1)
ROUTER = Module("routers", (f"{LAYER}.mlp.gate",), 1)
EMBEDDING = Module("embedding", ("model.embed_tokens",), 1)
ALL = (EXPERT, QUERY, SHARED, DENSE, HEAD, ROUTER, EMBEDDING)
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def _formats(**settings: Any) -> dict[Part, str | None]:
    rule = rule_of(HfConfig(settings))
    formats = {module.part: rule(module) for module in ALL}
    return {part: each and each.name for part, each in formats.items() if each is not None}


def _compressed(groups: list[Any], ignore: list[str]) -> dict[Part, str | None]:
    config = {f"group_{n}": {"targets": t, "weights": w} for n, (t, w) in enumerate(groups)}
    return _formats(quant_method="compressed-tensors", config_groups=config, ignore=ignore)


def test_compressed_tensors_looks_each_module_up_in_its_groups() -> None:
    groups = [(["re:.*self_attn.*"], FP8), (["re:.*experts.*"], NVFP4)]
    assert _compressed(groups, ["lm_head"]) == {
        "expert": "nvfp4", "mixers": "fp8", "shared": "nvfp4",
    }  # fmt: skip


def test_a_name_goes_before_a_class_in_whatever_order() -> None:
    groups = [(["Linear"], FP8), (["re:.*mlp[.]experts.*"], MXFP4)]
    assert _compressed(groups, ["re:.*shared_experts.*"]) == {
        "expert": "mxfp4", "mixers": "fp8", "dense": "fp8", "head": "fp8",
    }  # fmt: skip


def test_a_pattern_holds_from_the_names_beginning() -> None:
    assert "mixers" in _compressed([(["Linear"], INT4)], ["re:self_attn.*"])
    assert "mixers" not in _compressed([(["Linear"], INT4)], ["re:.*self_attn.*"])


def test_a_group_about_activations_alone_changes_no_weight() -> None:
    assert _compressed([(["Linear"], None)], []) == {}


@pytest.mark.parametrize(
    ("weights", "stored"),
    [
        (NVFP4, 0.5625), (MXFP4, 0.53125), (FP8, 1.0), (INT4, 0.5625),
        ({**INT4, "symmetric": False}, 0.5625 + 0.5 / 32),
        ({**FP8, "strategy": "block", "block_structure": [128, 128]}, 1 + 4 / 128**2),
    ],
)  # fmt: skip
def test_bytes_with_the_share_of_scales(weights: Any, stored: float) -> None:
    group = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rule = rule_of(HfConfig({"quant_method": "compressed-tensors", "config_groups": group}))
    form = rule(EXPERT)
    assert form is not None
    assert form.stored == pytest.approx(stored)


def test_transformers_list_names_whole_parts_of_a_path() -> None:
    quantised = {"expert", "mixers", "shared", "dense"}
    norms = ["model.layers.3.post_attention_layernorm", "model.layers.3.mlp.gate", "lm_head"]
    assert set(_formats(quant_method="fp8", modules_to_not_convert=norms)) == quantised
    attention = ["model.layers.*.self_attn"]
    listed = _formats(quant_method="fp8", modules_to_not_convert=attention)
    assert set(listed) == quantised - {"mixers"}
    assert "mixers" not in _formats(quant_method="fp8", ignored_layers=["self_attn"])


def test_awq_names_any_piece_and_has_older_keys() -> None:
    older = {"quant_method": "awq", "w_bit": 8, "q_group_size": 32}
    form = rule_of(HfConfig(older))(EXPERT)
    assert form == ("int8", 1 + 2 / 32)
    assert "shared" not in _formats(**older, modules_to_not_convert=["shared_exp"])


def test_gptq_changes_what_its_patterns_match() -> None:
    dynamic = {r"-:.*self_attn": {}, r"+:.*\.experts\.": {"bits": 2}}
    assert _formats(quant_method="gptq", bits=4, group_size=128, dynamic=dynamic) == {
        "expert": "int2", "shared": "int4", "dense": "int4",
    }  # fmt: skip
    assert _formats(quant_method="gptq", lm_head=True)["head"] == "int4"


def test_auto_round_keeps_names_and_patterns_as_they_say() -> None:
    extra = {f"{LAYER}.self_attn.q_proj": {"bits": 16}, ".*shared_experts.*": {"bits": 8}}
    assert _formats(quant_method="auto-round", bits=4, group_size=128, extra_config=extra) == {
        "expert": "int4", "shared": "int8", "dense": "int4",
    }  # fmt: skip
    head = {"lm_head": {"bits": 4, "group_size": 32}}
    assert _formats(quant_method="auto-round", data_type="mx_fp", bits=4, group_size=32,
                    extra_config=head)["head"] == "mxfp4"  # fmt: skip


def test_modelopt_leaves_out_by_wildcards() -> None:
    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    listed = _formats(**nvfp4, ignore=["lm_head", "model.layers.*.self_attn*"])
    assert listed == {"expert": "nvfp4", "shared": "nvfp4", "dense": "nvfp4"}
    # hf_quant_config.json has its own keys, one level down.
    nested = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    assert "head" not in _formats(quant_method="modelopt", quantization=nested)


def test_modelopt_of_several_formats_lists_layers() -> None:
    layers = {
        f"{LAYER}.mlp.experts.5.down_proj": {"quant_algo": "NVFP4"},
        f"{LAYER}.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    found = _formats(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    assert found == {"expert": "nvfp4", "mixers": "fp8"}


def test_mlx_quantises_every_matrix_and_writes_no_method() -> None:
    own = {f"{LAYER}.mlp.gate": {"bits": 8, "group_size": 64}, "lm_head": False}
    formats = _formats(bits=4, group_size=64, mode="affine", **own)
    assert formats == dict.fromkeys(
        ("expert", "mixers", "shared", "dense", "embedding"), "int4"
    ) | {"routers": "int8"}
    form = rule_of(HfConfig({"bits": 4, "group_size": 64}))(EXPERT)
    assert form == ("int4", 0.5 + 4 / 64)  # a scale and an offset for each group


def test_quark_has_one_setting_and_others_by_layer() -> None:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}
    found = _formats(
        quant_method="quark",
        global_quant_config={"weight": weight},
        layer_quant_config={"*self_attn*": {"weight": {"dtype": "fp8_e4m3"}}},
        exclude=["lm_head"],
    )
    assert found == {"expert": "mxfp4", "shared": "mxfp4", "dense": "mxfp4", "mixers": "fp8"}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "torchao"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors",
         "config_groups": {"group_0": {"targets": ["NewLayer"], "weights": FP8}}},
        {"quant_method": "compressed-tensors",
         "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**FP8, "num_bits": 6}}}},
        {"quant_algo": "NVFP3"},
        {"bits": 4, "mode": "new"},
        {"quant_method": "auto-round", "data_type": "nf"},
        {"quant_method": "fp8", "modules_to_not_convert": ["model.(layers"]},
        {"quant_method": "fp8", "expert_dtype": "fp6"},
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(settings: Any) -> None:
    with pytest.raises(UnknownFormatError):
        rule_of(HfConfig(settings))


@pytest.mark.parametrize("value", [5, "lm_head", [5]])
def test_a_list_that_is_none_is_named(value: Any) -> None:
    with pytest.raises(LeanMoeError, match=r"modules_to_not_convert is .* a list of words"):
        rule_of(HfConfig({"quant_method": "fp8", "modules_to_not_convert": value}))


def test_a_block_of_no_width_has_no_scales() -> None:
    form = rule_of(HfConfig({"quant_method": "fp8", "weight_block_size": [0, 128]}))(EXPERT)
    assert form == ("fp8", 1.0)


def test_deepseek_v4_stores_experts_in_half_a_byte_and_a_scale_in_one() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    rule = rule_of(HfConfig({**fp8, "expert_dtype": "fp4"}))
    assert rule(EXPERT) == ("mxfp4", 0.5 + 1 / 32)
    assert rule(QUERY) == rule_of(HfConfig(fp8))(EXPERT) == ("fp8", 1 + 1 / 128**2)
    assert (rule(HEAD), rule(ROUTER)) == (None, None)


def test_mxfp8_has_a_scale_for_32_weights() -> None:
    rule = rule_of(HfConfig({"quant_method": "mxfp8", "ignored_layers": ["shared_experts"]}))
    assert (rule(EXPERT), rule(SHARED)) == (("mxfp8", 1 + 1 / 32), None)


def test_a_pattern_for_dense_layers_leaves_no_expert_out() -> None:
    """Kimi-K2-Thinking's: MLX's name of the experts, switch_mlp, ends as that of a dense layer."""
    ignored = [r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*self_attn.*", "re:.*shared_ex.*"]
    config = MODELS["Qwen/Qwen3-30B-A3B"].config
    settings = HfConfig(config)
    names = [m for m in modules(settings, family_of("qwen3_moe"), (0,)) if m.part == "expert"]
    group = {"targets": ["Linear"], "weights": INT4}
    rule = rule_of(HfConfig({"quant_method": "compressed-tensors", "ignore": ignored,
                             "config_groups": {"group_0": group}}))  # fmt: skip
    assert {rule(module) for module in names} == {("int4", 0.5 + 2 / 32)}


def test_mixtrals_published_awq_leaves_its_router_alone_and_no_expert() -> None:
    """`modules_to_not_convert` is ["gate"], of which gate_up_proj would be one more holder."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"]}
    config = MODELS["mistralai/Mixtral-8x7B-v0.1"].config
    rule = rule_of(HfConfig(awq))
    every = modules(HfConfig(config), family_of("mixtral"), tuple(range(32)))
    assert {rule(each) for each in every if each.part == "expert"} == {("int4", 0.5 + 2 / 128)}


def test_settings_about_attention_are_not_about_what_stands_in_its_place() -> None:
    config = MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].config
    family = family_of("qwen3_next")
    every = modules(HfConfig(config, family.defaults), family, tuple(range(48)))
    rule = rule_of(HfConfig({"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}))
    mixers = [each for each in every if each.part == "mixers" and each.names]
    left_out = sum(each.weights for each in mixers if rule(each) is None)
    assert 0 < left_out < sum(each.weights for each in mixers) / 2


def test_gptq_may_name_the_modules_it_quantises() -> None:
    inside = [["self_attn.k_proj", "self_attn.q_proj"], ["self_attn.o_proj"]]
    gptq = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": inside}
    assert _formats(**gptq) == {"mixers": "int4"}


def test_a_block_may_be_a_word() -> None:
    block = {**FP8, "strategy": "block", "block_structure": "128x128"}
    group = {"group_0": {"targets": ["Linear"], "weights": block}}
    rule = rule_of(HfConfig({"quant_method": "compressed-tensors", "config_groups": group}))
    assert rule(EXPERT) == ("fp8", 1 + 4 / 128**2)


def test_quarks_regular_expressions_begin_with_re() -> None:
    quark = {"quant_method": "quark", "exclude": ["re:.*self_attn", "lm_head", "*gate"]}
    weight = {"weight": {"dtype": "fp8_e4m3"}}
    formats = _formats(**quark, global_quant_config=weight)
    assert formats == {"expert": "fp8", "shared": "fp8", "dense": "fp8"}
