"""How the experts' programs are launched: grids, arguments and what is fixed when they compile.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.state import power_of_two, zeros_for
from leanmoe.kernels.weights import SCALE_BLOCK

SUM_COLUMNS = 2048
QUANTISE_BLOCKS = 8
"""Blocks of 128 columns that one program makes fp8."""
MOST_FLOAT32_PARTS = 64
"""Up to so many tokens the slots' parts are kept in float32: it costs nothing there."""


def interprets() -> bool:
    """Whether Triton interprets its programs, so that they run without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def settle_keys() -> None:
    """Makes the names under which Triton keeps compiled programs the same in every process.

    A program's name depends on which of the functions it calls were named before it. Without this
    what the tuner's processes compile would be compiled again by whoever runs it.
    """
    from leanmoe.kernels.triton import experts_direct_program, experts_program, fp8_program

    if interprets():
        return
    for program in (
        experts_direct_program.gate_up_direct,
        experts_direct_program.down_direct,
        experts_direct_program.down_joined,
        experts_program.gate_up_listed,
        experts_program.down_listed,
        experts_program.add_slots,
        fp8_program.quantise_rows,
    ):
        program.cache_key  # noqa: B018, named here


class ExpertsCall:
    """One call of the experts, program by program; arguments are checked by `experts_gpu`."""

    def __init__(
        self,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        gates_TK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        extras: list[Tensor | None],
        layout: list[bool],
        activation: int,
        numbers: list[float],
        config: ExpertsConfig,
        out: Tensor | None = None,
    ) -> None:
        """`extras`: biases of both products, then block scales of both; `layout`: whether the
        weights are transposed, concatenated, gated; `numbers`: limit, alpha and up_offset; `out`
        (T,D), where the result is to lie."""
        transposed, concatenated, gated = layout
        up_bias, down_bias, up_scale, down_scale = extras
        self.hidden, self.ids, self.gates = hidden_TD, ids_TK, gates_TK
        self.gate_up, self.down, self.config = gate_up, down, config
        self.tokens, self.slots = ids_TK.shape
        self.experts, self.width = gate_up.shape[0], hidden_TD.shape[1]
        self.inner = down.shape[1] if transposed else down.shape[2]
        rows, is_exact = self.tokens * self.slots, self.tokens <= MOST_FLOAT32_PARTS
        kind = torch.float32 if is_exact else hidden_TD.dtype
        self._is_scaled = up_scale is not None
        coded = torch.float8_e4m3fn if self._is_scaled else hidden_TD.dtype
        act_kind = torch.float16 if config.float16_act else coded
        self.act = hidden_TD.new_empty(rows * config.parts, self.inner, dtype=act_kind)
        self.part = hidden_TD.new_empty(rows, self.width, dtype=kind)
        self.out = torch.empty_like(hidden_TD) if out is None else out
        self._read, self._read_scale, self._act_scale = hidden_TD, hidden_TD, hidden_TD
        if self._is_scaled:
            blocks = -(-self.width // SCALE_BLOCK)
            tiles = -(-self.inner // config.gate_up.columns)
            self._read = hidden_TD.new_empty(self.tokens * config.parts, self.width, dtype=coded)
            self._read_scale = hidden_TD.new_empty(self.tokens, blocks, dtype=torch.float32)
            self._act_scale = hidden_TD.new_empty(rows, tiles, dtype=torch.float32)
        self._limits = (min(numbers[0], 3e38), numbers[1], numbers[2])
        # A program wants some pointer even where it never reads it.
        self._up_extras = (_or(up_bias, gate_up), _or(up_scale, gate_up))
        self._down_extras = (_or(down_bias, down), _or(down_scale, down))
        self._has_overlap = config.overlap and not interprets()
        common = {"M": self.inner, "D": self.width, "ROWS": config.rows}
        common |= {"PARTS": config.parts, "WIDEN": interprets()}
        if config.is_direct:
            shape = {"E": self.experts, "K": self.slots, "SLOTS": power_of_two(self.slots)}
        else:
            shape = {"TAIL": config.tail, "PIECES": config.pieces}
        both = self.inner * (2 if gated else 1)
        lies_in_rows = not transposed and (concatenated or not gated)
        self._up_options = {
            **common,
            **shape,
            **_tile(config.gate_up, config.is_direct, lies_in_rows and self.gate_up),
            "K": self.slots,
            "STRIDE_C": 1 if transposed else self.width,
            "STRIDE_K": both if transposed else 1,
            "GATED": gated,
            "INTERLEAVED": not concatenated,
            "HAS_BIAS": up_bias is not None,
            "HAS_LIMIT": numbers[0] != float("inf"),
            "ACTIVATION": activation,
            "SCALED": up_scale is not None,
            "PDL": self._has_overlap,
            **self._after_another(),
        }
        self._down_options = {
            **common,
            **shape,
            **_tile(config.down, config.is_direct, not transposed and self.down),
            "STRIDE_C": 1 if transposed else self.inner,
            "STRIDE_K": self.width if transposed else 1,
            "HAS_BIAS": down_bias is not None,
            "SCALED": down_scale is not None,
            # Without scales it changes nothing, and must not make a program anew.
            "X_BLOCK": config.gate_up.columns if self._is_scaled else SCALE_BLOCK,
            "PDL": self._has_overlap,
            **self._after_another(),
        }

    def run(self, program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Launches a program; the tuner compiles here instead."""
        settle_keys()
        program[grid](*arguments, **options)

    def quantise(self) -> None:
        """Fills in what the first product reads, where that is not the hidden states themselves."""
        if not self._is_scaled:
            return
        from leanmoe.kernels.triton.fp8_program import quantise_rows

        blocks = self._read_scale.shape[1]
        sizes = {"WIDTH": self.width, "BLOCKS": blocks, "CHUNK": QUANTISE_BLOCKS}
        sizes["PARTS"] = self.config.parts
        options = {"WIDEN": interprets(), "PDL": self._has_overlap, **self._after_another()}
        grid = (self.tokens, -(-blocks // QUANTISE_BLOCKS))
        self.run(quantise_rows, grid, self.hidden, self._read, self._read_scale, **sizes, **options)

    def first_product(self, *work: Tensor) -> None:
        """Fills in `act`; `work` is the work list's tensors, or nothing where it runs direct."""
        tiles = -(-self.inner // self.config.gate_up.columns)
        weights = _described(self.gate_up, self.config.gate_up, self._up_options)
        inputs = (self._read, self._read_scale, weights, *self._up_extras)
        pointers = (*inputs, self.act, self._act_scale)
        if self.config.is_direct:
            from leanmoe.kernels.triton.experts_direct_program import gate_up_direct

            grid = (self.tokens * self.slots * tiles,)
            last = (self.ids, self.tokens, *self._limits)
            self.run(gate_up_direct, grid, *pointers, *last, **self._up_options)
        else:
            from leanmoe.kernels.triton.experts_program import gate_up_listed

            most = work[1].shape[1]
            ends = (most, *self._limits)
            grid = (most * tiles * self.config.pieces,)
            self.run(gate_up_listed, grid, *pointers, *work, *ends, **self._up_options)

    def second_product(self, *work: Tensor) -> None:
        """Fills in `part`, and where it runs direct also `out`; joined, `out` alone."""
        tiles = -(-self.width // self.config.down.columns)
        weights = _described(self.down, self.config.down, self._down_options)
        inputs = (self.act, self._act_scale, weights, *self._down_extras)
        pointers = (*inputs, self.part, self.gates)
        if self.config.is_joined:
            from leanmoe.kernels.triton.experts_direct_program import down_joined

            grid = (self.tokens * tiles,)
            last = (self.gates, self.ids, self.out, self.tokens)
            self.run(down_joined, grid, *inputs, *last, **self._joined_options())
        elif self.config.is_direct:
            from leanmoe.kernels.triton.experts_direct_program import down_direct

            arrived = zeros_for("experts", tiles, self.hidden.device)
            grid = (self.tokens * self.slots * tiles,)
            last = (self.ids, arrived, self.out, self.tokens)
            self.run(down_direct, grid, *pointers, *last, **self._down_options)
        else:
            from leanmoe.kernels.triton.experts_program import down_listed

            most = work[1].shape[1]
            grid = (most * tiles * self.config.pieces,)
            self.run(down_listed, grid, *pointers, *work, most, **self._down_options)

    def _joined_options(self) -> dict[str, Any]:
        """Those of the second product that its joined way has."""
        others = ("ROWS", "WIDEN", "SWAP", "DESCRIBED", "num_stages")
        return {name: o for name, o in self._down_options.items() if name not in others}

    def sum_slots(self) -> None:
        """Fills in `out` from `part`."""
        from leanmoe.kernels.triton.experts_program import add_slots

        columns = min(SUM_COLUMNS, power_of_two(self.width))
        sizes = {"SLOTS": power_of_two(self.slots)}
        grid = (self.tokens, -(-self.width // columns))
        sizes |= {"E": self.experts, "K": self.slots, "D": self.width, "BLOCK_C": columns}
        sizes |= {"PDL": self._has_overlap, **self._after_another()}
        self.run(add_slots, grid, self.part, self.ids, self.out, **sizes)

    def _after_another(self) -> dict[str, bool]:
        """Lets a program be started while the one before is ending; it waits where it must."""
        return {"launch_pdl": True} if self._has_overlap else {}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _tile(tile: Tile, is_direct: bool, rows: Tensor | bool) -> dict[str, Any]:
    """`rows` are the weights where they lie in rows that a descriptor can name, else False."""
    return {
        "BLOCK_C": tile.columns,
        "BLOCK_K": tile.depth,
        "SWAP": tile.weights_left,
        "DESCRIBED": tile.described and rows is not False and _is_describable(rows),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({} if is_direct else {"GROUP": tile.group}),
    }


def _is_describable(weights: Tensor | bool) -> bool:
    """The copy engine wants rows of whole 16 bytes."""
    return isinstance(weights, Tensor) and weights.shape[-1] * weights.itemsize % 16 == 0


def _described(weights: Tensor, tile: Tile, options: dict[str, Any]) -> Any:
    """A descriptor of all experts' rows, one below the other, where the program wants one."""
    if not options["DESCRIBED"]:
        return weights
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = weights.view(-1, weights.shape[-1])
    return TensorDescriptor.from_tensor(rows, [tile.columns, tile.depth])
