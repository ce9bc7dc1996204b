"""Local tasks answered by the full model and by plans, question by question.

Letters: U questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.local_tasks import Task
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.runtime import apply, served_experts
from leanmoe.scoring.rows import Score, ScoredRow, score_rows
from leanmoe.stats.outcomes import Bools
from leanmoe.stats.paired import MINIMUM_DOCUMENTS, Losses, loss_increase


@dataclass(frozen=True)
class Answers:
    """Which questions were right, and what the right answers cost."""

    right_U: Bools
    loss_U: Any
    """Negative log-likelihood of the right answer, nats; None where that is not known."""
    tokens_U: Any


def answer_tasks(
    model: Any,
    tasks: Sequence[Task],
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> dict[str, dict[str, list[Answers]]]:
    """By plan (the full model first) and task: the answers of each batch draw.

    Questions of all tasks share decode batches. A plan that is not batch-aware is asked once.
    """
    rows = [row for task in tasks for item in task.items for row in item.rows]
    items = [item for task in tasks for item in task.items]
    questions = [number for number, item in enumerate(items) for _ in item.rows]
    full = Named(FULL, Plan(plans[0].plan.model))
    found: dict[str, dict[str, list[Answers]]] = {}
    for each in (full, *plans):
        batch_draws = settings.batch_draws if each.is_batch_aware(settings.concurrency) else 1
        found[each.name] = {task.name: [] for task in tasks}
        for draw in range(batch_draws):
            score = _scoring(model, each, rows, questions, settings, draw)
            stored = folder.step(f"tasks-{_step(each, full)}-{draw}", score)
            scores = [Score(nll, bool(greedy)) for nll, greedy in zip(*stored, strict=True)]
            for name, answers in _judged(tasks, scores).items():
                found[each.name][name].append(answers)
    return found


def loss_changes(
    full: Answers, plan: Sequence[Answers], settings: EvalSettings
) -> dict[str, Any] | None:
    """Relative increase of the right answers' loss: far more sensitive than who is right.

    None where there are too few questions.
    """
    if full.loss_U is None or len(full.loss_U) < MINIMUM_DOCUMENTS:
        return None
    names = tuple(map(str, range(len(full.loss_U))))
    mean_U = np.mean([answers.loss_U for answers in plan], axis=0)
    before = Losses(names, full.loss_U, full.tokens_U)
    after = Losses(names, mean_U, full.tokens_U)
    return loss_increase(before, after, settings.confidence, settings.seed).to_json()


def _step(each: Named, full: Named) -> str:
    return "full" if each is full else each.digest


def _scoring(
    model: Any,
    each: Named,
    rows: Sequence[ScoredRow],
    questions: Sequence[int],
    settings: EvalSettings,
    draw: int,
) -> Callable[[], Any]:
    experts = served_experts(model)

    def applying(prompt_tokens: int) -> AbstractContextManager[Any]:
        return apply(
            model,
            each.plan,
            experts=experts,
            decode_batch=settings.concurrency,
            prompt_tokens=prompt_tokens,
        )

    def compute() -> Any:
        what = f"Tasks, {each.name}" + (f", batch draw {draw + 1}" if draw else "")
        seed = settings.seed + draw
        scores = score_rows(model, rows, questions, applying, what, settings.concurrency, seed)
        return [[score.nll for score in scores], [int(score.greedy) for score in scores]]

    return compute


def _judged(tasks: Sequence[Task], scores: Sequence[Score]) -> dict[str, Answers]:
    found: dict[str, Answers] = {}
    start = 0
    for task in tasks:
        right, loss, tokens = [], [], []
        for item in task.items:
            mine = scores[start : start + len(item.rows)]
            start += len(item.rows)
            right.append(item.is_right(mine))
            loss.append(mine[item.right].nll)
            tokens.append(item.rows[item.right].reply)
        found[task.name] = Answers(
            np.array(right), np.array(loss, dtype=np.float64), np.array(tokens, dtype=np.int64)
        )
    return found
