"""lm-evaluation-harness's own model class, with answers scored in decode batches.

Imported only where the harness is installed.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from leanmoe.eval.settings import EvalSettings
from leanmoe.plan.named_plans import Named
from leanmoe.runtime import apply, served_experts
from leanmoe.scoring.rows import ScoredRow, ScoringSetup, score_rows


def planned_model(
    model: Any, tokenizer: Any, each: Named, settings: EvalSettings, draw: int
) -> Any:
    """A model for the harness that answers under a plan; `draw` seeds who shares a decode batch."""
    made = PlannedHFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings.concurrency,
        device=str(model.device),
    )
    made.plan_by(each, settings, draw)
    return made


class PlannedHFLM(HFLM):  # type: ignore[misc]
    """Tokenises, truncates and stops as the harness does; scores and writes under a plan."""

    def plan_by(self, each: Named, settings: EvalSettings, draw: int) -> None:
        """Sets the plan to answer under, and which batch draw this is."""
        self._each, self._settings, self._draw = each, settings, draw
        self._questions: list[int] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of answers; the answers of one question never share a decode batch."""
        del disable_tqdm
        names = [(request.task_name, request.doc_id) for request in requests]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self._questions = [numbers[name] for name in names]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._questions = []

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, override_bs
        rows = []
        for _texts, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            rows.append(ScoredRow(tuple(ids), max(1, len(ids) - len(continuation))))
        settings = self._settings
        seed = settings.seed + self._draw
        setup = ScoringSetup.of(self.model, self._each.plan, settings.concurrency, seed)
        questions = self._questions or list(range(len(rows)))
        scores = score_rows(setup, rows, questions, f"Harness, {self._each.name}")
        return [(-score.nll, score.greedy) for score in scores]

    def _model_generate(self, context: Any, **settings: Any) -> Any:
        """Writes replies in decode batches, as steps of a service."""
        with apply(self.model, self._each.plan, experts=served_experts(self.model)):
            return super()._model_generate(context, **settings)
