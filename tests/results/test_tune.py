"""Results of tune are read as they were written, those of older days too."""

from __future__ import annotations

from dataclasses import replace

from leanmoe.core.intervals import Margin
from leanmoe.core.provenance import MadeWith, StepsMadeWith
from leanmoe.plan import Rule
from leanmoe.results.tune import TuneResults
from tests.results.committed import committed, content, without_nulls


def test_committed_results_are_read_and_written_alike() -> None:
    for path in committed("leanmoe_results"):
        assert without_nulls(TuneResults.load(path).to_json()) == without_nulls(content(path))
    results = TuneResults.load(committed("leanmoe_results")[0])
    assert results.verdicts[2].accepted
    assert results.sensitivity.candidates[0].rule == Rule(top_k=7, renormalise=0.0)
    assert (results.confidence, results.keep) == (0.95, None)
    assert results.margins == {"": Margin(0.005)}


def test_prompt_rules_are_named_where_a_band_is_empty() -> None:
    results = TuneResults.load(committed("leanmoe_results")[0])
    at_work = [results.at_work(verdict) for verdict in results.verdicts]
    assert at_work == ["prompt rules alone", "the plan", "the plan"]
    none = replace(results, verdicts=tuple(replace(v, accepted=False) for v in results.verdicts))
    assert {none.at_work(verdict) for verdict in none.verdicts} == {"full model"}
    kept = replace(none, settings={**none.settings, "keep": "75%"})
    assert {kept.at_work(verdict) for verdict in kept.verdicts} == {"the experts kept"}


def test_steps_say_what_they_were_made_with() -> None:
    made = StepsMadeWith("0.1", "abc", "2", "5", "w", "m", steps=("full", "gain-1"))
    assert isinstance(made, MadeWith)
    assert list(made.to_json()["steps"]) == ["full", "gain-1"]
