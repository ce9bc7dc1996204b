"""The verbs as Python functions: settings are keywords, and what comes back is typed.

    import leanmoe

    results = leanmoe.tune("reference", output="runs/demo", concurrency=(1, 8))

A keyword is a flag of the command line with underscores, and takes a value or the flag's words:
`concurrency=(1, 8)` or `"1,8"`, `margins=0.005` or `"0.2%,0.5%"`. Every function raises
LeanMoeError as its verb does, with near names for a keyword that is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmoe.core.options import make_settings

if TYPE_CHECKING:
    from leanmoe.predict.run import PredictResults
    from leanmoe.results.bench import BenchResults
    from leanmoe.results.eval import EvalResults
    from leanmoe.results.prune import PruneResults
    from leanmoe.results.tune import TuneResults


def tune(
    model: str, *, output: Path | str = "runs/tune", overwrite: bool = False, **settings: Any
) -> TuneResults:
    """Finds a faster plan, proves what it costs, measures what it gains.

    Writes plan.json and results.json into `output`, and takes up what a run left there.
    """
    from leanmoe.tune.run import tune as run
    from leanmoe.tune.settings import TuneSettings

    made = make_settings(TuneSettings, {"model": model, **settings})
    return run(made, Path(output), _call("tune", model, settings), overwrite)


def evaluate(
    model: str,
    *,
    plan: Sequence[Path | str] = (),
    level: Sequence[str] = (),
    rule: Sequence[str] = (),
    output: Path | str = "runs/eval",
    overwrite: bool = False,
    **settings: Any,
) -> EvalResults:
    """Compares plans, from files or as rules in words, with the full model, answer by answer."""
    from leanmoe.eval.run import evaluate as run
    from leanmoe.eval.settings import EvalSettings

    made = make_settings(EvalSettings, {"model": model, **settings})
    command = _call("evaluate", model, {"plan": plan, "level": level, "rule": rule, **settings})
    plans = ([Path(each) for each in plan], level, rule)
    return run(made, *plans, Path(output), command, overwrite)


def bench(
    *targets: str, output: Path | str = "runs/bench", overwrite: bool = False, **settings: Any
) -> BenchResults:
    """Measures throughput and latency over load: of a model and its plans, or of servers."""
    from leanmoe.bench.run import bench as run
    from leanmoe.bench.settings import BenchSettings

    made = make_settings(BenchSettings, {"targets": list(targets), **settings})
    return run(made, Path(output), _call("bench", *targets, settings), overwrite)


def predict(model: str, **settings: Any) -> PredictResults:
    """Predicts what a plan gains on hardware one does not have."""
    from leanmoe.predict.run import predict as run
    from leanmoe.predict.settings import PredictSettings

    return run(make_settings(PredictSettings, {"model": model, **settings}))


def prune(model: str, *, output: Path | str, **settings: Any) -> PruneResults:
    """Writes a checkpoint, or with `as_plan=True` a plan, without the experts that matter least."""
    from leanmoe.prune.run import prune as run
    from leanmoe.prune.settings import PruneSettings

    made = make_settings(PruneSettings, {"model": model, **settings})
    return run(made, Path(output), _call("prune", model, settings))


def _call(verb: str, *arguments: Any) -> str:
    """The call as it could be typed, for provenance; the last argument holds its keywords."""
    *values, keywords = arguments
    words = [repr(value) for value in values]
    words += [f"{name}={value!r}" for name, value in keywords.items()]
    return f"leanmoe.{verb}({', '.join(words)})"
