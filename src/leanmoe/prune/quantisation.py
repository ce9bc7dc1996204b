"""Expert numbers in a checkpoint's quantisation settings, which change as the experts' do.

Libraries name modules that are quantised otherwise or not at all: as elements of lists
(compressed-tensors' `ignore`, FP8's `modules_to_not_convert`), as keys (AutoRound's `extra_config`,
ModelOpt's `quantized_layers`, GPTQModel's `dynamic`), at any depth, as names or as patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.prune.tensor_names import is_of_head, stack_and_layer

SETTINGS = ("quantization_config", "compression_config")
"""Keys of config.json that hold them."""
_NUMBER = re.compile(r"(?<![A-Za-z_])experts\.(\d+)(?=\.|$)")
_ANY_NUMBER = re.compile(r"\\d[+*]?|\[0-9\][+*]?|\[\^\\?\.\][+*]?")
_NUMBERS_IN_A_PATTERN = re.compile(r"experts(?:\\\.|\.|/)(?:\d+\\?\.?|[(\[][^)\]]*\d)")
_IS_PATTERN = re.compile(r"^(?:re:|[-+]:)|[\\^$*+?()\[\]|]")

Chosen = Mapping[int, tuple[int, ...]]
"""The experts that remain in each decoder layer with experts."""


def is_settings_file(name: str) -> bool:
    """Whether a file beside config.json holds quantisation settings, as hf_quant_config.json."""
    return name.endswith(".json") and "quant" in name


def renumbered_settings(value: Any, chosen: Chosen) -> Any:
    """The settings with the experts' new numbers; what names an expert that goes is left out.

    Raises LeanMoeError for a name or pattern whose experts have other numbers in each layer.
    """
    if isinstance(value, Mapping):
        pairs = ((_renamed(key, chosen), each) for key, each in value.items())
        return {key: renumbered_settings(each, chosen) for key, each in pairs if key is not None}
    if isinstance(value, list):
        if (first := _first_of_all(value, chosen)) is not None:
            return first
        found = (_renamed(e, chosen) if isinstance(e, str) else e for e in value)
        return [renumbered_settings(each, chosen) for each in found if each is not None]
    return value


def _first_of_all(names: list[Any], chosen: Chosen) -> list[Any] | None:
    """The list with as many experts as remain, where it names them all, of no layer in particular.

    Whichever remain are named then (AutoGPTQ's `modules_in_block_to_quantize`). Else None.
    """
    words = [name for name in names if isinstance(name, str) and stack_and_layer(name)[1] < 0]
    numbers = {name: int(match[1]) for name in words if (match := _NUMBER.search(name))}
    used, highest = set(numbers.values()), max(map(max, chosen.values()), default=-1)
    if len(used) <= highest or used != set(range(len(used))):
        return None
    kept = max(map(len, chosen.values()))
    return [name for name in names if name not in words or numbers.get(name, 0) < kept]


def _renamed(name: Any, chosen: Chosen) -> Any:
    """A module's name under its expert's new number; None where the expert goes."""
    if not isinstance(name, str):
        return name
    if _IS_PATTERN.search(name):
        if _NUMBERS_IN_A_PATTERN.search(_ANY_NUMBER.sub("", name)):
            raise _cannot(name)
        return name
    match = _NUMBER.search(name)
    if match is None or is_of_head(name):
        return name
    layer = stack_and_layer(name)[1]
    if layer >= 0 and layer not in chosen:
        return name
    kept = {chosen[layer]} if layer >= 0 else set(chosen.values())
    if len(kept) > 1:
        raise _cannot(name)
    (experts,) = kept
    expert = int(match[1])
    if expert not in experts:
        return None
    return _NUMBER.sub(f"experts.{experts.index(expert)}", name, count=1)


def _cannot(name: str) -> LeanMoeError:
    return LeanMoeError(
        f"the quantisation settings name experts by {name!r}, which cannot be given the experts' "
        "new numbers; set --as-plan"
    )
