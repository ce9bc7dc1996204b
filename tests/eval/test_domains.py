"""Domains: how a text is cut into a half to calibrate on and a half to test on."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.eval.domains import read_domain
from tests.eval.test_run import leanmoe


def test_few_documents_are_cut_into_passages_of_which_none_is_in_both_halves(
    tmp_path: Path,
) -> None:
    text = "\n<|endoftext|>\n".join(
        "\n".join(f"document {n}, paragraph {p}. " * 30 for p in range(40)) for n in range(3)
    )
    (tmp_path / "few.txt").write_text(text)
    found = read_domain("few", tmp_path / "few.txt")
    assert found.unit == "passages"
    first = {document.text for document in found.calibration}
    assert len(first) >= 3
    assert not first & {document.text for document in found.heldout}


def test_sections_of_a_plain_file_are_dealt_to_both_halves(tmp_path: Path) -> None:
    paragraphs = (" ".join(f"word{n}x{m}" for m in range(250)) for n in range(60))
    (tmp_path / "plain.txt").write_text("\n\n".join(paragraphs))
    found = read_domain("plain", tmp_path / "plain.txt")
    assert abs(len(found.calibration) - len(found.heldout)) <= 1
    assert not {d.text for d in found.calibration} & {d.text for d in found.heldout}


def test_a_domain_too_short_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text(
        "\n\n".join(" ".join(f"{n}x{m} word" for m in range(250)) for n in range(12))
    )
    short = ["--domain", f"short={tmp_path / 'short.txt'}", "--tasks", "none"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n' * 10)
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl")]
    out = tmp_path / "run"
    assert leanmoe("eval", "reference", "--rule", "top_k=6", *short, *prompts, "-o", str(out)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "domain short: too few documents for 0.95 confidence" in said
    assert "give a longer text, or more than 16384 --domain-tokens" in said
    assert [path.name for path in out.iterdir()] == ["settings.json"]
