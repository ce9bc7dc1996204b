"""Replies of the full model and of plans to the same prompts, and how they differ.

Letters: U prompts, Z replies drawn of each, or batch draws, N positions of a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import to_json
from leanmoe.eval.local_tasks import Encoder
from leanmoe.eval.prompts import Prompt, read_prompts
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.runtime import apply, served_experts
from leanmoe.scoring.rows import Applying, ScoredRow
from leanmoe.scoring.writing import divergence_by_position, write_on
from leanmoe.stats.outcomes import difference
from leanmoe.stats.replies import first_divergence, pass_at, repeated_share, until

PARTS = 8
"""Stretches of a reply over which divergence is shown."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

Floats = NDArray[np.float64]


def generation(
    model: Any,
    tokenizer: Any,
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> dict[str, Any]:
    """Everything about replies, as results.json holds it."""
    encoder = Encoder(model, tokenizer)
    prompts = read_prompts(
        Path(str(settings.prompts)), encoder, settings.output_len, settings.limit
    )
    writer = _Writer(model, tokenizer, prompts, settings, folder)
    full = Named(FULL, Plan(plans[0].plan.model))
    replies = writer.greedy(full, 0)
    rows: list[dict[str, Any]] = []
    drawn = writer.drawn(full, 0) if writer.draws else None
    for each in plans:
        batch_draws = settings.batch_draws if each.is_batch_aware(settings.concurrency) else 1
        theirs = [writer.greedy(each, draw) for draw in range(batch_draws)]
        row: dict[str, Any] = {
            "plan": each.name,
            "mixes": batch_draws,
            "agreement": agreement(replies, theirs[0], settings.output_len),
            **_drift(writer, replies, theirs, settings),
            "divergence": writer.divergence(each, full, replies, batch_draws),
        }
        if prompts[0].answer is not None:
            right_U = writer.right(replies)
            found = difference(
                right_U, np.stack([writer.right(t) for t in theirs]), settings.confidence
            )
            row["exact_match"] = to_json(found)
        if drawn is not None:
            plan_drawn = [writer.drawn(each, draw) for draw in range(batch_draws)]
            row["pass_at"] = _pass_at(writer, drawn, plan_drawn, settings)
        rows.append(row)
    return {
        "prompts": len(prompts),
        "tokens": settings.output_len,
        "together": settings.concurrency,
        "samples": writer.draws,
        "temperature": settings.temperature,
        "rows": rows,
    }


class _Writer:
    """Writes replies, each kind stored when it is done."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        settings: EvalSettings,
        folder: RunFolder,
    ) -> None:
        self._model, self._tokenizer, self._folder = model, tokenizer, folder
        self._prompts, self._settings = prompts, settings
        self._experts = served_experts(model)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset(int(end) for end in ends if end is not None)
        self.draws = settings.samples if prompts[0].answer is not None else 0

    def _applying(self, plan: Plan) -> Applying:
        def applying(prompt_tokens: int) -> AbstractContextManager[Any]:
            return apply(
                self._model,
                plan,
                experts=self._experts,
                decode_batch=self._settings.concurrency,
                prompt_tokens=prompt_tokens,
            )

        return applying

    def _write(
        self, each: Named, draw: int, prompts: Sequence[Prompt], kind: str, **how: Any
    ) -> list[list[int]]:
        def compute() -> list[list[int]]:
            return write_on(
                self._model,
                [prompt.ids for prompt in prompts],
                self._settings.output_len,
                self._applying(each.plan),
                f"{kind.capitalize()} replies, {each.name}",
                self._settings.concurrency,
                self._settings.seed + draw,
                **how,
            )

        name = "full" if each.name == FULL else each.digest
        stored: list[list[int]] = self._folder.step(f"{kind}-{name}-{draw}", compute)
        return stored

    def greedy(self, each: Named, draw: int) -> list[list[int]]:
        """The likeliest reply to each prompt."""
        return self._write(each, draw, self._prompts, "greedy")

    def drawn(self, each: Named, draw: int) -> list[list[int]]:
        """Replies drawn at the temperature: those of the first prompt, then of the second."""
        prompts = [prompt for prompt in self._prompts for _ in range(self.draws)]
        how = {"temperature": self._settings.temperature, "draws": self._settings.seed}
        return self._write(each, draw, prompts, "drawn", **how)

    def right(self, replies: Sequence[Sequence[int]]) -> Any:
        """Whether each reply holds its prompt's answer; replies may be several a prompt."""
        each = len(replies) // len(self._prompts)
        texts = [self._tokenizer.decode(until(reply, self.ends)) for reply in replies]
        return np.array(
            [self._prompts[n // each].is_right(text) for n, text in enumerate(texts)], dtype=bool
        )

    def divergence(
        self, each: Named, full: Named, replies: Sequence[Sequence[int]], batch_draws: int
    ) -> dict[str, Any]:
        """KL from the full model along its own replies, by stretches of positions."""
        rows = [
            ScoredRow((*prompt.ids, *reply), len(prompt.ids))
            for prompt, reply in zip(self._prompts, replies, strict=True)
        ]

        def compute(draw: int) -> Callable[[], Any]:
            return lambda: divergence_by_position(
                self._model,
                rows,
                self._applying(full.plan),
                self._applying(each.plan),
                f"Divergence by position, {each.name}",
                self._settings.concurrency,
                self._settings.seed + draw,
            ).tolist()

        found = [self._folder.step(f"kl-{each.digest}-{m}", compute(m)) for m in range(batch_draws)]
        return _by_part(np.mean([np.asarray(kl) for kl in found], axis=0), self._settings)


def agreement(
    full: Sequence[Sequence[int]], plan: Sequence[Sequence[int]], length: int
) -> dict[str, Any]:
    """Where greedy replies first differ; those that never do count as their whole length."""
    found = [first_divergence(a, b) for a, b in zip(full, plan, strict=True)]
    places = np.array([length if place is None else place for place in found])
    return {
        "same": float(np.mean([place is None for place in found])),
        "quantiles": dict(zip(map(str, QUANTILES), _quantiles(places), strict=True)),
        "mean": float(places.mean()),
        "tokens": length,
    }


def _quantiles(values: NDArray[np.int64]) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES, method="lower")]


def _drift(
    writer: _Writer,
    full: Sequence[Sequence[int]],
    plans: Sequence[Sequence[Sequence[int]]],
    settings: EvalSettings,
) -> dict[str, Any]:
    """Repetition and length of greedy replies, plan less full, by prompt."""

    def change(measure: Callable[[list[int]], float]) -> dict[str, Any]:
        before_U = np.array([measure(until(reply, writer.ends)) for reply in full])
        after_ZU = np.array([[measure(until(r, writer.ends)) for r in plan] for plan in plans])
        found = mean_over_prompts(after_ZU.mean(0) - before_U, settings.confidence)
        return {"full": float(before_U.mean()), "plan": float(after_ZU.mean()), **found}

    return {
        "repetition": change(repeated_share),
        "length": change(lambda reply: float(len(reply))),
    }


def _pass_at(
    writer: _Writer,
    full: Sequence[Sequence[int]],
    plans: Sequence[Sequence[Sequence[int]]],
    settings: EvalSettings,
) -> list[dict[str, Any]]:
    """pass@1, and pass@n for the powers of two up to the replies drawn, plan less full."""

    def rates(replies: Sequence[Sequence[int]], tries: int) -> Floats:
        right_UZ = writer.right(replies).reshape(-1, writer.draws)
        return np.array([pass_at(writer.draws, int(n), tries) for n in right_UZ.sum(1)])

    tries = sorted({2**n for n in range(writer.draws.bit_length()) if 2**n <= writer.draws})
    rows = []
    for number in sorted({*tries, writer.draws}):
        full_U = rates(full, number)
        plan_U = np.mean([rates(plan, number) for plan in plans], axis=0)
        found = mean_over_prompts(plan_U - full_U, settings.confidence)
        rows.append(
            {"n": number, "full": float(full_U.mean()), "plan": float(plan_U.mean()), **found}
        )
    return rows


def _by_part(kl_UN: Floats, settings: EvalSettings) -> dict[str, Any]:
    parts = np.array_split(np.arange(kl_UN.shape[1]), min(PARTS, kl_UN.shape[1]))
    rows = [
        {
            "from": int(part[0]),
            "to": int(part[-1]),
            **mean_over_prompts(kl_UN[:, part].mean(1), settings.confidence),
        }
        for part in parts
    ]
    growth_U = kl_UN[:, parts[-1]].mean(1) - kl_UN[:, parts[0]].mean(1)
    return {"parts": rows, "growth": mean_over_prompts(growth_U, settings.confidence)}


def mean_over_prompts(values_U: Floats, confidence: float) -> dict[str, float]:
    """A mean over prompts with its t interval."""
    mean = float(values_U.mean())
    error = float(values_U.std(ddof=1)) / len(values_U) ** 0.5
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(values_U) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach}
