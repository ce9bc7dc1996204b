"""Replies written token by token, as many requests at once as a service has.

Letters: S requests of a call, P columns of prompts, N columns of a call, T predicted tokens,
D hidden width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.scoring.divergence import Head
from leanmoe.scoring.rows import Laid, ScoredRow, ScoringSetup, bundled, calls

REQUESTS_AT_ONCE = 32
"""Requests of one call, unless a decode batch is larger."""


@torch.inference_mode()
def write_on(
    setup: ScoringSetup,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    what: str,
    temperature: float | None = None,
    draws: int = 0,
    ends: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """`new_tokens` tokens after each prompt; none stops early, so that the decode batch stays full.

    With end tokens in `ends` a call stops once all of its replies have ended.
    The likeliest token is taken, or one is drawn at `temperature`. Draws depend on `draws`, the
    prompt's number and the position alone, so that models with the same distribution write the
    same. Every decode batch of requests shares a step, in an order that is drawn; the last step
    is filled up with others. Raises LeanMoeError when there are fewer prompts than that, or the
    model reads fewer tokens.
    """
    decode_batch = setup.decode_batch
    _require_room(setup, prompts, new_tokens)
    order = list(range(len(prompts)))
    draw = random.Random(setup.seed)
    draw.shuffle(order)
    missing = -len(order) % decode_batch
    order += draw.sample(order[: len(order) - (decode_batch - missing)], missing)
    size = decode_batch * max(1, REQUESTS_AT_ONCE // decode_batch)
    replies: dict[int, list[int]] = {}
    with bar(what, len(order) * new_tokens, "tokens") as advance:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            noise = None if temperature is None else _GumbelNoise(chosen, temperature, draws)
            written = _write(setup, [prompts[n] for n in chosen], new_tokens, noise, ends)
            for number, reply in zip(chosen, written.tolist(), strict=True):
                replies.setdefault(number, reply)
            advance(len(chosen) * new_tokens)
    return [replies[number] for number in range(len(prompts))]


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a reply; none where the model's generation settings have none."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(int(end) for end in ends if end is not None)


class _GumbelNoise:
    """Draws tokens by the Gumbel-max trick: the token of largest logit / temperature + noise."""

    def __init__(self, numbers: Sequence[int], temperature: float, draws: int) -> None:
        self._temperature = temperature
        self._sources = [
            np.random.Generator(np.random.Philox(key=draws * 1_000_003 + number))
            for number in numbers
        ]

    def choose(self, logits_SV: Tensor) -> Tensor:
        noise_SV = np.stack([source.gumbel(size=logits_SV.shape[1]) for source in self._sources])
        scores_SV = logits_SV.double().cpu() / self._temperature + torch.from_numpy(noise_SV)
        return scores_SV.argmax(-1).to(logits_SV.device)


def _write(
    setup: ScoringSetup,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    noise: _GumbelNoise | None,
    ends: frozenset[int],
) -> Tensor:
    from transformers import DynamicCache

    model = setup.model
    width = max(map(len, prompts))
    ids_SP = torch.full((len(prompts), width), int(prompts[0][0]))
    mask_SN = torch.zeros((len(prompts), width + new_tokens), dtype=torch.long)
    for number, prompt in enumerate(prompts):
        ids_SP[number, width - len(prompt) :] = torch.tensor(list(prompt))
        mask_SN[number, width - len(prompt) :] = 1
    device, cache = model.device, DynamicCache(config=model.config)
    mask_SN = mask_SN.to(device)
    positions_SN = (mask_SN.cumsum(1) - 1).clamp(min=0)

    def step(ids: Tensor, start: int, end: int) -> Tensor:
        done = model(
            input_ids=ids,
            attention_mask=mask_SN[:, :end],
            position_ids=positions_SN[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_SV = done.logits[:, -1].float()
        if not bool(logits_SV.isfinite().all()):
            raise LeanMoeError("the model's logits are not finite numbers while it writes")
        return logits_SV.argmax(-1) if noise is None else noise.choose(logits_SV)

    with setup.applying(width - 1):
        written = [step(ids_SP.to(device), 0, width)]
    last = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    ended_S = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with setup.applying(0):
        for place in range(width, width + new_tokens - 1):
            ended_S |= torch.isin(written[-1], last)
            if bool(ended_S.all()):
                break
            written.append(step(written[-1][:, None], place, place + 1))
    return torch.stack(written, dim=1).cpu()


@torch.inference_mode()
def divergence_by_position(
    full: ScoringSetup, plan: ScoringSetup, rows: Sequence[ScoredRow], what: str
) -> NDArray[np.float64]:
    """KL(full ‖ plan), nats, [rows, positions of the reply]: both read the row's own tokens.

    Each model's keys and values are its own from the first token on, so what goes wrong early
    stays in the context of what comes later. All replies must be equally long.
    """
    if len({row.reply for row in rows}) != 1:
        raise LeanMoeError("replies of different lengths have no common positions")
    model = full.model
    head = Head.of(model)
    kl = np.zeros((len(rows), rows[0].reply))
    bundles = bundled(rows, range(len(rows)))
    with bar(what, sum(len(row.ids) for row in rows), "tokens") as advance:
        for call in calls(bundles, full.decode_batch, full.seed):
            laid = Laid.of(call.bundles)
            hidden = []
            for setup in (full, plan):
                with setup.applying(laid.prompt_tokens):
                    hidden_SND = laid.run(model)
                hidden.append(hidden_SND.flatten(0, 1)[laid.place_T.to(model.device)])
            kl_ST = _kl(head, *hidden).reshape(len(call.bundles), -1)
            for bundle, is_scored, kl_T in zip(call.bundles, call.scored, kl_ST, strict=True):
                if is_scored:
                    kl[bundle.numbers[0]] = kl_T
                    advance(len(bundle.rows[0].ids))
    return kl


def _kl(head: Head, full_TD: Tensor, plan_TD: Tensor) -> NDArray[np.float64]:
    log_full_T, _, expected_TD = head.expected(full_TD)
    log_plan_T = head.log_normaliser(plan_TD)
    kl_T = (
        head.crossed(expected_TD, full_TD)
        - log_full_T.double()
        - head.crossed(expected_TD, plan_TD)
        + log_plan_T.double()
    )
    if not bool(kl_T.isfinite().all()):
        raise LeanMoeError("the model's logits are not finite numbers: check the plan")
    found: NDArray[np.float64] = kl_T.cpu().numpy()
    return found


def _require_room(setup: ScoringSetup, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    if len(prompts) < setup.decode_batch:
        raise LeanMoeError(
            f"decode_batch is {setup.decode_batch}: there are {len(prompts)} prompts, too few "
            "for a step"
        )
    if not min(map(len, prompts)):
        raise LeanMoeError("a prompt has no token")
    most = getattr(setup.model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + new_tokens
    if most is not None and longest > most:
        raise LeanMoeError(
            f"a prompt with its reply has {longest} tokens; the model reads at most {most}"
        )
