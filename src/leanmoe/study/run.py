"""`leanmoe study` from top to bottom: the study modelled and measured, the claims judged."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.core.provenance import collect
from leanmoe.core.schema import from_json, to_json
from leanmoe.predict.constants import shipped
from leanmoe.results.study import SearchedLoad, SearchedPlan, StudiedQuality, StudyResults
from leanmoe.results.tune import TuneResults
from leanmoe.study.claims import quality_claims, speed_claims
from leanmoe.study.settings import StudySettings
from leanmoe.study.simulated import analysis, banded, u_shapes, v2_lite
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
    overhead = nine["step_overhead_ms"] / 1e3
    content: dict[str, Any] = {
        StudyResults.KIND: StudyResults.VERSION,
        "provenance": collect(command, settings.seed).to_json(),
        "analysis": analysis(),
        "table_9": nine,
        "what_moves": what_moves(),
        "v2_lite": v2_lite(overhead),
        "u_shapes": u_shapes(),
        "banded": banded(overhead),
        "quality": to_json(quality),
        "searched": to_json(searched),
        "accuracy": accuracy(),
        "claims": [],
    }
    results = StudyResults.from_json(to_json(content))
    claims = speed_claims(results.table_9, results.v2_lite, results.banded, results.analysis)
    claims += [] if quality is None else quality_claims(quality)
    results = replace(results, claims=tuple(claims))
    results.write(output / RESULTS)
    return results


def find_quality(settings: StudySettings, output: Path, command: str) -> StudiedQuality | None:
    """The study's section on quality: measured now, read from an earlier study, or none."""
    if settings.quality == "none":
        return None
    if settings.quality == "measured":
        from leanmoe.study.quality import QualitySettings, saved_quality

        measured = QualitySettings(
            settings.model, settings.text, quick=settings.quick, seed=settings.seed
        )
        return saved_quality(measured, output, command)
    return earlier_quality(Path(settings.quality))


def accuracy() -> list[dict[str, Any]]:
    """How far off the shipped constants have been, kernel by kernel."""
    return [
        {
            "kernel": kernel.kernel,
            "dtype": kernel.dtype,
            "gpu": kernel.gpu,
            "accuracy": [asdict(each) for each in kernel.accuracy],
        }
        for kernel in shipped().kernels
    ]


def earlier_quality(path: Path) -> StudiedQuality:
    """Measured quality of an earlier study, or of `benchmarks.pruning.measure` (k and criteria).

    Raises LeanMoeError where there is none.
    """
    content = read_json(path, "study")
    try:
        section = content.get("quality") or {
            "label": "measured",
            "model": "reference",
            "text": content["text"],
            "quick": False,
            "provenance": content["provenance"],
            "heldout": content["heldout"],
            "rows": [_pruning_row(row) for row in content["rows"] if row["criterion"] != "full"],
        }
        return from_json(StudiedQuality, section, "quality")
    except (AttributeError, KeyError, LeanMoeError, TypeError, ValueError) as error:
        raise LeanMoeError(f"study {path} holds no measured quality") from error


def _pruning_row(row: dict[str, Any]) -> dict[str, Any]:
    name, kept, _ = str(row["criterion"]).partition(", weights kept")
    is_k = name.startswith("k=")
    return {
        "group": f"k{kept}" if is_k else "pruning",
        "name": name,
        "slots": float(name.removeprefix("k=")) if is_k else None,
        "share": float(str(row["keep"]).removesuffix("%")) / 100,
        "increase": row["increase"],
    }


def searched_plan(path: Path) -> SearchedPlan:
    """What a plan that `leanmoe tune` found gave where it was measured, load by load.

    Raises LeanMoeError for a file that is not a tune run's results.
    """
    try:
        results = TuneResults.read(path)
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
