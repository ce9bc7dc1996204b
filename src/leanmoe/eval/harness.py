"""Tasks of lm-evaluation-harness, answered by the full model and by plans.

Letters: U questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import LossChange
from leanmoe.core.quiet import quiet_loggers
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.harness_tasks import LOGGERS, AskedTasks, task_manager
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.stats.losses import Losses
from leanmoe.stats.outcomes import Bools
from leanmoe.stats.paired import MINIMUM_DOCUMENTS, loss_increase

Stored = dict[str, dict[str, Any]]
"""By task: "right", 1 or 0 by question; "scores", the log-likelihoods of each question's answers;
"loss", that of the right one (nats). The last two are None where the task has none."""


@dataclass(frozen=True)
class Answers:
    """Which questions were right, and what the right answers cost."""

    right_U: Bools
    loss_U: Any
    """Negative log-likelihood of the right answer, nats; None where that is not known."""


def loss_changes(
    full: Answers, plan: Sequence[Answers], settings: EvalSettings
) -> LossChange | None:
    """Relative increase of the right answers' loss: far more sensitive than who is right.

    None where there are too few questions.
    """
    if full.loss_U is None or len(full.loss_U) < MINIMUM_DOCUMENTS:
        return None
    names = tuple(map(str, range(len(full.loss_U))))
    ones_U = np.ones(len(names), dtype=np.int64)
    mean_U = np.mean([answers.loss_U for answers in plan], axis=0)
    before, after = Losses(names, full.loss_U, ones_U), Losses(names, mean_U, ones_U)
    return loss_increase(before, after, settings.confidence, settings.seed)


def answer_harness(
    model: Any,
    tokenizer: Any,
    plans: Sequence[Named],
    asked: AskedTasks,
    folder: RunFolder,
) -> dict[str, dict[str, list[Answers]]]:
    """By plan (the full model first) and task: the answers of each batch draw.

    A plan that is not batch-aware is asked once.
    """
    settings = asked.settings
    judge = partial(_answers, metrics=asked.metrics)
    full = Named(FULL, Plan(plans[0].plan.model))
    found: dict[str, dict[str, list[Answers]]] = {}
    for each in (full, *plans):
        scope = each.is_batch_aware(settings.concurrency)
        batch_draws = settings.batch_draws if scope and settings.engine == "transformers" else 1
        found[each.name] = {}
        if not settings.tasks:
            continue
        for draw in range(batch_draws):
            key = "full" if each is full else each.digest
            if settings.engine == "vllm":
                from leanmoe.eval.harness_vllm import in_vllm

                run = in_vllm(each, settings, folder, judge)
            elif settings.engine == "sglang":
                from leanmoe.eval.harness_sglang import in_sglang

                run = in_sglang(each, settings, folder, judge)
            else:
                run = _in_process(model, tokenizer, each, draw, settings, judge)
            stored = folder.step(f"harness-{settings.engine}-{key}-{draw}", run)
            for task, judged in stored.items():
                found[each.name].setdefault(task, []).append(_as_answers(judged))
    return found


def _as_answers(judged: dict[str, Any]) -> Answers:
    loss = judged["loss"]
    loss_U = None if loss is None else np.array(loss, dtype=np.float64)
    return Answers(np.array(judged["right"], dtype=bool), loss_U)


def _in_process(
    model: Any,
    tokenizer: Any,
    each: Named,
    draw: int,
    settings: EvalSettings,
    judge: Callable[[Any, EvalSettings], Stored],
) -> Callable[[], Stored]:
    def compute() -> Stored:
        from leanmoe.eval.harness_model import planned_model

        return judge(planned_model(model, tokenizer, each, settings, draw), settings)

    return compute


def _answers(made: Any, settings: EvalSettings, metrics: Mapping[str, str]) -> Stored:
    """What is stored of each task, in the questions' order."""
    with quiet_loggers(*LOGGERS):
        done = import_module("lm_eval").simple_evaluate(
            model=made,
            tasks=list(settings.tasks),
            task_manager=task_manager(settings),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return {task: judged(task, samples, metrics[task]) for task, samples in done["samples"].items()}


def judged(task: str, samples: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Each question by the metric and the first filter, and how likely its answers were.

    Raises LeanMoeError for a task that is not right or wrong.
    """
    first = samples[0].get("filter")
    mine = sorted(
        (sample for sample in samples if sample.get("filter") == first),
        key=lambda sample: int(sample["doc_id"]),
    )
    scores = [_log_likelihoods(sample) for sample in mine]
    loss = [_loss(sample, each) for sample, each in zip(mine, scores, strict=True)]
    return {
        "right": right_or_wrong(task, mine, metric),
        "scores": None if None in scores else scores,
        "loss": None if None in loss else loss,
    }


def right_or_wrong(task: str, samples: Sequence[dict[str, Any]], metric: str) -> list[int]:
    """Each question's metric. Raises LeanMoeError unless 0 or 1."""
    values = [float(sample[metric]) for sample in samples]
    if bad := [value for value in values if value not in (0.0, 1.0)]:
        raise LeanMoeError(
            f"task {task} is judged by {metric}, which is {bad[0]:g} on a question: only tasks "
            "that are right or wrong can be compared here"
        )
    return [int(value) for value in values]


def _log_likelihoods(sample: dict[str, Any]) -> list[float] | None:
    """Log-likelihoods of a question's answers; None where it is answered with a text."""
    replies = sample["filtered_resps"]
    if any(isinstance(reply, str) for reply in replies):
        return None
    return [float(score) for score, _greedy in replies]


def _loss(sample: dict[str, Any], scores: list[float] | None) -> float | None:
    """Negative log-likelihood of the right answer; None where the task does not number it."""
    if scores is None:
        return None
    if len(scores) == 1:
        return -scores[0]
    number = str(sample.get("target", ""))
    return -scores[int(number)] if number.isdigit() and int(number) < len(scores) else None
