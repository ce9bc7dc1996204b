"""Which number format a module's weights have, by the rules of the library that quantised them.

The settings are `quantization_config` in config.json, as compressed-tensors, ModelOpt, AutoGPTQ,
AutoAWQ, AutoRound, MLX, Quark, bitsandbytes and Transformers write and read them. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from leanmoe.models.hf_config import HfConfig
from leanmoe.models.modules import (
    PATTERN,
    Matches,
    Module,
    UnknownFormatError,
    compiled,
    named,
    wildcards,
    within,
)

SCALE_BYTES = 2
"""Bytes of a group's scale in the integer formats, and of MLX's offset beside it."""
BLOCK_SCALE_BYTES = 4
LINEAR = ("expert", "mixers", "dense", "shared")
"""Parts whose matrices every method quantises unless it is told to leave them alone."""


class Format(NamedTuple):
    """A number format: its name, and bytes of a weight with its share of the scales."""

    name: str
    stored: float


Rule = Callable[[Module], Format | None]
"""The format of a module's weights; None where they are left as the model's dtype."""
FLOATS = {
    (8, None): Format("fp8", 1.0),
    (8, 32): Format("mxfp8", 1 + 1 / 32),
    (4, 32): Format("mxfp4", 0.5 + 1 / 32),
    (4, 16): Format("nvfp4", 0.5 + 1 / 16),
}
"""Formats of floating point, by bits and by how many weights have a scale of one byte."""
ALGORITHMS = {
    "FP8": FLOATS[8, None],
    "FP8_PER_CHANNEL_PER_TOKEN": FLOATS[8, None],
    "FP8_PB_WO": Format("fp8", 1 + BLOCK_SCALE_BYTES / 128**2),
    "FP8_BLOCK_SCALES": Format("fp8", 1 + BLOCK_SCALE_BYTES / 128**2),
    "NVFP4": FLOATS[4, 16],
    "W4A16_NVFP4": FLOATS[4, 16],
    "W4A8_NVFP4_FP8": FLOATS[4, 16],
    "W4A8_MXFP4_FP8": FLOATS[4, 32],
    "MXFP4": FLOATS[4, 32],
    "MXFP8": FLOATS[8, 32],
    "W4A16_AWQ": Format("int4", 0.5 + SCALE_BYTES / 128),
    "W4A8_AWQ": Format("int4", 0.5 + SCALE_BYTES / 128),
}
"""ModelOpt's names of formats (`quant_algo`)."""


def rule_of(quantised: HfConfig) -> Rule:
    """How the settings say a module is stored.

    Raises UnknownFormatError for a method or a format that is not known here, and LeanMoeError for
    a setting of the wrong kind.
    """
    method = quantised.raw("quant_method")
    if method is None and quantised.raw("quant_algo") is not None:
        method = "modelopt"
    if method is None and quantised.raw("bits") is not None:
        method = "mlx"  # it writes no quant_method
    name = str(method).lower().replace("_", "-")
    if name not in METHODS:
        raise UnknownFormatError(f"quant_method {method!r} is not known")
    return METHODS[name](quantised)


def _names(quantised: HfConfig, *keys: str) -> tuple[str, ...]:
    """The first of the lists that is there."""
    for key in keys:
        if (names := quantised.items(key, str)) is not None:
            return names
    return ()


def _plain(left_out: Matches, stored: Format, parts: tuple[str, ...] = LINEAR) -> Rule:
    """One format for all modules of the parts but those left out."""
    return lambda module: stored if module.part in parts and not left_out(module) else None


def _integer(bits: int, group: int, offset_bytes: float = 0) -> Format:
    each = (SCALE_BYTES + offset_bytes) / group if group > 0 else 0.0
    return Format(f"int{bits}", bits / 8 + each)


def _float(bits: int, group: int) -> Format:
    known = FLOATS.get((bits, group if group > 0 else None))
    if known is None:
        raise UnknownFormatError(f"floats of {bits} bits in groups of {group} are not known")
    return known


