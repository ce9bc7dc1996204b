"""Tasks of lm-evaluation-harness, answered by the full model and by plans.

Letters: U questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.quiet import quiet_loggers
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.answers import Answers
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.stats.outcomes import forecast

LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub")
Stored = dict[str, dict[str, Any]]
"""By task: "right", 1 or 0 by question; "scores", the log-likelihoods of each question's answers;
"loss", that of the right one (nats). The last two are None where the task has none."""


def require_harness(names: Sequence[str], settings: EvalSettings) -> None:
    """Raises LeanMoeError unless lm-evaluation-harness is there and knows the tasks."""
    if find_spec("lm_eval") is None:
        raise LeanMoeError(
            f"tasks {', '.join(names)} need lm-evaluation-harness: pip install 'leanmoe[eval]'; "
            "for local files of blimp, lambada, piqa and qasc give --data FOLDER"
        )
    if settings.engine == "vllm":
        from leanmoe.eval.harness_vllm import require_engine

        require_engine()
    known = set(_manager(names, settings).all_tasks)
    if unknown := [name for name in names if name not in known]:
        own = " to lm-evaluation-harness; own task files go in --include-path FOLDER"
        raise unknown_name("task", unknown[0], known, own)


def answer_harness(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> dict[str, dict[str, list[Answers]]]:
    """By plan (the full model first) and task: the answers of each batch draw."""
    _announce(names, settings)
    full = Named(FULL, Plan(plans[0].plan.model))
    found: dict[str, dict[str, list[Answers]]] = {}
    for each in (full, *plans):
        scope = each.is_batch_aware(settings.concurrency)
        batch_draws = settings.batch_draws if scope and settings.engine == "transformers" else 1
        found[each.name] = {}
        for draw in range(batch_draws):
            key = "full" if each is full else each.digest
            if settings.engine == "vllm":
                from leanmoe.eval.harness_vllm import in_vllm

                run = in_vllm(each, names, settings, folder, _answers)
            else:
                run = _in_process(model, tokenizer, each, names, settings, draw)
            stored = folder.step(f"harness-{settings.engine}-{key}-{draw}", run)
            for task, judged in stored.items():
                found[each.name].setdefault(task, []).append(_as_answers(judged))
    return found


def _as_answers(judged: dict[str, Any]) -> Answers:
    right_U = np.array(judged["right"], dtype=bool)
    if judged["loss"] is None:
        return Answers(right_U, None, None)
    loss_U = np.array(judged["loss"], dtype=np.float64)
    return Answers(right_U, loss_U, np.ones(len(loss_U), dtype=np.int64))


def _manager(names: Sequence[str], settings: EvalSettings) -> Any:
    """The harness's index of tasks: of your own folder alone where that has all, which is quick."""
    made, own = import_module("lm_eval.tasks").TaskManager, settings.include_path
    if own is None:
        return _index_of_the_harness()
    with quiet_loggers(*LOGGERS):
        index = made(include_path=own, include_defaults=False)
        has_all = set(names) <= set(index.all_subtasks)
        return index if has_all else made(include_path=own)


@cache
def _index_of_the_harness() -> Any:
    with quiet_loggers(*LOGGERS):
        return import_module("lm_eval.tasks").TaskManager()


def _announce(names: Sequence[str], settings: EvalSettings) -> None:
    """Loads the tasks' data and says what so many questions can show."""
    manager = _manager(names, settings)
    count = 0
    for name in names:
        try:
            with quiet_loggers(*LOGGERS):
                tasks = manager.load([name])["tasks"]
                sizes = {task: len(value.eval_docs) for task, value in tasks.items()}
        except Exception as error:  # datasets, the hub and task code each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeanMoeError(
                f"the data set of task {name} could not be fetched ({reason}); without a network "
                "set HF_HOME to a filled cache, or give local files: --data FOLDER, or "
                "--include-path FOLDER with task files of your own"
            ) from error
        for task, size in sizes.items():
            asked = min(size, settings.limit or size)
            count += asked
            line = forecast(task, asked, settings.margin, settings.confidence)
            print(line, file=sys.stderr)
    if len(names) > 1:
        print(
            forecast("all questions", count, settings.margin, settings.confidence), file=sys.stderr
        )


def _in_process(
    model: Any,
    tokenizer: Any,
    each: Named,
    names: Sequence[str],
    settings: EvalSettings,
    draw: int,
) -> Callable[[], Stored]:
    def compute() -> Stored:
        from leanmoe.eval.harness_model import planned_model

        return _answers(planned_model(model, tokenizer, each, settings, draw), names, settings)

    return compute


def _answers(made: Any, names: Sequence[str], settings: EvalSettings) -> Stored:
    """What is stored of each task, in the questions' order."""
    with quiet_loggers(*LOGGERS):
        done = import_module("lm_eval").simple_evaluate(
            model=made,
            tasks=list(names),
            task_manager=_manager(names, settings),
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
