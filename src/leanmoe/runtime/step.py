"""Which forward step each token of a call belongs to, and which of the plan's rules it is under.

A served call is one step. A scoring call can stand for the steps that serving would have made:
with `decode_batch` B, position t of every B sequences is a decode step of B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan, Rule


@dataclass(frozen=True)
class StepPart:
    """Tokens of one call that are under the same rules, as steps of equally many tokens."""

    index_BT: Tensor | None
    """Which of the call's T tokens; None for all of them as one step."""
    padding_BT: Tensor | None
    rules: tuple[Rule, ...]
    """One per MoE layer."""
    is_prompt: bool = False


def served_parts(
    plan: Plan, shape_SN: tuple[int, int], padding_SN: Tensor | None, read: Any
) -> tuple[StepPart, ...]:
    """The parts of a served call: its prompt tokens, if the plan has rules for them, and the rest.

    `read` is the call's `logits_to_keep`: how many last positions, or which, have a prediction
    that somebody reads; 0 or None for all.
    """
    padding_T = None if padding_SN is None or not bool(padding_SN.any()) else padding_SN.flatten()
    unread_T = _unread(shape_SN, read) if plan.prompt else None
    if unread_T is None or not bool(unread_T.any()):
        tokens = shape_SN[0] * shape_SN[1] - (0 if padding_T is None else int(padding_T.sum()))
        return (StepPart(None, padding_T, plan.rules_for(max(tokens, 1))),)
    return tuple(
        part
        for part in (
            _some(unread_T, padding_T, plan.prompt, is_prompt=True),
            _some(~unread_T, padding_T, None, plan=plan),
        )
        if part is not None
    )


def scoring_parts(
    plan: Plan,
    shape_SN: tuple[int, int],
    padding_SN: Tensor | None,
    decode_batch: int | None,
    prompt_tokens: int,
) -> tuple[StepPart, ...]:
    """The parts of a scoring call: the first `prompt_tokens` of each sequence, then the rest.

    The rest decodes in steps of `decode_batch` sequences, or is one step without it.
    """
    sequences, length = shape_SN
    step_sequences = decode_batch or sequences
    if sequences % step_sequences:
        raise LeanMoeError(
            f"a call has {sequences} sequences: decode_batch {step_sequences} must divide it"
        )
    padding_T = None if padding_SN is None or not bool(padding_SN.any()) else padding_SN.flatten()
    place_SN = torch.arange(sequences * length).view(sequences, length)
    parts = []
    if prompt_tokens:
        prompt_BT = place_SN[:, :prompt_tokens]
        rules = plan.prompt or plan.rules_for(prompt_tokens)
        parts.append(_part(prompt_BT, padding_T, rules, is_prompt=True))
    if decode_batch is None:
        rest_BT = place_SN[:, prompt_tokens:].reshape(1, -1)
        parts.append(_part(rest_BT, padding_T, plan.rules_for(rest_BT.shape[1])))
    else:
        groups = place_SN[:, prompt_tokens:].reshape(
            sequences // step_sequences, step_sequences, -1
        )
        steps_BT = groups.transpose(1, 2).reshape(-1, step_sequences)
        parts.append(_part(steps_BT, padding_T, plan.rules_for(step_sequences)))
    return tuple(parts)


def _part(
    index_BT: Tensor, padding_T: Tensor | None, rules: tuple[Rule, ...], is_prompt: bool = False
) -> StepPart:
    padding_BT = None if padding_T is None else padding_T[index_BT.to(padding_T.device)]
    return StepPart(index_BT, padding_BT, rules, is_prompt)


def _some(
    chosen_T: Tensor,
    padding_T: Tensor | None,
    rules: tuple[Rule, ...] | None,
    is_prompt: bool = False,
    plan: Plan | None = None,
) -> StepPart | None:
    index_T = chosen_T.nonzero().flatten()
    if not len(index_T):
        return None
    if rules is None:
        assert plan is not None
        padded = 0 if padding_T is None else int(padding_T[index_T].sum())
        rules = plan.rules_for(max(len(index_T) - padded, 1))
    return _part(index_T.unsqueeze(0), padding_T, rules, is_prompt)


def _unread(shape_SN: tuple[int, int], read: Any) -> Tensor | None:
    """True [T] for tokens whose next-token prediction the caller does not ask for."""
    sequences, length = shape_SN
    if read is None or (isinstance(read, int) and (read == 0 or read >= length)):
        return None
    unread_SN = torch.ones(sequences, length, dtype=torch.bool)
    if isinstance(read, int):
        unread_SN[:, length - read :] = False
    else:
        unread_SN[:, torch.as_tensor(read).cpu()] = False
    return unread_SN.flatten()
