"""The harness's model class under an empty plan answers as the harness's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leanmoe.eval.settings import EvalSettings
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, Named
from leanmoe.runtime import load_model
from tests.eval.test_harness import WHY
from tests.eval.test_run import write_tasks


def test_answers_are_the_harness_own(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WHY)
    tasks = write_tasks(tmp_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from leanmoe.eval.harness_model import planned_model

    model, tokenizer = load_model("reference")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def asked(made: Any) -> Any:
        how: dict[str, Any] = {"bootstrap_iters": 0, "task_manager": manager}
        return simple_evaluate(made, tasks=["things"], **how)["samples"]["things"]

    plain = asked(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"))
    settings = EvalSettings("reference", concurrency=4)
    empty = Named(FULL, Plan(read_shape("reference").fingerprint()))
    ours = asked(planned_model(model, tokenizer, empty, settings, 0))
    for one, other in zip(plain, ours, strict=True):
        for (was, _), (now, _) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert now == pytest.approx(was, abs=1e-3)
