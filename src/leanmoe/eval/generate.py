"""Replies of the full model and of plans to the same prompts, and how they differ.

Letters: U prompts, Z replies drawn of each, or batch draws, N positions of a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from leanmoe.core.intervals import MeanChange
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.prompts import Prompt
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.results.eval import (
    Agreement,
    DivergencePart,
    PairedChange,
    PassAt,
    Replies,
    ReplyDivergence,
    ReplyRow,
)
from leanmoe.scoring.rows import ScoredRow, ScoringSetup
from leanmoe.scoring.writing import divergence_by_position, end_tokens, write_on
from leanmoe.stats.outcomes import difference
from leanmoe.stats.replies import first_divergence, pass_at, repeated_share, until
from leanmoe.stats.reply_lengths import compare_lengths, finished_length

PARTS = 8
"""Stretches of a reply over which divergence is shown."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

Floats = NDArray[np.float64]


def generation(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> Replies:
    """Everything about replies, as results.json holds it."""
    writer = _Writer(model, tokenizer, prompts, settings, folder)
    full = Named(FULL, Plan(plans[0].plan.model))
    replies = writer.greedy(full, 0)
    drawn = writer.drawn(full, 0) if writer.draws else None
    rows = []
    for each in plans:
        draws = range(settings.batch_draws if each.is_batch_aware(settings.concurrency) else 1)
        theirs = [writer.greedy(each, draw) for draw in draws]
        exact = None
        passed: tuple[PassAt, ...] = ()
        if prompts[0].answer is not None:
            right_ZU = np.stack([writer.right(replies) for replies in theirs])
            exact = difference(writer.right(replies), right_ZU, settings.confidence)
        if drawn is not None:
            passed = _pass_at(writer, drawn, [writer.drawn(each, draw) for draw in draws])
        rows.append(
            ReplyRow(
                plan=each.name,
                batch_draws=len(draws),
                agreement=agreement(replies, theirs[0], settings.output_len),
                repetition=_changed(writer, repeated_share, replies, theirs),
                length=_changed(writer, len, replies, theirs),
                finished=compare_lengths(
                    writer.lengths(replies),
                    [writer.lengths(each) for each in theirs],
                    settings.output_len,
                    settings.confidence,
                    settings.seed,
                ),
                divergence=writer.divergence(each, full, replies, len(draws)),
                exact_match=exact,
                pass_at=passed,
            )
        )
    return Replies(
        prompts=len(prompts),
        tokens=settings.output_len,
        concurrency=settings.concurrency,
        samples=writer.draws,
        temperature=settings.temperature,
        rows=tuple(rows),
    )


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
        self.confidence = settings.confidence
        self.ends = end_tokens(model)
        self.draws = settings.samples if prompts[0].answer is not None else 0

    def _setup(self, plan: Plan, draw: int) -> ScoringSetup:
        settings = self._settings
        return ScoringSetup.of(self._model, plan, settings.concurrency, settings.seed + draw)

    def _write(
        self, each: Named, draw: int, prompts: Sequence[Prompt], kind: str, **how: Any
    ) -> list[list[int]]:
        def compute() -> list[list[int]]:
            setup, ids = self._setup(each.plan, draw), [prompt.ids for prompt in prompts]
            what = f"{kind.capitalize()} replies, {each.name}"
            return write_on(setup, ids, self._settings.output_len, what, **how)

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

    def lengths(self, replies: Sequence[Sequence[int]]) -> list[int | None]:
        """Tokens of each reply that ends by itself."""
        return [finished_length(reply, self.ends) for reply in replies]

    def right(self, replies: Sequence[Sequence[int]]) -> Any:
        """Whether each reply holds its prompt's answer; replies may be several a prompt."""
        each = len(replies) // len(self._prompts)
        texts = [self._tokenizer.decode(until(reply, self.ends)) for reply in replies]
        return np.array(
            [self._prompts[n // each].is_right(text) for n, text in enumerate(texts)], dtype=bool
        )

    def divergence(
        self, each: Named, full: Named, replies: Sequence[Sequence[int]], batch_draws: int
    ) -> ReplyDivergence:
        """KL from the full model along its own replies, by stretches of positions."""
        rows = [
            ScoredRow((*prompt.ids, *reply), len(prompt.ids))
            for prompt, reply in zip(self._prompts, replies, strict=True)
        ]

        def compute(draw: int) -> Callable[[], Any]:
            return lambda: divergence_by_position(
                self._setup(full.plan, draw),
                self._setup(each.plan, draw),
                rows,
                f"Divergence by position, {each.name}",
            ).tolist()

        found = [self._folder.step(f"kl-{each.digest}-{m}", compute(m)) for m in range(batch_draws)]
        return _by_part(np.mean([np.asarray(kl) for kl in found], axis=0), self.confidence)


def agreement(
    full: Sequence[Sequence[int]], plan: Sequence[Sequence[int]], length: int
) -> Agreement:
    """Where greedy replies first differ; those that never do count as their whole length."""
    found = [first_divergence(a, b) for a, b in zip(full, plan, strict=True)]
    places = np.array([length if place is None else place for place in found])
    quantiles = np.quantile(places, QUANTILES, method="lower").astype(float).tolist()
    return Agreement(
        same=float(np.mean([place is None for place in found])),
        quantiles=dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        mean=float(places.mean()),
        tokens=length,
    )


def _changed(
    writer: _Writer,
    measure: Callable[[list[int]], float],
    full: Sequence[Sequence[int]],
    plans: Sequence[Sequence[Sequence[int]]],
) -> PairedChange:
    """A measure of greedy replies, plan less full, by prompt."""
    before_U = np.array([float(measure(until(reply, writer.ends))) for reply in full])
    after_ZU = np.array([[float(measure(until(r, writer.ends))) for r in plan] for plan in plans])
    change = mean_over_prompts(after_ZU.mean(0) - before_U, writer.confidence)
    return PairedChange(**vars(change), full=float(before_U.mean()), plan=float(after_ZU.mean()))


def _pass_at(
    writer: _Writer,
    full: Sequence[Sequence[int]],
    plans: Sequence[Sequence[Sequence[int]]],
) -> tuple[PassAt, ...]:
    """pass@1, and pass@n for the powers of two up to the replies drawn, plan less full."""

    def rates(replies: Sequence[Sequence[int]], tries: int) -> Floats:
        right_UZ = writer.right(replies).reshape(-1, writer.draws)
        return np.array([pass_at(writer.draws, int(n), tries) for n in right_UZ.sum(1)])

    tries = {2**n for n in range(writer.draws.bit_length()) if 2**n <= writer.draws}
    rows = []
    for number in sorted({*tries, writer.draws}):
        full_U = rates(full, number)
        plan_U = np.mean([rates(plan, number) for plan in plans], axis=0)
        change = mean_over_prompts(plan_U - full_U, writer.confidence)
        shares = {"full": float(full_U.mean()), "plan": float(plan_U.mean())}
        rows.append(PassAt(**vars(change), **shares, n=number))
    return tuple(rows)


def _by_part(kl_UN: Floats, confidence: float) -> ReplyDivergence:
    parts = np.array_split(np.arange(kl_UN.shape[1]), min(PARTS, kl_UN.shape[1]))
    means = [kl_UN[:, part].mean(1) for part in parts]
    return ReplyDivergence(
        parts=tuple(
            DivergencePart(
                **vars(mean_over_prompts(mean_U, confidence)),
                first=int(part[0]),
                last=int(part[-1]),
            )
            for part, mean_U in zip(parts, means, strict=True)
        ),
        growth=mean_over_prompts(means[-1] - means[0], confidence),
    )


def mean_over_prompts(values_U: Floats, confidence: float) -> MeanChange:
    """A mean over prompts with its t interval."""
    mean = float(values_U.mean())
    error = float(values_U.std(ddof=1)) / len(values_U) ** 0.5
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(values_U) - 1)) * error
    return MeanChange(mean, mean - reach, mean + reach)
