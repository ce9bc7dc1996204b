"""Evaluates the reference model: text, tasks, expert use, and every uniform k.

    python -m reference_model.evaluate --data EVAL [--model FOLDER] [--out evaluation.json]

`EVAL` holds the files that tasks.py names. Results are written after every part; an interrupted
run, started again, goes on after the parts it finished.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from leanmoe.core import provenance
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json
from leanmoe.models.reference import path
from leanmoe.scoring.rows import ScoredRow
from reference_model import tasks
from reference_model.scoring import Scorer
from reference_model.task_files import (
    Item,
    blimp_pairs,
    lambada_rows,
    piqa_choices,
    qasc_choices,
)
from reference_model.tasks import Text

EVALUATION_SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
TRAINED_K_PARTS = ("texts", "expert_use", "lambada", "piqa", "qasc", "blimp")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EvaluateSettings:
    """How much is evaluated at the k below the trained one; the trained k takes everything."""

    tokens_per_text: int = 24_000
    """Of the first windows of as many documents: many documents tell more than long ones."""
    lambada_items: int = 500
    blimp_pairs: int = 20
    """Per paradigm."""
    resamples: int = 10_000
    seed: int = 0


def bits_per_byte(nlls: Floats, sizes: Floats) -> float:
    """Nats over units, bytes of the units: bits per byte of them all."""
    return float(nlls.sum() / sizes.sum() / math.log(2))


def paired_interval(
    changes: Floats, sizes: Floats, resamples: int, seed: int
) -> tuple[float, float]:
    """95% percentile bootstrap, over units, of sum(changes) / sum(sizes), in bits per byte."""
    draw = np.random.default_rng(seed).integers(0, len(changes), (resamples, len(changes)))
    values = changes[draw].sum(axis=1) / sizes[draw].sum(axis=1) / math.log(2)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def share(right: int, of: int) -> dict[str, Any]:
    """A share of right answers with its 95% Wilson interval."""
    z, p = 1.959964, right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return {"accuracy": p, "low": middle - half, "high": middle + half, "items": of}


def unit_nlls(scorer: Scorer, text: Text, what: str) -> Floats:
    """Nats of each unit, over its windows."""
    scores = scorer.score(text.rows, what)
    nlls = np.array([score.nll for score in scores], dtype=np.float64)
    return np.bincount(text.units, weights=nlls).astype(np.float64)


def evaluate_text(text: Text, nlls: Floats) -> dict[str, Any]:
    """Bits per byte and what it was measured over."""
    return {
        "bits_per_byte": bits_per_byte(nlls, text.unit_bytes),
        "bytes": sum(text.row_bytes),
        "tokens": sum(len(row.ids) - 1 for row in text.rows),
        "documents": text.documents,
        "words": text.words,
        "perplexity_per_word": math.exp(float(nlls.sum()) / text.words),
    }


def evaluate_choices(scorer: Scorer, questions: Sequence[Item], what: str) -> dict[str, Any]:
    """Accuracy of the likeliest answer: of its summed log-likelihood, and of that per byte."""
    scores = scorer.score([row for question in questions for row in question.rows], what)
    plain = normalised = start = 0
    for question in questions:
        mine = scores[start : start + len(question.rows)]
        start += len(question.rows)
        nlls = np.array([score.nll for score in mine])
        plain += int(nlls.argmin() == question.right)
        normalised += int((nlls / np.array(question.answer_bytes)).argmin() == question.right)
    return {
        "per_byte": share(normalised, len(questions)),
        "summed": share(plain, len(questions)),
        "choices": len(questions[0].rows),
    }


def evaluate_lambada(scorer: Scorer, rows: Sequence[ScoredRow], what: str) -> dict[str, Any]:
    """Share of last words whose every token is the likeliest one."""
    scores = scorer.score(rows, what)
    return share(sum(score.greedy for score in scores), len(scores))


def evaluate_blimp(
    scorer: Scorer, pairs: dict[str, list[tuple[ScoredRow, ScoredRow]]], what: str
) -> dict[str, Any]:
    """Share of pairs whose good sentence is the likelier; by paradigm and overall."""
    scores = scorer.score([row for items in pairs.values() for pair in items for row in pair], what)
    right: dict[str, int] = {}
    start = 0
    for paradigm, items in pairs.items():
        mine = scores[start : start + 2 * len(items)]
        start += 2 * len(items)
        right[paradigm] = sum(g.nll < b.nll for g, b in zip(mine[::2], mine[1::2], strict=True))
    total = share(sum(right.values()), sum(map(len, pairs.values())))
    return total | {"paradigms": {name: right[name] / len(pairs[name]) for name in pairs}}


def expert_use(counts_LE: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Per layer: least and most used expert relative to even use, entropy share, unused experts."""
    layers: list[dict[str, Any]] = []
    for counts_E in counts_LE:
        shares_E = counts_E / counts_E.sum()
        seen_E = shares_E[shares_E > 0]
        entropy = float(-(seen_E * np.log(seen_E)).sum() / math.log(len(counts_E)))
        layers.append(
            {
                "slots": int(counts_E.sum()),
                "least": float(shares_E.min() * len(counts_E)),
                "most": float(shares_E.max() * len(counts_E)),
                "entropy_share": entropy,
                "unused": int((counts_E == 0).sum()),
            }
        )
    return layers


