"""Tasks of lm-evaluation-harness, answered by the full model and by plans.

Letters: U questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.intervals import LossChange
from leanmoe.core.quiet import quiet_loggers
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.stats.losses import Losses
from leanmoe.stats.outcomes import Bools, forecast
from leanmoe.stats.paired import MINIMUM_DOCUMENTS, loss_increase

ROLLING = "loglikelihood_rolling"
"""The harness's kind of task that is a perplexity, as wikitext."""
LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub")
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


def require_harness(settings: EvalSettings) -> None:
    """Raises LeanMoeError unless lm-evaluation-harness is there and knows the tasks."""
    names = settings.tasks
    if find_spec("lm_eval") is None:
        raise LeanMoeError(
            f"tasks {', '.join(names)} need lm-evaluation-harness: pip install 'leanmoe[eval]'; "
            "or --tasks none"
        )
    if settings.engine == "vllm":
        from leanmoe.eval.harness_vllm import require_engine

        require_engine()
    known = set(_manager(settings).all_tasks)
    if unknown := [name for name in names if name not in known]:
        own = " to lm-evaluation-harness; own task files go in --include-path FOLDER"
        raise unknown_name("task", unknown[0], known, own)


def answer_harness(
    model: Any,
    tokenizer: Any,
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> dict[str, dict[str, list[Answers]]]:
    """By plan (the full model first) and task: the answers of each batch draw.

    A plan that is not batch-aware is asked once.
    """
    settings = replace(settings, tasks=_announce(settings))
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

                run = in_vllm(each, settings, folder, _answers)
            else:
                run = _in_process(model, tokenizer, each, settings, draw)
            stored = folder.step(f"harness-{settings.engine}-{key}-{draw}", run)
            for task, judged in stored.items():
                found[each.name].setdefault(task, []).append(_as_answers(judged))
    return found


def _as_answers(judged: dict[str, Any]) -> Answers:
    loss = judged["loss"]
    loss_U = None if loss is None else np.array(loss, dtype=np.float64)
    return Answers(np.array(judged["right"], dtype=bool), loss_U)


def _manager(settings: EvalSettings) -> Any:
    """The harness's index of tasks: of your own folder alone where that has all, which is quick."""
    made, own = import_module("lm_eval.tasks").TaskManager, settings.include_path
    if own is None:
        return _index_of_the_harness()
    with quiet_loggers(*LOGGERS):
        index = made(include_path=own, include_defaults=False)
        has_all = set(settings.tasks) <= set(index.all_subtasks)
        return index if has_all else made(include_path=own)


@cache
def _index_of_the_harness() -> Any:
    with quiet_loggers(*LOGGERS):
        return import_module("lm_eval.tasks").TaskManager()


def _announce(settings: EvalSettings) -> tuple[str, ...]:
    """Loads the tasks' data and says what so many questions can show; the tasks that can run.

    Raises LeanMoeError where data cannot be fetched, and where nothing that was asked for can run.
    """
    manager = _manager(settings)
    count = 0
    able = []
    for name in settings.tasks:
        try:
            with quiet_loggers(*LOGGERS):
                tasks = manager.load([name])["tasks"]
                sizes = {task: len(value.eval_docs) for task, value in tasks.items()}
        except Exception as error:  # datasets, the hub and task code each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeanMoeError(
                f"the data set of task {name} could not be fetched ({reason}); without a network "
                "set HF_HOME to a filled cache, or describe files of yours in task files: "
                "--include-path FOLDER"
            ) from error
        if any(value.OUTPUT_TYPE == ROLLING for value in tasks.values()):
            line = f"task {name} is a perplexity of texts, no questions: give them as --domain"
            if len(settings.tasks) == 1 and not (settings.domain or settings.prompts):
                raise LeanMoeError(f"{line} NAME=FILE")
            print(f"leanmoe: {line}; it is left out", file=sys.stderr)
            continue
        able.append(name)
        for task, size in sizes.items():
            asked = min(size, settings.limit or size)
            count += asked
            line = forecast(task, asked, settings.margin, settings.confidence)
            print(line, file=sys.stderr)
    if len(able) > 1:
        print(
            forecast("all questions", count, settings.margin, settings.confidence), file=sys.stderr
        )
    return tuple(able)


def _in_process(
    model: Any, tokenizer: Any, each: Named, settings: EvalSettings, draw: int
) -> Callable[[], Stored]:
    def compute() -> Stored:
        from leanmoe.eval.harness_model import planned_model

        return _answers(planned_model(model, tokenizer, each, settings, draw), settings)

    return compute


def _answers(made: Any, settings: EvalSettings) -> Stored:
    """What is stored of each task, in the questions' order."""
    with quiet_loggers(*LOGGERS):
        done = import_module("lm_eval").simple_evaluate(
            model=made,
            tasks=list(settings.tasks),
            task_manager=_manager(settings),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return {task: judged(task, samples) for task, samples in done["samples"].items()}


def judged(task: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each question by the first metric and the first filter, and how likely its answers were.

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
        "right": right_or_wrong(task, mine),
        "scores": None if None in scores else scores,
        "loss": None if None in loss else loss,
    }


def right_or_wrong(task: str, samples: Sequence[dict[str, Any]]) -> list[int]:
    """Each question's first metric. Raises LeanMoeError unless 0 or 1."""
    metric = samples[0]["metrics"][0]
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
