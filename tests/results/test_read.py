"""A folder's results are told apart by the key of their schema version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import ResultsFile
from leanmoe.results.bench import BenchResults
from leanmoe.results.eval import EvalResults
from leanmoe.results.read import read_any
from leanmoe.results.study import StudyResults
from leanmoe.results.tune import TuneResults
from tests.results.committed import committed


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TuneResults, "results.json"),
        (BenchResults, "results.json"),
        (EvalResults, "results.json"),
        (StudyResults, "study.json"),
    ],
)
def test_each_verbs_results_are_found(tmp_path: Path, kind: type[ResultsFile], name: str) -> None:
    shutil.copy(committed(kind.KIND)[0], tmp_path / name)
    assert type(read_any(tmp_path)) is kind


def test_what_is_of_no_verb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"leanmoe_profile": 1}))
    with pytest.raises(LeanMoeError, match="they hold none of leanmoe_results, leanmoe_bench"):
        read_any(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"results\.json"):
        read_any(tmp_path)
