"""The rule row of each row of a step: whose rule it is under, as data that captured steps read.

A row's rule row follows from its request and its position alone. A plan's level i has two: 2i - 1
for reply rows, 2i for prompt rows. A row is a prompt row where nobody reads its own prediction: its
position is before the last of the prompt, and its request asks for no prompt logprobs. Chunks of a
prompt, prefix hits and preemption change nothing of that: the prompt's own length counts, not that
of what is computed again, which after a preemption holds replies, too. Rows of padding, of dummy
steps and of requests that nobody told of have row 0: the model as it was trained.

Both of vLLM's runners prepare a step outside of what graphs capture (V1: `_prepare_inputs`, V2:
`prepare_inputs`; read in 0.24.0 to 0.33.0). Right after that the rows are computed on the host and
copied, in one copy on the step's own stream, into memory that captured steps read. The host knows
all it needs: the positions of a prompt's rows are exact there, and those of replies, which may be
estimates while steps overlap, are never before the prompt's end.

The band of a step is data, too: it follows the reply rows that are really there, padding and prompt
rows not counted. With data parallelism ranks know of each other's padded rows alone, before a step;
there the sum of those picks the band, for a rank with as for one without requests.

Letters: T tokens (rows of a step), S requests (sequences) of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Level, Plan, Rule
from leanmoe.routing.rule_table import TRAINED
from leanmoe.serve.vllm.installation import version
from leanmoe.serve.vllm.padding import rank_share

HEAD = 4
"""Words before the rows in the buffer, the first is the band; so the rows lie at 16 bytes."""
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class ServedRequest:
    """What decides a request's rule rows, beside its prompt's length."""

    prompt_level: int
    reply_level: int
    reads_prompt: bool = False
    """Whether somebody reads the predictions of the prompt's own rows."""


UNKNOWN = ServedRequest(TRAINED, TRAINED)
"""Level 0 is the model as it was trained, as rule row 0 is."""


@dataclass(frozen=True)
class StepRequests:
    """The requests of one step, in the order of its rows, as the host knows them."""

    names: Sequence[str]
    scheduled_S: Ints
    """Rows of each."""
    computed_S: Ints
    """The position of each one's first row."""
    prompt_S: Ints
    """The length of each one's prompt."""


def band_ends(plan: Plan) -> tuple[int, ...]:
    """Where a band of any level ends: a step of more rows is in the next, one beyond the last."""
    bands = [band for level in plan.levels for band in level.bands]
    return tuple(sorted({band.up_to for band in bands if band.up_to is not None}))


def rules_by_band(plan: Plan, layer: int) -> list[list[tuple[Rule, Rule | None]]]:
    """What one MoE layer's rule rows mean in each band: every level's reply and prompt rule."""
    ends = band_ends(plan)
    return [
        [
            (_reply_rule(level, rows, layer), level.prompt[layer] if level.prompt else None)
            for level in plan.levels
        ]
        for rows in (*ends, (ends[-1] if ends else 0) + 1)
    ]


def _reply_rule(level: Level, rows: int, layer: int) -> Rule:
    band = level.band_for(rows)
    return band.rules[layer] if band else Rule()


Levels = Callable[[Any, tuple[int, ...]], tuple[int, int]]
"""The levels of a request's prompt and of its replies, by its parameters and by the step's choice:
what the scheduler decided for the step, which travels with it."""
CHOICE = "leanmoe"
"""The attribute of vLLM's SchedulerOutput that holds a step's choice."""


def first_level(_parameters: Any, _choice: tuple[int, ...]) -> tuple[int, int]:
    """Those of every request of a plan of one level."""
    return 1, 1


def served(parameters: Any, choice: tuple[int, ...], levels: Levels) -> ServedRequest:
    """What a request's parameters say; one that pools (None) reads every row."""
    reads = parameters is None or parameters.prompt_logprobs is not None
    return ServedRequest(*levels(parameters, choice), reads)


def reply_row(level: int) -> int:
    """The rule row of a level's replies."""
    return max(0, 2 * level - 1)


def prompt_row(level: int) -> int:
    """The rule row of a level's prompts."""
    return 2 * level


def row_of(position: int, prompt: int, request: ServedRequest) -> int:
    """One row's rule row, said plainly; `step_rows_of` computes all of a step's at once.

    A prompt's rows are its own level's, also where they are read: what a prompt leaves in the
    key-value cache does not depend on load.
    """
    if position >= prompt - 1:
        return reply_row(request.reply_level)
    row = reply_row if request.reads_prompt else prompt_row
    return row(request.prompt_level)