def weights_sha256(folder: Path) -> str:
    """One digest over the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Evaluation:
    """Collects the parts and writes them as they come."""

    def __init__(self, scorer: Scorer, data: Path, out: Path, settings: EvaluateSettings) -> None:
        self.scorer, self.data, self.out, self.settings = scorer, data, out, settings
        self.texts = {name: tasks.text_rows(scorer, name, data) for name in tasks.TEXTS}
        self.samples = {
            name: tasks.first_windows(text, settings.tokens_per_text, settings.seed)
            for name, text in self.texts.items()
        }
        self.full_nlls: dict[str, Floats] = {}
        """Of the samples, at the trained k."""
        described = provenance.collect("python -m reference_model.evaluate", settings.seed)
        self.results: dict[str, Any] = {
            "schema": EVALUATION_SCHEMA,
            "provenance": described.to_json(),
            "settings": asdict(settings),
            "weights_sha256": weights_sha256(scorer.folder),
            "dtype": "bfloat16",
            "experts_implementation": scorer.model.config._experts_implementation,
            "trained_k": scorer.trained_k,
        }
        self._take_over_finished_parts()

    def _take_over_finished_parts(self) -> None:
        """Those of an earlier run on the same weights; settings touch the uniform k alone."""
        if not self.out.exists():
            return
        earlier = read_json(self.out, "evaluation results")
        same = ("schema", "weights_sha256", "dtype", "trained_k")
        if any(earlier.get(key) != self.results[key] for key in same):
            return
        parts = [*TRAINED_K_PARTS]
        if earlier["settings"] == self.results["settings"]:
            parts.append("uniform_k")
        self.results |= {part: earlier[part] for part in parts if part in earlier}

    def keep(self, part: str, value: Any) -> None:
        """Adds a part and writes the file."""
        self.results[part] = value
        write_json(self.out, self.results)

    def run(self) -> None:
        """All parts that are not there yet, those at the trained k first."""
        scorer, data = self.scorer, self.data
        if "expert_use" not in self.results:
            self.held_out_text()
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "lambada": lambda: evaluate_lambada(scorer, lambada_rows(scorer, data), "LAMBADA"),
            "piqa": lambda: evaluate_choices(scorer, piqa_choices(scorer, data), "PIQA"),
            "qasc": lambda: evaluate_choices(scorer, qasc_choices(scorer, data), "QASC"),
            "blimp": lambda: evaluate_blimp(scorer, blimp_pairs(scorer, data), "BLiMP"),
        }
        for name, part in parts.items():
            if name not in self.results:
                self.keep(name, part())
        for name, sample in self.samples.items():
            self.full_nlls[name] = unit_nlls(scorer, sample, f"{name}, k={scorer.trained_k}")
        done = self.results.get("uniform_k", [])
        for k in range(scorer.trained_k - len(done), 0, -1):
            self.keep("uniform_k", [*self.results.get("uniform_k", []), self.at_k(k)])

    def held_out_text(self) -> None:
        """Bits per byte of every file, and which experts it used."""
        texts: dict[str, Any] = {}
        with self.scorer.counting_experts() as counts_LE:
            for name, text in self.texts.items():
                texts[name] = evaluate_text(text, unit_nlls(self.scorer, text, name))
        self.keep("texts", texts)
        self.keep("expert_use", expert_use(counts_LE.numpy()))

    def at_k(self, k: int) -> dict[str, Any]:
        """The samples and first items at uniform k; each sample paired with the trained k."""
        s, scorer = self.settings, self.scorer
        found: dict[str, Any] = {"k": k, "texts": {}}
        with scorer.uniform_k(k):
            for name, sample in self.samples.items():
                sizes = sample.unit_bytes
                full = self.full_nlls[name]
                same = k == scorer.trained_k
                nlls = full if same else unit_nlls(scorer, sample, f"{name}, k={k}")
                low, high = paired_interval(nlls - full, sizes, s.resamples, s.seed)
                found["texts"][name] = {
                    "bits_per_byte": bits_per_byte(nlls, sizes),
                    "change": bits_per_byte(nlls - full, sizes),
                    "low": low,
                    "high": high,
                    "units": len(sizes),
                    "unit_is": sample.unit_is,
                }
            last_words = lambada_rows(scorer, self.data, s.lambada_items)
            found["lambada"] = evaluate_lambada(scorer, last_words, f"LAMBADA, k={k}")
            pairs = blimp_pairs(scorer, self.data, s.blimp_pairs)
            found["blimp"] = evaluate_blimp(scorer, pairs, f"BLiMP, k={k}")
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate the reference model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation files")
    parser.add_argument("--model", type=Path, help="default: the packaged model")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    try:
        tasks.require_files(given.data)
        scorer = Scorer(given.model or path(), given.device)
        Evaluation(scorer, given.data, given.out, EvaluateSettings()).run()
    except LeanMoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
