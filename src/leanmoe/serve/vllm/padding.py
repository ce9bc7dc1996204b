"""Which rows of a step of vLLM are padding, those that fill it up to a size that was captured.

Letters: T tokens (rows of a step).

`ForwardContext.is_padding` is not enough to know by: the field is there since 0.25, but the V1
runner fills it since 0.31 only (its `_prepare_padding_mask`), and the V2 runner only under
VLLM_MOE_SKIP_PADDING=1, the default since 0.27; without it the field keeps the True of the step
that was captured (`v1/worker/gpu/model_runner.py:880`, `cudagraph_utils.py:503`, both 0.26.0).
Where it is not filled, a row without a place in the KV cache is padding: both runners write -1
behind a step's last row before each step, into the memory that captured steps read
(`_compute_slot_mapping_kernel` of `v1/worker/block_table.py`, `_compute_slot_mappings_kernel` of
`v1/worker/gpu/block_table.py`).

`PaddingWatch` proves that what is read is right. vLLM says of a real step how many rows it has
(`SchedulerOutput.total_num_scheduled_tokens`). The first real steps of each size are compared; and
when vLLM has captured its graphs, two small steps are run for that, before any request is served.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.serve.vllm.installation import skips_padding_by_default, version

logger = logging.getLogger("vllm.leanmoe")

EAGER_CHECKS = 8
"""So many real steps that no graph captured are compared; each makes the host wait once."""


class PaddingWatch:
    """Holds on to the masks that layers read, and compares those of the first real steps."""

    def __init__(self) -> None:
        self._captured: dict[int, list[Tensor]] = {}
        """The masks that captured graphs read, by their number of rows."""
        self._eager: Tensor | None = None
        self._is_noted = False
        self._proven: set[int] = set()
        self._eager_left = EAGER_CHECKS

    def note(self, mask_T: Tensor | None) -> None:
        """Keeps the mask that a layer reads in the step that runs or is captured."""
        if mask_T is not None and mask_T.is_cuda and torch.cuda.is_current_stream_capturing():
            masks = self._captured.setdefault(mask_T.shape[0], [])
            if not any(mask_T is mask for mask in masks):
                masks.append(mask_T)
            return
        self._eager, self._is_noted = mask_T, True

    def forget(self) -> None:
        """Lets go of all masks: the graphs that read them are captured anew."""
        self._captured.clear()
        self._proven.clear()

    def begin(self, rows: int) -> None:
        """Before a real step of `rows` rows: makes the masks wrong that its graph should write."""
        self._eager, self._is_noted = None, False
        if (size := self._size(rows)) not in self._proven:
            for mask_T in self._captured.get(size, []):
                mask_T.copy_(~_wanted(mask_T, rows))

    def end(self, rows: int) -> None:
        """After it: raises LeanMoeError if its layers read another mask than that of its rows."""
        if self._is_noted:
            if self._eager_left > 0:
                self._eager_left -= 1
                self._compare(rows, [self._eager])
            return
        size = self._size(rows)
        if size in self._captured and size not in self._proven:
            self._compare(rows, self._captured[size])
            self._proven.add(size)

    def _size(self, rows: int) -> int:
        """The smallest captured size that holds `rows` rows: the one that vLLM replays."""
        return min((size for size in self._captured if size >= rows), default=0)

    def _compare(self, rows: int, masks: Sequence[Tensor | None]) -> None:
        """Raises LeanMoeError unless one of a step's masks, of its several graphs, is right."""
        read = [mask_T for mask_T in masks if mask_T is not None and mask_T.shape[0] >= rows]
        if any(torch.equal(mask_T, _wanted(mask_T, rows)) for mask_T in read):
            return
        said = "nothing of padding"
        if read:
            marked = [row for row, is_padding in enumerate(read[0].tolist()) if is_padding]
            said = f"that of {read[0].shape[0]} rows {marked[:8]} are padding"
        raise LeanMoeError(
            f"vLLM {version()} says {said} in a step of {rows} tokens: the plan would choose "
            "wrongly: set VLLM_USE_V2_MODEL_RUNNER to the other of 0 and 1, or use a plan with "
            "top_k alone"
        )


def _wanted(mask_T: Tensor, rows: int) -> Tensor:
    return torch.arange(mask_T.shape[0], device=mask_T.device) >= rows


