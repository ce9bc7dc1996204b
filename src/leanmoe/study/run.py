"""`leanmoe study` from top to bottom: the study modelled and measured, the claims judged."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import collect
from leanmoe.predict.constants import shipped
from leanmoe.results.study import (
    ErrorSummary,
    KernelErrors,
    SearchedLoad,
    SearchedPlan,
    StudiedQuality,
    StudyResults,
)
from leanmoe.results.tune import TuneResults
from leanmoe.study.claims import claims_of
from leanmoe.study.settings import StudySettings
from leanmoe.study.simulated import U_SHAPES, analysis, banded, u_shape, v2_lite
from leanmoe.study.table_9 import table_9, what_moves

RESULTS, PAGE = "study.json", "study.html"


def study(settings: StudySettings, output: Path, command: str) -> StudyResults:
    """Runs everything, writes study.json into folder `output`, returns the results.

    Raises LeanMoeError for a setting that is not allowed and for files that are not what it says.
    """
    settings.check()
    searched = None if settings.tuned is None else searched_plan(settings.tuned)
    quality = find_quality(settings, output, command)
    nine = table_9()
    overhead = nine.step_overhead_ms / 1e3
    results = StudyResults(
        provenance=collect(command, settings.seed),
        analysis=analysis(),
        table_9=nine,
        what_moves=what_moves(),
        v2_lite=v2_lite(overhead),
        u_shapes=tuple(u_shape(name, place) for name, place in U_SHAPES.items()),
        banded=banded(overhead),
        quality=quality,
        searched=searched,
        accuracy=accuracy(),
        claims=(),
    )
    results = replace(results, claims=tuple(claims_of(results)))
    results.save(output / RESULTS)
    return results


def find_quality(settings: StudySettings, output: Path, command: str) -> StudiedQuality | None:
    """The study's section on quality: measured now, read from an earlier study, or none."""
    if settings.quality == "none":
        return None
    if settings.quality == "measured":
        from leanmoe.study.quality import saved_quality

        return saved_quality(settings, output, command)
    path = Path(settings.quality)
    earlier = StudyResults.load(path).quality
    if earlier is None:
        raise LeanMoeError(f"study {path} holds no measured quality")
    return earlier


def accuracy() -> tuple[KernelErrors, ...]:
    """How far off the shipped constants have been, kernel by kernel."""
    return tuple(
        KernelErrors(
            kernel.kernel,
            kernel.dtype,
            kernel.gpu,
            tuple(ErrorSummary(**asdict(each)) for each in kernel.accuracy),
        )
        for kernel in shipped().kernels
    )


def searched_plan(path: Path) -> SearchedPlan:
    """What a plan that `leanmoe tune` found gave where it was measured, load by load.

    Raises LeanMoeError for a file that is not a tune run's results.
    """
    try:
        results = TuneResults.load(path)
    except LeanMoeError as error:
        raise LeanMoeError(f"{path} is not the results.json of leanmoe tune: {error}") from error
    return SearchedPlan(
        "measured",
        results.model.name,
        results.provenance.hardware,
        results.provenance.commit,
        tuple(
            SearchedLoad(each.concurrency, each.accepted, each.gain, each.loss)
            for each in results.verdicts
        ),
        results.confidence,
    )