def _fp8(quantised: HfConfig) -> Rule:
    """Blocks with a scale each; with `expert_dtype` "fp4" (DeepSeek-V4), experts of half a byte."""
    block = quantised.items("weight_block_size", int) or ()
    scale = 1 if quantised.raw("scale_fmt") == "ue8m0" else BLOCK_SCALE_BYTES
    stored = Format("fp8", 1 + (scale / prod(block) if len(block) == 2 and all(block) else 0))
    if quantised.raw("quant_method") == "mxfp8":
        stored = FLOATS[8, 32]
    if (kind := quantised.raw("expert_dtype")) not in (None, "fp8", "fp4"):
        raise UnknownFormatError(f"expert_dtype {kind!r} is not known")
    experts = Format("mxfp4", 0.5 + scale / 32) if kind == "fp4" else stored
    left_out = named(_names(quantised, "modules_to_not_convert", "ignored_layers"))
    rest = _plain(left_out, stored)
    return lambda each: rest(each) and (experts if each.part == "expert" else stored)


def _mxfp4(quantised: HfConfig) -> Rule:
    """gpt-oss: routed experts alone."""
    left_out = _names(quantised, "modules_to_not_convert")
    return _plain(named(left_out), FLOATS[4, 32], ("expert",))


def _bitsandbytes(quantised: HfConfig) -> Rule:
    is_eight = quantised.flag("load_in_8bit") or quantised.flag("_load_in_8bit")
    scale = 1 + 4 / 256 if quantised.flag("bnb_4bit_use_double_quant") else 4
    stored = (
        Format("int8", 1.0)
        if is_eight
        else Format(str(quantised.raw("bnb_4bit_quant_type") or "fp4"), 0.5 + scale / 64)
    )
    return _plain(named(_names(quantised, "llm_int8_skip_modules")), stored)


def _awq(quantised: HfConfig) -> Rule:
    bits, group = _sizes(quantised, 4, 128)
    stored = _integer(quantised.whole("w_bit", bits, 1), quantised.whole("q_group_size", group, -1))
    return _plain(within(_names(quantised, "modules_to_not_convert")), stored)


def _gptq(quantised: HfConfig) -> Rule:
    """GPTQModel's `dynamic`: "-:pattern" leaves out, "+:pattern" or "pattern" changes settings."""
    bits, group = _sizes(quantised, 4, 128)
    dynamic = quantised.part("dynamic")
    rules = []
    for key in dynamic.values:
        pattern = compiled(key.removeprefix("-:").removeprefix("+:"))
        own = dynamic.part(key)
        is_left_out = key.startswith("-:")
        rules.append((pattern, None if is_left_out else _integer(*_sizes(own, bits, group))))
    has_head = quantised.flag("lm_head")
    inside = _flat(quantised.raw("modules_in_block_to_quantize"))
    is_inside = named(inside)

    def rule(module: Module) -> Format | None:
        if module.part == "head" and not has_head:
            return None
        if module.part not in (*LINEAR, "head") or (inside and not is_inside(module)):
            return None
        for pattern, stored in rules:
            if any(pattern.match(name) for name in module.names):
                return stored
        return _integer(bits, group)

    return rule


def _flat(names: Any) -> tuple[str, ...]:
    """The words in a list of lists."""
    if isinstance(names, str):
        return (names,)
    return tuple(word for each in names for word in _flat(each)) if isinstance(names, list) else ()


def _sizes(own: HfConfig, bits: int, group: int) -> tuple[int, int]:
    return own.whole("bits", bits, least=1), own.whole("group_size", group, least=-1)


