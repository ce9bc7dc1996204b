"""Which tensors belong to experts, by name and size."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.prune.tensor_names import (
    TensorPart,
    check_parts,
    decoder_stack,
    expert_parts,
    renumbered,
)

ONE_EACH = {
    "model.layers.1.mlp.gate.weight": (4, 8),
    "model.layers.1.mlp.gate.e_score_correction_bias": (4,),
    **{f"model.layers.1.mlp.experts.{n}.up_proj.weight": (6, 8) for n in range(4)},
    "model.layers.1.mlp.shared_experts.up_proj.weight": (6, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
}
ALL_IN_ONE = {
    "model.layers.0.mlp.router.weight": (4, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 8, 12),
}


def test_a_numbered_experts_tensors_carry_its_number() -> None:
    parts = expert_parts(ONE_EACH, 4)
    assert parts["model.layers.1.mlp.experts.3.up_proj.weight"] == TensorPart(1, "numbered", 3)
    assert parts["model.layers.1.mlp.gate.weight"] == TensorPart(1, "first_axis")
    assert parts["model.layers.1.mlp.gate.e_score_correction_bias"].kind == "last_axis"
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" not in parts
    assert "model.layers.0.mlp.up_proj.weight" not in parts
    check_parts(parts, [1], 4)


def test_one_tensor_of_all_experts_is_cut_along_its_first_axis() -> None:
    parts = expert_parts(ALL_IN_ONE, 4)
    assert {part.kind for part in parts.values()} == {"first_axis"}
    check_parts(parts, [0], 4)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", r"lacks experts \[2\] of layer 1"),
        ("model.layers.1.mlp.gate.weight", "no router with 4 rows in layer 1"),
    ],
)
def test_a_missing_tensor_is_named(gone: str, message: str) -> None:
    parts = expert_parts({name: size for name, size in ONE_EACH.items() if name != gone}, 4)
    with pytest.raises(LeanMoeError, match=message):
        check_parts(parts, [1], 4)


def test_an_expert_gets_its_new_number_once() -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert renumbered(name, 0) == "model.layers.1.mlp.experts.0.up_proj.weight"


def with_stack(stack: str) -> dict[str, tuple[int, ...]]:
    return {name.replace("model.layers.1", f"{stack}.layers.0"): s for name, s in ONE_EACH.items()}


def test_a_head_and_another_stack_with_experts_stay_whole() -> None:
    shapes = {
        **{
            name.replace("layers.1", f"layers.{n}"): s
            for name, s in ONE_EACH.items()
            for n in (0, 1)
        },
        **with_stack("mtp"),
        **with_stack("talker.model"),
    }
    stack = decoder_stack(shapes, (0, 1))
    assert stack == ".model"
    parts = expert_parts(shapes, 4, stack)
    assert parts
    assert all(name.startswith("model.layers.") for name in parts)


def test_two_stacks_that_may_be_the_decoders_are_refused() -> None:
    shapes = {**with_stack("one"), **with_stack("two")}
    with pytest.raises(LeanMoeError, match="experts in one and two: which are the decoder's"):
        decoder_stack(shapes, (0,))
