"""The study's measured part: the paper's shapes, losses that are kept, claims that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.study import quality
from leanmoe.study.quality import SHAPES, Case, QualitySettings, saved_quality, shape_rules
from leanmoe.study.run import _quality_claims, earlier_quality

V3 = Fingerprint("DeepseekV3ForCausalLM", 61, 58, 256, 8)


def ks(name: str, layers: int = 5) -> list[int | None]:
    model = Fingerprint("Made", layers, layers, 64, 8)
    return [rule.top_k for rule in shape_rules(model, SHAPES[name])]


def test_shapes_are_the_papers_lines() -> None:
    assert ks("(6, 8, 8, 61), the paper's best") == [6, 6, 7, 8, 8]
    assert ks("falling, 8 to 4") == [8, 7, 6, 5, 4]
    assert ks("rising, 4 to 8") == [4, 5, 6, 7, 8]
    assert ks("hill, 4 to 8 to 4") == [4, 6, 8, 6, 4]
    assert ks("valley, 8 to 4 to 8") == [8, 6, 4, 6, 8]
    assert ks("falling, 8 to 4", layers=1) == [8]


def test_losses_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(_model: Any, shape: Any, *_rest: Any) -> Iterator[Case]:
        print_ = shape.fingerprint()
        yield Case("k", "k=1", 1, 1.0, Plan.uniform(print_, Rule(top_k=1)))
        yield Case("k", "k=8", 8, 1.0, Plan.uniform(print_, Rule(top_k=8)))

    monkeypatch.setattr(quality, "_cases", few)
    settings = QualitySettings(quick=True)
    found = saved_quality(settings, tmp_path)
    fewest, full = (row["increase"] for row in found["rows"])
    assert fewest["low"] > 0.1
    assert full["ratio"] == pytest.approx(0, abs=1e-4)
    assert found["heldout"]["documents"] >= 20
    monkeypatch.setattr(quality, "measure_quality", lambda _settings: pytest.fail("again"))
    assert saved_quality(settings, tmp_path) == found


RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-pruning.json")), ids=lambda p: p.name)
def test_the_pruning_benchmarks_losses_can_stand_in(path: Path) -> None:
    found = earlier_quality(path)
    groups = {row["group"] for row in found["rows"]}
    assert {"k", "pruning"} <= groups <= {"k", "k, weights kept", "pruning"}
    assert found["heldout"]["documents"] > 20
    claims = [claim["claim"] for claim in _quality_claims(found)]
    assert len(claims) == len(groups) - 1  # by count, and k where weights kept stand beside it


def test_too_little_text() -> None:
    with pytest.raises(LeanMoeError, match="heldout_tokens is 5"):
        QualitySettings(heldout_tokens=5).check()


@pytest.mark.parametrize(("low", "verdict"), [(0.02, "not confirmed"), (-0.01, "partly")])
def test_a_verdict_follows_the_interval(low: float, verdict: str) -> None:
    def row(group: str, name: str, share: float, ratio: float) -> dict[str, Any]:
        increase = {"ratio": ratio, "low": low, "high": ratio + 0.01}
        return {"group": group, "name": name, "share": share, "increase": increase}

    rows = [
        row("k", "k=6", 1.0, 0.03),
        row("k, weights kept", "k=6", 1.0, 0.006),
        row("shape", "(6, 8, 8, 61), the paper's best", 1.0, 0.01),
    ]
    claims = _quality_claims({"rows": rows})
    assert [claim["verdict"] for claim in claims] == [verdict, verdict]
    assert _quality_claims({"rows": []}) == []
