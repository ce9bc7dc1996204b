"""Inputs as they should be, which the fuzz starts from: published ones where there are some."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from leanmoe.core.schema import to_json
from leanmoe.models.catalog import CONFIGS
from leanmoe.models.families import FAMILIES
from leanmoe.models.hf_config import language_part
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.serve.metrics import exposition
from tests import tiny
from tests.fuzz.mutations import Seeds, sequence_of
from tests.published import MODELS
from tests.published_bytes import CHECKPOINTS
from tests.report.example import plan as tuned_plan
from tests.report.example import results as tuned
from tests.results.committed import committed
from tests.results.test_predict import SWEEP
from tests.results.test_prune import REPORT

QUANTISED: tuple[dict[str, Any], ...] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"]},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.self_attn"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "modules_to_not_convert": ["gate"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*gate": {}}},
    {"quant_method": "auto-round", "bits": 4, "extra_config": {".*attn.*": {"bits": 16}}},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["re:.*gate$", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "type": "int"},
            }
        },
    },
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["*attn*"]},
    {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.experts": {"quant_algo": "FP8"}}},
    {"bits": 4, "group_size": 64, "model.layers.0.mlp.gate": {"bits": 8, "group_size": 64}},
    {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
        "layer_quant_config": {"*attn*": {"weight": {"dtype": "int8"}}},
    },
)
"""Settings of each library that quantises."""


@cache
def configs() -> Seeds:
    """Published configs, tiny ones of the families that none of them is of, and quantised ones."""
    published: list[Any] = [model.config for model in MODELS.values()]
    published += [each.config for each in CHECKPOINTS.values()]
    published += [value for name, value in CONFIGS.items() if name not in MODELS]
    types = {language_part(each)["model_type"] for each in published}
    small = [_small(name) for name in FAMILIES if name not in types]
    qwen = CONFIGS["Qwen/Qwen3-30B-A3B"]
    quantised = [{**qwen, "quantization_config": settings} for settings in QUANTISED]
    return sequence_of([*published, *small, *quantised])


def _small(family: str) -> dict[str, Any]:
    """A tiny config of a family."""
    own = {**tiny.NEEDED.get(family, {}), **tiny.OF_FAMILY.get(family, {})}
    own = {name: value for name, value in own.items() if value is not None}
    return {**tiny.SIZES, "n_groups": 2, "conv_kernel": 4, **own, "model_type": family}


@cache
def reference() -> MoEShape:
    """The model that ships with leanmoe."""
    return read_shape("reference")


@cache
def plans() -> Seeds:
    """Plans for the reference model with every field of a rule, and a committed one."""
    model = reference().fingerprint()
    some, layers = tuple(range(0, model.experts, 2)), model.moe_layers
    rules = (
        Rule(top_k=2),
        Rule(threshold=0.3, renormalise=0.5),
        Rule(top_p=0.9, guaranteed=1),
        Rule(budget=8, budget_per_rank=4),
        Rule(experts=some, top_k=2),
    )
    every = tuple(rules[n % len(rules)] for n in range(layers))
    bands = (Band(4, (Rule(),) * layers), Band(64, every), Band(None, every[::-1]))
    made: list[Any] = [Plan.uniform(model, rule).to_json() for rule in rules]
    made += [Plan.banded(model, bands, every).to_json(), Plan(model).to_json()]
    made += [json.loads(path.read_text()) for path in committed("leanmoe_plan")]
    return sequence_of([*made, tuned_plan()])


@cache
def results() -> Seeds:
    """Committed results of every verb, those with many loads without most of them."""
    found: list[Any] = [tuned(), SWEEP.to_json(), REPORT.to_json()]
    for kind in ("leanmoe_bench", "leanmoe_eval", "leanmoe_study"):
        found += [_short(json.loads(path.read_text())) for path in committed(kind)]
    return sequence_of(found)


def _short(value: Any) -> Any:
    """The same with at most two items of each list that is no plan's."""
    if isinstance(value, dict):
        return {k: each if k in ("plan", "bands") else _short(each) for k, each in value.items()}
    return [_short(each) for each in value[:2]] if isinstance(value, list) else value


