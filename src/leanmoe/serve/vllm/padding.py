"""Which rows of a step of vLLM are padding: those that fill it up to a size that was captured.

Letters: T tokens (rows of a step).

`ForwardContext.is_padding` is not enough to know by: the field is there since 0.25, but the V1
runner fills it since 0.31 only (its `_prepare_padding_mask`), and the V2 runner only under
VLLM_MOE_SKIP_PADDING=1, the default since 0.27; without it the field keeps the True of the step
that was captured (`v1/worker/gpu/model_runner.py:880`, `cudagraph_utils.py:503`, both 0.26.0).
Where it is not filled, a row without a place in the KV cache is padding: both runners write -1
behind a step's last row before each step, into the memory that captured steps read
(`_compute_slot_mapping_kernel` of `v1/worker/block_table.py`, `_compute_slot_mappings_kernel` of
`v1/worker/gpu/block_table.py`). `padding_watch` proves that what is read is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.serve.vllm.installation import skips_padding_by_default, version
from leanmoe.serve.vllm.padding_watch import PaddingWatch

KEY = "leanmoe_padding"
"""Where a step's context keeps the mask that was made from its slots."""
RUNNERS = {False: "vllm.v1.worker.gpu_model_runner", True: "vllm.v1.worker.gpu.model_runner"}
"""The modules of vLLM's V1 and V2 runner, by whether it is V2; the class is GPUModelRunner."""
SKIP_PADDING = "VLLM_MOE_SKIP_PADDING"
STATE_LAYER = "MambaBase"
"""The class of layers that keep one state a request: vLLM may write no slots for them."""


class PaddingSource(Enum):
    """Where the mask of a step's padding comes from."""

    MARKED = "vLLM's mask"
    SLOTS = "the slots of the KV cache"
    NONE = "nothing, which does for rules that look at one token alone"


def is_v2(config: Any) -> bool:
    """Whether vLLM runs its V2 model runner."""
    return bool(getattr(config, "use_v2_model_runner", False))


def padding_source(config: Any, rules: Iterable[Rule], number: str) -> PaddingSource:
    """Where to read padding from, under the config of vLLM `number`.

    Raises LeanMoeError for batch-aware rules where vLLM says nothing of padding. Other rules run
    there without a mask: a mask that is wrong would silence rows that are real.
    """
    if _is_marked(config):
        return PaddingSource.MARKED
    refusal = None
    if is_v2(config) and skips_padding_by_default(number):
        refusal = f"with {SKIP_PADDING}=0", f"unset {SKIP_PADDING}"
    elif getattr(config.parallel_config, "decode_context_parallel_size", 1) > 1:
        refusal = "under decode context parallelism", "set --decode-context-parallel-size 1"
    if refusal is None:
        return PaddingSource.SLOTS
    if any(rule.is_batch_aware for rule in rules):
        raise LeanMoeError(
            f"vLLM {number} does not say which rows are padding {refusal[0]}, so batch-aware "
            f"rules cannot run: {refusal[1]}"
        )
    return PaddingSource.NONE


def _is_marked(config: Any) -> bool:
    """Whether the runner that is at work fills `ForwardContext.is_padding` before every step."""
    from vllm.forward_context import ForwardContext

    if not hasattr(ForwardContext, "is_padding"):
        return False
    if is_v2(config):
        return bool(getattr(import_module("vllm.envs"), SKIP_PADDING, False))
    runner = import_module(RUNNERS[False]).GPUModelRunner
    return hasattr(runner, "_prepare_padding_mask")


class StepPadding:
    """Reads the padding of the step that runs; one for all layers of a model."""

    def __init__(self, source: PaddingSource = PaddingSource.SLOTS) -> None:
        self.source = source
        self.watch = PaddingWatch()

    def rows(self, rows: int, sequence_parallel: tuple[int, int] | None = None) -> Tensor | None:
        """True [T] for the running step's padding rows; None outside of a step, or without slots.

        The mask of a step's slots is computed once a step and kept as long as the step's context,
        so that what a graph captured reads what the same graph wrote.

        `sequence_parallel` is (rank, ranks) where each rank has a share of the step's rows. Raises
        LeanMoeError for a layer with more rows than the step.
        """
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if self.source is PaddingSource.NONE or not is_forward_context_available():
            return None
        context = get_forward_context()
        marked = self.source is PaddingSource.MARKED
        mask_T: Tensor | None = context.is_padding if marked else _without_a_slot(context)
        self.watch.note(mask_T)
        if mask_T is None:
            return None
        if sequence_parallel is not None:
            mask_T = rank_share(mask_T, *sequence_parallel)
        if mask_T.shape[0] < rows:
            raise LeanMoeError(
                f"a MoE layer computes {rows} rows, but vLLM {version()} marks padding among "
                f"{mask_T.shape[0]}: batch-aware rules cannot run with tokens gathered before "
                "routing; set --data-parallel-size 1 or another --all2all-backend"
            )
        return mask_T[:rows]


def rank_share(mask_T: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's part of a mask whose rows are divided evenly; rows added for that are padding."""
    padded_T = functional.pad(mask_T, (0, -mask_T.shape[0] % ranks), value=True)
    size = padded_T.shape[0] // ranks
    return padded_T[rank * size : (rank + 1) * size]


def _without_a_slot(context: Any) -> Tensor | None:
    """The rows that have no place in the KV cache; None where the context says nothing of it."""
    if KEY not in context.additional_kwargs:
        slots_T = _slots(context)
        context.additional_kwargs[KEY] = (
            None if slots_T is None else _all_rows(slots_T < 0, context)
        )
    mask_T: Tensor | None = context.additional_kwargs[KEY]
    return mask_T


def _slots(context: Any) -> Tensor | None:
    """The slots [T] of the first layer that keeps keys and values."""
    slots = context.slot_mapping
    if not isinstance(slots, dict):
        return None
    layers = getattr(context, "no_compile_layers", {})
    for name, slots_T in slots.items():
        if STATE_LAYER not in [parent.__name__ for parent in type(layers.get(name)).__mro__]:
            return slots_T  # type: ignore[no-any-return]
    return None


def _all_rows(mask_T: Tensor, context: Any) -> Tensor:
    """The mask of the whole step: vLLM's V1 runner may give slots to its real rows alone."""
    step = getattr(context, "batch_descriptor", None)
    missing = 0 if step is None else step.num_tokens - mask_T.shape[0]
    return functional.pad(mask_T, (0, missing), value=True) if missing > 0 else mask_T
