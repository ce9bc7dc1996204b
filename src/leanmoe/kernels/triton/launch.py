"""How the experts' programs are launched: grids, arguments and what is fixed when they compile."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.state import power_of_two, zeros_for
from leanmoe.kernels.weights import ACTIVATIONS, SCALE_BLOCK, ExpertWeights, Gate

SUM_COLUMNS = 2048
QUANTISE_BLOCKS = 8
"""Blocks of 128 columns that one program makes fp8."""
MOST_FLOAT32_TOKENS = 64
"""Up to so many tokens the slots' results are kept in float32: it costs nothing there."""


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
    names = {
        experts_direct_program: ("gate_up_direct", "down_direct", "down_fused"),
        experts_program: ("gate_up_grouped", "down_grouped", "add_slots"),
        fp8_program: ("quantise_rows",),
    }
    for module, programs in names.items():
        for program in programs:
            getattr(module, program).cache_key  # noqa: B018, named here


class Operands(NamedTuple):
    """What the weights of a layer are to the programs."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scale: Tensor | None
    down_scale: Tensor | None
    is_transposed: bool
    is_concatenated: bool
    is_gated: bool
    activation: int
    """Its place in `kernels.weights.ACTIVATIONS`."""
    limit: float
    """Infinity for none."""
    alpha: float
    up_offset: float


def operands(weights: ExpertWeights) -> Operands:
    """The operands of weights whose gate is a `Gate`."""
    gate = weights.gate
    assert isinstance(gate, Gate)
    limit = float("inf") if gate.limit is None else gate.limit
    return Operands(
        weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias,
        weights.gate_up_scale, weights.down_scale, weights.is_transposed, weights.is_concatenated,
        weights.is_gated, list(ACTIVATIONS).index(gate.activation), limit, gate.alpha,
        gate.up_offset,
    )  # fmt: skip


class ExpertsCall:
    """One call of the experts, program by program; arguments are checked by `experts_gpu`."""

    def __init__(
        self,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        gates_TK: Tensor,
        weights: Operands,
        config: ExpertsConfig,
        out_TD: Tensor | None = None,
    ) -> None:
        """Makes room for what lies between the programs, and for the result without `out_TD`."""
        self.hidden, self.ids, self.gates = hidden_TD, ids_TK, gates_TK
        self.gate_up, self.down, self.config = weights.gate_up, weights.down, config
        self.tokens, self.slots = ids_TK.shape
        self.experts, self.width = self.gate_up.shape[0], hidden_TD.shape[1]
        self.inner = self.down.shape[1 if weights.is_transposed else 2]
        self._is_scaled = weights.gate_up_scale is not None
        self._has_pdl = config.use_pdl and not interprets()
        self._limits = (min(weights.limit, 3e38), weights.alpha, weights.up_offset)
        # A program wants some pointer even where it never reads it.
        extras = (weights.gate_up_bias, weights.gate_up_scale)
        self._up_extras = [self.gate_up if extra is None else extra for extra in extras]
        extras = (weights.down_bias, weights.down_scale)
        self._down_extras = [self.down if extra is None else extra for extra in extras]
        self._make_room(out_TD)
        self._set_options(weights)

    def _make_room(self, out_TD: Tensor | None) -> None:
        hidden_TD, config = self.hidden, self.config
        rows, is_exact = self.tokens * self.slots, self.tokens <= MOST_FLOAT32_TOKENS
        kind = torch.float32 if is_exact else hidden_TD.dtype
        coded = torch.float8_e4m3fn if self._is_scaled else hidden_TD.dtype
        act_kind = torch.float16 if config.float16_act else coded
        self.act = hidden_TD.new_empty(rows * config.fp8_terms, self.inner, dtype=act_kind)
        self.part = hidden_TD.new_empty(rows, self.width, dtype=kind)
        self.out = torch.empty_like(hidden_TD) if out_TD is None else out_TD
        self._read, self._read_scale, self._act_scale = hidden_TD, hidden_TD, hidden_TD
        if self._is_scaled:
            blocks = -(-self.width // SCALE_BLOCK)
            tiles = -(-self.inner // config.gate_up.BLOCK_N)
            read = (self.tokens * config.fp8_terms, self.width)
            self._read = hidden_TD.new_empty(read, dtype=coded)
            self._read_scale = hidden_TD.new_empty(self.tokens, blocks, dtype=torch.float32)
            self._act_scale = hidden_TD.new_empty(rows, tiles, dtype=torch.float32)

    def _set_options(self, weights: Operands) -> None:
        """What is fixed when the programs compile, and how they are launched."""
        from leanmoe.kernels.triton.product_program import Fixed

        config, is_flipped = self.config, weights.is_transposed
        # fmt: off
        common = {
            "M": self.inner, "D": self.width, "BLOCK_M": config.BLOCK_M,
            "FP8_TERMS": config.fp8_terms, "WIDEN": interprets(), "SCALED": self._is_scaled,
            "USE_PDL": self._has_pdl,
        }
        if config.is_direct:
            common |= {"E": self.experts, "K": self.slots, "SLOTS": power_of_two(self.slots)}
        else:
            common |= {"TAIL_M": config.TAIL_M, "SUBBLOCKS": config.subblocks}
        both = self.inner * (2 if weights.is_gated else 1)
        is_split = weights.is_concatenated or not weights.is_gated
        self._up = Fixed({
            **common, "K": self.slots,
            **_tile(config.gate_up, config.is_direct, not is_flipped and is_split and self.gate_up),
            "STRIDE_N": 1 if is_flipped else self.width, "STRIDE_K": both if is_flipped else 1,
            "GATED": weights.is_gated, "INTERLEAVED": not weights.is_concatenated,
            "HAS_BIAS": weights.gate_up_bias is not None, "ACTIVATION": weights.activation,
            "HAS_LIMIT": weights.limit != float("inf"), "X_BLOCK": SCALE_BLOCK,
        })
        self._down = Fixed({
            **common, **_tile(config.down, config.is_direct, not is_flipped and self.down),
            "GATED": False, "STRIDE_N": 1 if is_flipped else self.inner,
            "STRIDE_K": self.width if is_flipped else 1,
            "HAS_BIAS": weights.down_bias is not None,
            # Without scales it changes nothing, and must not make a program anew.
            "X_BLOCK": config.gate_up.BLOCK_N if self._is_scaled else SCALE_BLOCK,
        })
        # fmt: on

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
        sizes["FP8_TERMS"] = self.config.fp8_terms
        options = {"WIDEN": interprets(), "USE_PDL": self._has_pdl, **self._after_another()}
        grid = (self.tokens, -(-blocks // QUANTISE_BLOCKS))
        self.run(quantise_rows, grid, self.hidden, self._read, self._read_scale, **sizes, **options)

    def first_product(self, *blocks: Tensor) -> None:
        """Fills in `act`; `blocks` are the tensors of `ExpertBlocks`, none where it is direct."""
        tiles = -(-self.inner // self.config.gate_up.BLOCK_N)
        weights = _described(self.gate_up, self._up)
        inputs = (self._read, self._read_scale, weights, *self._up_extras)
        pointers = (*inputs, self.act, self._act_scale)
        options = self._launch_options(self.config.gate_up)
        if self.config.is_direct:
            from leanmoe.kernels.triton.experts_direct_program import gate_up_direct

            grid = (self.tokens * self.slots * tiles,)
            last = (self.ids, self.tokens, *self._limits, self._up)
            self.run(gate_up_direct, grid, *pointers, *last, **options)
        else:
            from leanmoe.kernels.triton.experts_program import gate_up_grouped

            most = blocks[1].shape[1]
            ends = (most, *self._limits, self._up)
            grid = (most * tiles * self.config.subblocks,)
            self.run(gate_up_grouped, grid, *pointers, *blocks, *ends, **options)

    def second_product(self, *blocks: Tensor) -> None:
        """Fills in `part`, and where it runs direct also `out`; with a fused sum, `out` alone."""
        tiles = -(-self.width // self.config.down.BLOCK_N)
        weights = _described(self.down, self._down)
        inputs = (self.act, self._act_scale, weights, *self._down_extras)
        pointers = (*inputs, self.part, self.gates)
        options = self._launch_options(self.config.down)
        if self.config.fused_sum:
            from leanmoe.kernels.triton.experts_direct_program import down_fused

            grid = (self.tokens * tiles,)
            last = (self.gates, self.ids, self.out, self.tokens, self._down)
            options.pop("num_stages")  # the program asks ahead by itself
            self.run(down_fused, grid, *inputs, *last, **options)
        elif self.config.is_direct:
            from leanmoe.kernels.triton.experts_direct_program import down_direct

            arrived = zeros_for("experts", tiles, self.hidden.device)
            grid = (self.tokens * self.slots * tiles,)
            last = (self.ids, arrived, self.out, self.tokens, self._down)
            self.run(down_direct, grid, *pointers, *last, **options)
        else:
            from leanmoe.kernels.triton.experts_program import down_grouped

            most = blocks[1].shape[1]
            grid = (most * tiles * self.config.subblocks,)
            self.run(down_grouped, grid, *pointers, *blocks, most, self._down, **options)

    def sum_slots(self) -> None:
        """Fills in `out` from `part`."""
        from leanmoe.kernels.triton.experts_program import add_slots

        columns = min(SUM_COLUMNS, power_of_two(self.width))
        sizes = {"SLOTS": power_of_two(self.slots)}
        grid = (self.tokens, -(-self.width // columns))
        sizes |= {"E": self.experts, "K": self.slots, "D": self.width, "BLOCK_N": columns}
        sizes |= {"USE_PDL": self._has_pdl, **self._after_another()}
        self.run(add_slots, grid, self.part, self.ids, self.out, **sizes)

    def _launch_options(self, tile: Tile) -> dict[str, Any]:
        warps, stages = tile.num_warps, tile.num_stages
        return {"num_warps": warps, "num_stages": stages, **self._after_another()}

    def _after_another(self) -> dict[str, bool]:
        """Lets a program be started while the one before is ending; it waits where it must."""
        return {"launch_pdl": True} if self._has_pdl else {}


def _tile(tile: Tile, is_direct: bool, rows: Tensor | bool) -> dict[str, Any]:
    """`rows` are the weights where they lie in rows that a descriptor can name, else False."""
    # The copy engine wants rows of whole 16 bytes.
    is_describable = isinstance(rows, Tensor) and rows.shape[-1] * rows.itemsize % 16 == 0
    return {
        "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "SWAP_AB": tile.swap_ab,
        "USE_TMA": tile.use_tma and is_describable,
        **({} if is_direct else {"GROUP_M": tile.GROUP_M}),
    }  # fmt: skip


def _described(weights: Tensor, fixed: dict[str, Any]) -> Any:
    """A descriptor of all experts' rows, one below the other, where the program wants one."""
    if not fixed["USE_TMA"]:
        return weights
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = weights.view(-1, weights.shape[-1])
    return TensorDescriptor.from_tensor(rows, [fixed["BLOCK_N"], fixed["BLOCK_K"]])