def _auto_round(quantised: HfConfig) -> Rule:
    """Blocks of the model, but for what `extra_config` says of a name or a pattern."""
    bits, group = _sizes(quantised, 4, 128)
    kind = str(quantised.raw("data_type") or "int")
    if not kind.startswith(("int", "mx_fp", "nv_fp", "fp")):
        raise UnknownFormatError(f"data_type {kind!r} of AutoRound is not known")
    extra = quantised.part("extra_config")
    keys = [(_auto_round_matches(key), extra.part(key)) for key in extra.values]

    def stored(own: HfConfig, default: int) -> Format | None:
        bits_, group_ = _sizes(own, default, group)
        if bits_ >= 16:
            return None
        return _integer(bits_, group_) if kind.startswith("int") else _float(bits_, group_)

    stored(HfConfig({}), bits)  # an unknown format is said here, not at the first module

    def rule(module: Module) -> Format | None:
        is_block = module.part in LINEAR
        for matches, own in keys:
            if module.names and matches(module):
                return stored(own, bits if is_block else 16)
        return stored(HfConfig({}), bits) if is_block else None

    return rule


def _auto_round_matches(key: str) -> Matches:
    if not PATTERN.search(key):
        return lambda module: any(f".{name}".endswith(f".{key}") for name in module.names)
    pattern = compiled(key)
    return lambda module: any(pattern.search(name) for name in module.names)


def _compressed(quantised: HfConfig) -> Rule:
    """compressed-tensors: groups of targets, a name before a pattern before a class."""
    groups, outer = quantised.part("config_groups"), str(quantised.raw("format") or "")
    if not groups.values:
        raise UnknownFormatError("compressed-tensors settings without config_groups")
    exact: list[tuple[str, Format | None]] = []
    classes: list[tuple[str, Format | None]] = []
    for key in groups.values:
        group = groups.part(key)
        stored = _scheme(group.part("weights"), str(group.raw("format") or outer))
        targets = _names(group, "targets")
        if not targets:
            raise UnknownFormatError(f"{key} of config_groups has no targets")
        for target in targets:
            is_class = not target.startswith("re:") and "." not in target and target != "lm_head"
            if is_class and stored is not None and target != "Linear":
                raise UnknownFormatError(f"target {target!r} of {key} is a class not known here")
            (classes if is_class else exact).append((target, stored))
    exact.sort(key=lambda pair: (pair[0].startswith("re:"), pair[0]))
    rules = [(_target(target), stored) for target, stored in exact + classes]
    ignored = [_target(name) for name in _names(quantised, "ignore")]

    def rule(module: Module) -> Format | None:
        if any(matches(module) for matches in ignored):
            return None
        return next((stored for matches, stored in rules if matches(module)), None)

    return rule


def _target(target: str) -> Matches:
    if target.startswith("re:"):
        pattern = compiled(target.removeprefix("re:"))
        return lambda module: any(pattern.match(name) for name in module.names)
    if target == "Linear":
        return lambda module: bool(module.names) and module.part in (*LINEAR, "head")
    return lambda module: target in module.names


def _scheme(weights: HfConfig, form: str) -> Format | None:
    """The format of a group's weights; None where the group is about activations alone."""
    if not weights.values or form == "dense":
        return None
    bits, group = weights.whole("num_bits", 8, least=1), weights.whole("group_size", 0, -1)
    strategy, block = weights.raw("strategy"), weights.raw("block_structure")
    if isinstance(block, str):  # "128x128"
        block = [int(side) for side in block.split("x") if side.isdigit()]
    if weights.raw("type") != "float":
        offsets = 0.0 if weights.flag("symmetric", True) else bits / 8
        return _integer(bits, group, offsets)
    if strategy == "block" and isinstance(block, list) and len(block) == 2 and all(block):
        return Format("fp8", bits / 8 + BLOCK_SCALE_BYTES / prod(block))
    return _float(bits, group if strategy in ("group", "tensor_group") else 0)