def watch_runner(runner_class: Any, current: Callable[[], PaddingWatch | None]) -> None:
    """Has a model runner of vLLM tell of its real steps, and prove the graphs that it captured.

    `current` gives the watch of the model that was loaded last; None where nothing is watched.
    """
    execute, capture = runner_class.execute_model, runner_class.capture_model

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *more: Any, **others: Any) -> Any:
        watch, rows = current(), scheduler_output.total_num_scheduled_tokens
        is_dummy = others.get("dummy_run") or any(more[1:2])
        if watch is None or is_dummy or not rows:
            return execute(self, scheduler_output, *more, **others)
        watch.begin(rows)
        returned = execute(self, scheduler_output, *more, **others)
        watch.end(rows)
        return returned

    @functools.wraps(capture)
    def capture_model(self: Any, *more: Any, **others: Any) -> Any:
        if (watch := current()) is None:
            return capture(self, *more, **others)
        watch.forget()
        returned = capture(self, *more, **others)
        if not others.get("profile_only"):
            prove(self)
        return returned

    runner_class.execute_model, runner_class.capture_model = execute_model, capture_model


def prove(runner: Any) -> None:
    """Runs small real steps that vLLM pads to a captured size: requests of one token, then one.

    Every rank runs them. Where they cannot be made by hand, the first real steps are compared.
    Raises LeanMoeError where the padding is wrong, or where vLLM cannot run them.
    """
    config = runner.vllm_config
    if reason := unproven_reason(config):
        logger.info("leanmoe: padding is compared at the first requests: %s", reason)
        return
    rows = padded_rows(config)
    if rows is None:
        return
    try:
        for prompts in ([1] * rows, [rows]):
            run_step(runner, prompts)
    except LeanMoeError:
        raise
    except Exception as error:  # vLLM's private interfaces, which changed
        raise LeanMoeError(
            f"vLLM {version()} cannot run the step that proves its padding "
            f"({type(error).__name__}: {error}): use a plan with top_k alone, or unset LEANMOE_PLAN"
        ) from error
    logger.info("leanmoe: padding was read right in captured steps of %d tokens", rows)


def unproven_reason(config: Any) -> str | None:
    """Why no step can be made by hand under vLLM's config; None if one can."""
    if config.parallel_config.pipeline_parallel_size > 1:
        return "the model is divided into stages"
    if getattr(config.parallel_config, "use_ubatching", False):
        return "steps are cut in two"
    if config.speculative_config is not None:
        return "a draft speculates"
    if getattr(config, "kv_transfer_config", None) is not None:
        return "keys and values are transferred"
    model = config.model_config
    if getattr(model, "is_encoder_decoder", False) or model.runner_type != "generate":
        return "the model does not generate from a prompt alone"
    return None


def padded_rows(config: Any) -> int | None:
    """The fewest rows that vLLM pads to a captured size; None where it pads none."""
    sizes = sorted(getattr(config.compilation_config, "cudagraph_capture_sizes", None) or [])
    most = config.scheduler_config.max_num_seqs
    for smaller, size in zip([0, *sizes], sizes, strict=False):
        if size - smaller > 1 and size - 1 <= most:
            return int(size - 1)
    return None


def run_step(runner: Any, prompts: list[int]) -> None:
    """One step of new requests with prompts of so many tokens, and one that ends them.

    Their keys and values go to the block that vLLM keeps for nothing (number 0).
    """
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    groups = runner.kv_cache_config.kv_cache_groups
    known = {field.name for field in dataclasses.fields(NewRequestData)}
    requests = []
    for number, tokens in enumerate(prompts):
        blocks = [-(-tokens // group.kv_cache_spec.block_size) for group in groups]
        request = {
            "req_id": f"_warmup_leanmoe_{number}",
            "prompt_token_ids": [0] * tokens,
            "prefill_token_ids": [0] * tokens,
            "mm_features": [],
            "sampling_params": SamplingParams(temperature=0, max_tokens=1),
            "pooling_params": None,
            "block_ids": tuple([0] * count for count in blocks),
            "num_computed_tokens": 0,
            "lora_request": None,
        }
        fitting = {name: value for name, value in request.items() if name in known}
        requests.append(NewRequestData(**fitting))
    step, ending = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    step.scheduled_new_reqs = requests
    step.num_scheduled_tokens = {
        request.req_id: tokens for request, tokens in zip(requests, prompts, strict=True)
    }
    step.total_num_scheduled_tokens = sum(prompts)
    ending.finished_req_ids = set(step.num_scheduled_tokens)
    for output in (step, ending):
        if hasattr(output, "num_common_prefix_blocks"):
            output.num_common_prefix_blocks = [0] * len(groups)
    with torch.inference_mode():
        runner.execute_model(step)
        runner.sample_tokens(None)
        runner.execute_model(ending)


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


def rank_share(rows_T: Tensor, rank: int, ranks: int, added: int = True) -> Tensor:
    """This rank's part of rows that are divided evenly, a mask's or others; those that are added
    for that are `added`: padding."""
    padded_T = functional.pad(rows_T, (0, -rows_T.shape[0] % ranks), value=added)
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