def step_rows_of(step: StepRequests, requests: Sequence[ServedRequest]) -> tuple[Ints, Ints]:
    """The rule rows [T] of a step, and how many prompt rows each request has [S]."""
    reads_S = np.array([each.reads_prompt for each in requests])
    before_S = np.clip(step.prompt_S - 1 - step.computed_S, 0, step.scheduled_S).astype(np.int32)
    first_S = np.cumsum(step.scheduled_S) - step.scheduled_S
    place_T = np.arange(int(step.scheduled_S.sum())) - np.repeat(first_S, step.scheduled_S)
    replies_S = np.array([reply_row(each.reply_level) for each in requests], dtype=np.int32)
    prompts_S = np.array([row_of(0, 2, each) for each in requests], dtype=np.int32)
    is_prompt_T = place_T < np.repeat(before_S, step.scheduled_S)
    rows_T = np.where(
        is_prompt_T, np.repeat(prompts_S, step.scheduled_S), np.repeat(replies_S, step.scheduled_S)
    )
    return rows_T, np.where(reads_S, 0, before_S)


class RuleRows:
    """The rule rows and the band of the step that runs; one for all layers of a model."""

    def __init__(
        self,
        plan: Plan,
        most_rows: int,
        *,
        is_checked: bool = False,
        has_ranks: bool = False,
        levels: Levels | None = None,
    ) -> None:
        """A step has at most `most_rows` rows; with `is_checked` each step's are compared.

        `has_ranks`: whether data-parallel ranks run each step together. With `levels` a step's
        choice must come with it; None is for a plan of one level.
        """
        self._ends, self._has_ranks = band_ends(plan), has_ranks
        # By level. A level's prompt rows count for a band where it has no rules for them.
        self._counts_prompts = np.array([True, *(not level.prompt for level in plan.levels)])
        self._most, self._is_checked = most_rows, is_checked
        self._levels = levels
        self._choice: tuple[int, ...] = ()
        self._parameters: dict[str, Any] = {}
        self._requests: dict[str, ServedRequest] = {}
        self._buffer: Tensor | None = None
        self._filled = 0

    def hear(self, scheduled: Any) -> None:
        """Learns of a step (vLLM's SchedulerOutput): requests that begin and end, and its choice.

        Raises LeanMoeError where a step comes without the choice that levels need.
        """
        for name in scheduled.finished_req_ids:
            self._requests.pop(name, None)
            self._parameters.pop(name, None)
        choice = () if self._levels is None else getattr(scheduled, CHOICE, None)
        if choice is None and scheduled.num_scheduled_tokens:
            raise LeanMoeError(
                f"vLLM {version()} made a step that does not say at which level it runs: tiers "
                "cannot run there; unset LEANMOE_TIERS and LEANMOE_SLO"
            )
        new = {request.req_id: request.sampling_params for request in scheduled.scheduled_new_reqs}
        self._parameters |= new
        if choice is not None and choice != self._choice:
            self._choice, new = choice, self._parameters
        levels = self._levels or first_level
        for name, parameters in new.items():
            self._requests[name] = served(parameters, self._choice, levels)

    def fill(self, step: StepRequests, device: torch.device) -> None:
        """Writes a real step's rows and band; what lies behind them is the trained model's."""
        requests = [self._requests.get(name, UNKNOWN) for name in step.names]
        rows_T, prompt_rows_S = step_rows_of(step, requests)
        counts_S = self._counts_prompts[[request.prompt_level for request in requests]]
        counted = len(rows_T) - int(prompt_rows_S[~counts_S].sum())
        self._write(rows_T, self.band_of(counted), device)

    def reset(self, device: torch.device) -> None:
        """Before a step without requests: every row is the trained model's."""
        self._write(np.zeros(0, dtype=np.int32), 0, device)

    def band_of(self, counted: int) -> int:
        """The number of the band of a step of which so many rows count."""
        return sum(end < max(1, counted) for end in self._ends)

    def _write(self, rows_T: Ints, band: int, device: torch.device) -> None:
        if len(rows_T) > self._most:
            raise LeanMoeError(
                f"vLLM {version()} runs a step of {len(rows_T)} rows: rule rows are kept for "
                f"{self._most}: set --max-num-batched-tokens to as many"
            )
        if self._buffer is None:
            # Made late: what lies in memory that a model is loaded into is lost to sleep mode.
            with torch.inference_mode(False):
                self._buffer = torch.zeros(HEAD + self._most, dtype=torch.int32, device=device)
                self._bands = torch.arange(len(self._ends) + 1, dtype=torch.int32, device=device)
        words = torch.zeros(HEAD + max(self._filled, len(rows_T)), dtype=torch.int32)
        words[0] = band
        words[HEAD : HEAD + len(rows_T)] = torch.from_numpy(rows_T)
        if device.type == "cuda":
            words = words.pin_memory()  # torch keeps it until the copy is done
        self._buffer[: len(words)].copy_(words, non_blocking=True)
        self._filled = len(rows_T)

    def rows(self, rows: int, sequence_parallel: tuple[int, int] | None = None) -> Tensor:
        """The rule rows [T] of a layer's rows, where captured steps find them, int32.

        `sequence_parallel` is (rank, ranks) where each rank has a share of the step's rows.
        """
        whole = rows
        if sequence_parallel is not None:  # the last ranks may have rows that were added
            whole = min(rows * sequence_parallel[1], max(rows, self._most))
        if self._buffer is None or whole > self._most:
            raise LeanMoeError(
                f"a MoE layer computes {whole} rows, but vLLM {version()} prepared no step of so "
                "many: prompt rules cannot run there; set LEANMOE_DROP=prompt"
            )
        rows_T = self._buffer[HEAD : HEAD + whole]
        if sequence_parallel is None:
            return rows_T
        return rank_share(rows_T, *sequence_parallel, added=TRAINED)

    def band(self, step_rows: int) -> Tensor:
        """The band [1] of the step that runs, int32, where captured steps find it.

        `step_rows` are those of all data-parallel ranks, with padding, where there are any.
        """
        assert self._buffer is not None  # `rows` was asked first
        if not self._has_ranks:
            return self._buffer[:1]
        number = self.band_of(step_rows)
        return self._bands[number : number + 1]

    def check(self, step: StepRequests, starts_S: Tensor, positions_T: Tensor) -> None:
        """Compares what was written with what the device's own positions say, row by row.

        `starts_S` has each request's first row, and the end of the last one's. Raises LeanMoeError
        for a row that differs, or for one behind them that is not the trained model's.
        """
        if not self._is_checked:
            return
        assert self._buffer is not None
        starts, positions = starts_S.tolist(), positions_T.tolist()
        found = self._buffer[HEAD:].tolist()
        wanted = [TRAINED] * self._most
        for number, name in enumerate(step.names):
            request = self._requests.get(name, UNKNOWN)
            for row in range(starts[number], starts[number + 1]):
                wanted[row] = row_of(positions[row], int(step.prompt_S[number]), request)
        for row, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if one != other:
                raise LeanMoeError(
                    f"vLLM {version()}: row {row} of a step of {starts[-1]} has rule row {one}, "
                    f"but should have {other}: set LEANMOE_DROP=prompt and report it"
                )