def _modelopt(quantised: HfConfig) -> Rule:
    """ModelOpt: one `quant_algo`, or one for each name in `quantized_layers`."""
    inner = quantised.part("quantization") if quantised.raw("quantization") else quantised
    excluded = wildcards(_names(inner, "exclude_modules", "ignore"))
    algorithm = str(inner.raw("quant_algo")).upper()
    if algorithm != "MIXED_PRECISION":
        return _plain(excluded, _algorithm(algorithm), (*LINEAR, "head"))
    layers = inner.part("quantized_layers")
    own = {
        key: _algorithm(str(layers.part(key).raw("quant_algo")).upper()) for key in layers.values
    }
    parents = {_block(key): stored for key, stored in own.items() if ".experts" in key}

    def rule(module: Module) -> Format | None:
        if excluded(module):
            return None
        exact = next((own[name] for name in module.names if name in own), None)
        if exact is not None or module.part != "expert":
            return exact
        return next(
            (parents[_block(name)] for name in module.names if _block(name) in parents), None
        )

    return rule


def _block(name: str) -> str:
    """The experts that a name is one of, or a matrix of one of."""
    return name.partition(".experts")[0] + ".experts"


def _algorithm(name: str) -> Format:
    if name not in ALGORITHMS:
        raise UnknownFormatError(f"quant_algo {name!r} of ModelOpt is not known")
    return ALGORITHMS[name]


def _mlx(quantised: HfConfig) -> Rule:
    """MLX: every matrix, embedding, head and router too; a module's name may have its own."""
    base = _mlx_format(quantised, quantised)
    own: dict[str, Format | None] = {}
    for key, value in quantised.values.items():
        if isinstance(value, Mapping):
            own[key] = _mlx_format(quantised.part(key), quantised)
        elif value is False:
            own[key] = None

    def rule(module: Module) -> Format | None:
        renamed = (name.replace(".experts.0.", ".switch_mlp.") for name in module.names)
        exact = next((name for name in (*module.names, *renamed) if name in own), None)
        return own[exact] if exact is not None else base if module.names else None

    return rule


def _mlx_format(own: HfConfig, outer: HfConfig) -> Format:
    mode = str(own.raw("mode") or outer.raw("mode") or "affine")
    if mode in ("mxfp4", "nvfp4", "mxfp8"):
        return next(each for each in FLOATS.values() if each.name == mode)
    if mode != "affine":
        raise UnknownFormatError(f"mode {mode!r} of MLX is not known")
    bits, group = _sizes(own, outer.whole("bits", 4, least=1), outer.whole("group_size", 64))
    return _integer(bits, group, SCALE_BYTES)


def _quark(quantised: HfConfig) -> Rule:
    """Quark: one setting for all, and others by the names of layers."""
    excluded = wildcards(_names(quantised, "exclude"))
    whole = _quark_format(quantised.part("global_quant_config"))
    layers = quantised.part("layer_quant_config")
    own = [(wildcards((key,)), _quark_format(layers.part(key))) for key in layers.values]

    def rule(module: Module) -> Format | None:
        if module.part not in (*LINEAR, "head") or excluded(module):
            return None
        return next((stored for matches, stored in own if matches(module)), whole)

    return rule


def _quark_format(part: HfConfig) -> Format | None:
    weight = part.part("weight")
    if not weight.values:
        return None
    kind, group = str(weight.raw("dtype")), weight.whole("group_size", 0, -1)
    if match := re.fullmatch(r"u?int(\d+)", kind):
        return _integer(int(match[1]), group)
    if match := re.fullmatch(r"fp(\d)(_e\dm\d)?", kind):
        return _float(int(match[1]), group)
    raise UnknownFormatError(f"dtype {kind!r} of Quark is not known")


METHODS: Mapping[str, Callable[[Any], Rule]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm-fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "inc": _auto_round,
    "compressed-tensors": _compressed,
    "nvfp4": lambda own: _plain(named(_names(own, "modules_to_not_convert")), FLOATS[4, 16]),
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
    "modelopt-mixed": _modelopt,
    "modelopt-mxfp8": _modelopt,
    "mlx": _mlx,
    "quark": _quark,
}
"""By `quant_method`, with dashes."""