TASK = """task: things
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/things.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
"""
TASKS = Seeds((TASK,), is_text=True)
ROWS = Seeds(
    (
        [{"text": "A document of some words."}, {"content": "Another."}, {"document": "x"}],
        [{"prompt": "Count to", "output": "three"}, {"input_len": 12, "output_len": 4}],
        [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)],
        [{"prompt": "2 + 2?", "answer": "4", "pattern": r"-?\d+"}] * 12,
        [{"conversations": [{"from": "human", "value": "Hello"}]}],
    ),
    is_lines=True,
)
PROSE = Seeds(
    (
        "One.\n\nTwo.\n<|endoftext|>\nThree and some more words.",
        '{"text": "a line"}\n{"text": "another"}',
        "12\n34\n56",
        "[1, 2]",
    ),
    is_text=True,
)
MODELS_LISTED = sequence_of(
    [
        {"object": "list", "data": [{"id": "a/model", "root": "a/model", "max_model_len": 4096}]},
        {"data": [{"id": "mock", "root": None}, {"id": "other", "max_model_len": 16}]},
        {"error": {"message": "no key", "type": "invalid_request_error", "code": 401}},
        {"detail": [{"loc": ["body"], "msg": "field required"}]},
    ]
)
STREAMS = Seeds(
    (
        [
            {"id": "cmpl-1", "choices": [{"index": 0, "text": f" w{n}"}],
             "usage": {"prompt_tokens": 9, "completion_tokens": n + 1}}
            for n in range(4)
        ],
        [
            *({"id": "cmpl-2", "choices": [{"index": 0, "text": "a"}]} for _ in range(3)),
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
        ],
        [
            {"choices": [{"text": "a", "finish_reason": "length"}]},
            {"error": {"message": "the engine died", "code": 500}},
        ],
    ),
    is_lines=True,
)  # fmt: skip
STEP = {
    "rows": 12,
    "band": 0,
    "up_to": 16,
    "layers": [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 3.5}],
}
METRICS = Seeds((exposition("plan.json", "vllm", STEP, 120),), is_text=True)
HEADER = sequence_of(
    [
        {
            "__metadata__": {"format": "pt"},
            "model.embed_tokens.weight": {
                "dtype": "BF16", "shape": [64, 32], "data_offsets": [0, 4096],
            },
            "model.layers.0.mlp.experts.0.up_proj.weight": {
                "dtype": "F8_E4M3", "shape": [16, 32], "data_offsets": [4096, 4608],
            },
            "model.layers.0.mlp.gate.weight": {
                "dtype": "F32", "shape": [16, 32], "data_offsets": [4608, 6656],
            },
        }
    ]
)  # fmt: skip
HARDWARE = sequence_of([to_json(GPUS["h200"]), to_json(GPUS["h100"])])
SETTINGS = Seeds(
    ('concurrency = "1,8"\ninput-len = 128\nskew = 0.5\n', "top_k = 4\nsweep = false\n"),
    is_text=True,
)
RULES = Seeds(("top_k=6,renormalise=0.5", "threshold=0.2,top_p=0.9", "budget=40"), is_text=True)


@cache
def profiles() -> Seeds:
    """A profile.json of the reference model."""
    model = reference()
    points = [
        {"tokens": 2**n, "documents": 4, "measured": min(model.experts, 2.0**n), "error": 0.1,
         "uniform": min(model.experts, 2.0**n)}
        for n in range(6)
    ]  # fmt: skip
    layers = [
        {"layer": n, "decoder_layer": each, "distinct": points}
        for n, each in enumerate(model.moe_layers)
    ]
    shown = {"tokens": 100, "documents": 4, "layers": layers}
    value = {"leanmoe_profile": 2, "model": to_json(model.fingerprint()), "profile": shown}
    return sequence_of([value])


@cache
def constants() -> Seeds:
    """A file of constants, as calibrate writes it: one kernel, one GPU's rates."""
    from leanmoe.predict.constants import shipped

    value = to_json(shipped())
    kernels = [each for each in value["kernels"] if each["gpu"] == "h200"][:2]
    rates = dict(list(value["rates"].items())[:1])
    return sequence_of([{**value, "kernels": kernels or value["kernels"][:1], "rates": rates}])