def follow_v1(runner_class: Any, current: Callable[[], RuleRows | None]) -> None:
    """Has vLLM's V1 runner fill the rule rows; `current` gives those of the model, or None."""
    prepare, dummy = runner_class._prepare_inputs, runner_class._dummy_run
    _hear(runner_class, current)

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, scheduler_output: Any, *more: Any, **others: Any) -> Any:
        prepared = prepare(self, scheduler_output, *more, **others)
        if (rules := current()) is not None:
            batch = self.input_batch
            count = batch.num_reqs
            names = batch.req_ids[:count]
            scheduled = scheduler_output.num_scheduled_tokens
            step = StepRequests(
                names,
                np.array([scheduled[name] for name in names], dtype=np.int32),
                batch.num_computed_tokens_cpu[:count].copy(),
                batch.num_prompt_tokens[:count].copy(),
            )
            rules.fill(step, self.device)
            rules.check(step, self.query_start_loc.gpu[: count + 1], self.positions)
        return prepared

    @functools.wraps(dummy)
    def dummy_run(self: Any, *arguments: Any, **others: Any) -> Any:
        if (rules := current()) is not None:
            rules.reset(self.device)
        return dummy(self, *arguments, **others)

    runner_class._prepare_inputs, runner_class._dummy_run = prepare_inputs, dummy_run


def follow_v2(runner_class: Any, current: Callable[[], RuleRows | None]) -> None:
    """The same for vLLM's V2 runner."""
    prepare = runner_class.prepare_inputs
    _hear(runner_class, current)

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, *arguments: Any, **others: Any) -> Any:
        batch = prepare(self, *arguments, **others)
        if (rules := current()) is not None:
            count = batch.num_reqs
            step = StepRequests(
                batch.req_ids[:count],
                np.asarray(batch.num_scheduled_tokens[:count], dtype=np.int32),
                np.asarray(batch.num_computed_tokens_np[:count], dtype=np.int32),
                self.req_states.prompt_len.np[batch.idx_mapping_np[:count]],
            )
            rules.fill(step, self.device)
            rules.check(step, batch.query_start_loc[: count + 1], batch.positions)
        return batch

    runner_class.prepare_inputs = prepare_inputs


def _hear(runner_class: Any, current: Callable[[], RuleRows | None]) -> None:
    """Tells of each step's new and ended requests; a dummy step of the V2 runner has none."""
    execute = runner_class.execute_model

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *more: Any, **others: Any) -> Any:
        if (rules := current()) is not None:
            if others.get("dummy_run") or any(more[1:2]):
                rules.reset(self.device)
            elif not _is_made_by_hand(scheduler_output):
                rules.hear(scheduler_output)
        return execute(self, scheduler_output, *more, **others)

    runner_class.execute_model = execute_model


BY_HAND = ("_warmup_", "_v2_mixed_warmup_")
"""How requests that no scheduler made are called: those of vLLM, and of `padding.run_step`."""


def _is_made_by_hand(scheduled: Any) -> bool:
    """Whether a step is one of vLLM's warm-up or of leanmoe's own, which run as trained."""
    names = scheduled.num_scheduled_tokens
    return bool(names) and all(name.startswith(BY_HAND) for name in names)
