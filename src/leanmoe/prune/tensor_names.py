"""Which of a checkpoint's tensors belong to routed experts, by their names and sizes.

Holds for every family: the experts of a block are either tensors of their own, numbered
(`experts.7.up_proj.weight`), or one tensor for all of them (`experts.gate_up_proj`), and the
router beside them has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leanmoe.core.errors import LeanMoeError

Kind = Literal["numbered", "first_axis", "last_axis"]

_BLOCK = re.compile(r"^((?:.*\.)?layers\.(\d+)(?:\.[a-z_0-9]+)*?)\.experts\.")
_LINEARS = re.compile(r"^((?:.*\.)?layers\.(\d+)(?:\.[a-z_0-9]+)*?)\.(?:input|output)_linear\.")
_NUMBERED = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"(?:gate|router)(?:\.(?:gate|wg|layer|classifier|proj))?\.\w+")
_HEAD = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_\w+)?\.")
_BIAS = re.compile(r"(?:[\w.]+\.)?(?:e_score_correction_bias|expert_bias)")


@dataclass(frozen=True)
class TensorPart:
    """What one tensor holds of an MoE layer's experts."""

    decoder_index: int
    kind: Kind
    """A tensor of one expert, or one whose first or last axis is the experts."""
    expert: int | None = None
    """The number of a numbered one."""


def stack_and_layer(name: str) -> tuple[str, int]:
    """What a tensor's layer is one of, and its number there; a vision tower has its own layers.

    The number is -1 for a tensor of no layer.
    """
    stack, _, rest = f".{name}".partition(".layers.")
    number = rest.split(".")[0]
    return stack, int(number) if number.isdigit() else -1


def is_of_head(name: str) -> bool:
    """Whether a tensor is of a head that predicts several tokens ahead (MTP)."""
    return _HEAD.search(name) is not None


def decoder_stack(names: Iterable[str], layers: Sequence[int]) -> str:
    """The stack whose MoE layers are those of the decoder: heads and talkers have experts too.

    Raises LeanMoeError where two stacks of equal size may be it.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for name in names:
        if (_BLOCK.match(name) or _LINEARS.match(name)) and not is_of_head(name):
            stack, number = stack_and_layer(name)
            sizes[stack] = sizes.get(stack, 0) + 1
            numbers.setdefault(stack, set()).add(number)
    whole = [stack for stack in sizes if numbers[stack] >= set(layers)] or list(sizes)
    largest = [s for s in whole if sizes[s] == max(sizes[each] for each in whole)]
    if len(largest) > 1:
        both = " and ".join(stack.lstrip(".") for stack in largest)
        raise LeanMoeError(f"the checkpoint has experts in {both}: which are the decoder's?")
    return largest[0] if largest else ""


def expert_parts(
    shapes: Mapping[str, Sequence[int]], experts: int, stack: str | None = None
) -> dict[str, TensorPart]:
    """The tensors, by name, that change when experts go; `shapes` are all of the checkpoint's.

    With `stack`, those of its layers alone.
    """
    blocks = _blocks(name for name in shapes if stack in (None, stack_and_layer(name)[0]))
    found: dict[str, TensorPart] = {}
    for name, shape in shapes.items():
        block = next((b for b in _prefixes(name) if b in blocks), None)
        if block is None:
            continue
        part = _part(name, name[len(block) + 1 :], shape, blocks[block], experts)
        if part is not None:
            found[name] = part
    return found


def check_parts(parts: Mapping[str, TensorPart], layers: Iterable[int], experts: int) -> None:
    """Raises LeanMoeError unless every MoE layer has all of its experts and a router."""
    for layer in layers:
        own = {name: part for name, part in parts.items() if part.decoder_index == layer}
        numbered = {part.expert for part in own.values() if part.kind == "numbered"}
        missing = sorted(set(range(experts)) - numbered) if numbered else []
        if missing:
            raise LeanMoeError(
                f"the checkpoint lacks experts {missing[:8]} of layer {layer}: a shard is missing"
            )
        whole = [name for name, part in own.items() if part.kind == "first_axis"]
        if not numbered and not any(".experts." in n or "_linear." in n for n in whole):
            raise LeanMoeError(
                f"the checkpoint has no expert weights in layer {layer} under a name known here"
            )
        if not any(_is_router(name) for name in whole):
            raise LeanMoeError(f"the checkpoint has no router with {experts} rows in layer {layer}")


def renumbered(name: str, expert: int) -> str:
    """A numbered expert's tensor under another number."""
    return _NUMBERED.sub(f".experts.{expert}.", name, count=1)


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Prefixes of MoE blocks, and the decoder layer each is in."""
    found = {}
    for name in names:
        match = _BLOCK.match(name) or _LINEARS.match(name)
        if match:
            found[match[1]] = int(match[2])
    return found


def _prefixes(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[:n]) for n in range(len(words) - 1, 0, -1)]


def _part(
    name: str, inside: str, shape: Sequence[int], layer: int, experts: int
) -> TensorPart | None:
    """What a tensor of an MoE block is, by its name inside the block."""
    match = _NUMBERED.search(name)
    if match and inside.startswith("experts."):
        return TensorPart(layer, "numbered", int(match[1]))
    if _BIAS.fullmatch(inside) and shape and shape[-1] == experts:
        return TensorPart(layer, "last_axis")
    is_expert = inside.startswith(("experts.", "input_linear.", "output_linear."))
    if (is_expert or _ROUTER.fullmatch(inside)) and shape and shape[0] == experts:
        return TensorPart(layer, "first_axis")
    return None


def _is_router(name: str) -> bool:
    return re.search(rf"\.{_ROUTER.pattern}$", name) is not None
