"""The picture of pruning is drawn from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.pruning.picture import GROUPS, picture

ROOT = Path(__file__).parents[3]


def test_the_committed_picture_is_what_the_newest_results_say() -> None:
    newest = sorted((ROOT / "benchmarks/results").glob("*-pruning.json"))[-1]
    drawn = picture(json.loads(newest.read_text()))
    assert drawn == (ROOT / "docs/assets/pruning.svg").read_text()
    words = {each.text for each in ElementTree.fromstring(drawn)}
    assert set(GROUPS) <= words
