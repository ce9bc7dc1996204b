"""What `leanmoe eval` is asked to do; its defaults stand here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import (
    DTYPE_HELP,
    MODEL_HELP,
    SEED_HELP,
    TRUST_HELP,
    argument,
    option,
    percent_text,
)
from leanmoe.core.parsing import flag, parse_share, require

PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "openbookqa", "rte", "winogrande")
"""Those of arXiv 2505.03531."""
ENGINES = ("transformers", "vllm", "sglang")


def parse_tasks(name: str, text: str) -> tuple[str, ...]:
    """Reads "boolq,piqa"; "none" is no task."""
    del name
    tasks = tuple(task.strip() for task in text.split(",") if task.strip())
    return () if tasks == ("none",) else tasks


def parse_domain(name: str, text: str) -> tuple[str, str]:
    """Reads "NAME=FILE". Raises LeanMoeError for anything else."""
    domain, _, file = text.partition("=")
    if not domain or not file:
        raise LeanMoeError(f"{name} is {text!r}: it must be NAME=FILE")
    return domain, file


@dataclass(frozen=True)
class EvalSettings:
    """The settings of one run; plans are no part of them, so that more can be added to a run."""

    model: str = argument(MODEL_HELP)
    tasks: tuple[str, ...] = option(
        PAPER_TASKS,
        "Tasks of lm-evaluation-harness, comma separated; 'none' for none.",
        parse=parse_tasks,
        text=", ".join,
    )
    include_path: str | None = option(
        None, "A folder with lm-evaluation-harness task files of your own."
    )
    limit: int | None = option(None, "Questions of each task, and prompts, at most: the first.")
    num_fewshot: int | None = option(None, "Examples before each question of the harness.")
    concurrency: int = option(1, "Requests that decode in one step of your service.")
    batch_draws: int = option(
        3, "Random batches that each answer is scored in, for plans with batch-aware rules."
    )
    margin: float = option(
        0.01,
        "Largest loss of accuracy to accept, in percentage points.",
        parse=partial(parse_share, in_points=True),
        text=percent_text,
    )
    confidence: float = option(0.95, "Confidence of every interval and verdict.")
    engine: str = option(
        "transformers", "transformers; vllm or sglang with leanmoe's plugin (harness tasks only)."
    )
    prompts: str | None = option(
        None, "A .jsonl file of prompts to reply to, with answers or without."
    )
    output_len: int = option(128, "Reply tokens for each of the --prompts.")
    samples: int = option(
        0, "Replies drawn for each prompt with an answer: they give pass@1 to pass@n."
    )
    temperature: float = option(1.0, "Temperature of drawn replies.")
    domain: tuple[tuple[str, str], ...] = option(
        (), "A text to test on, as NAME=FILE; may be repeated.", parse=parse_domain, repeats=True
    )
    transfer: str | None = option(
        None,
        "A folder of a finished tune run: its plan is put to the run's own test on each --domain.",
    )
    calibrate: str | None = option(
        None, "CRITERION:KEEP, like easy-ep:75%: adds a plan ranked on each --domain."
    )
    domain_tokens: int = option(
        16384, "Held-out tokens of each domain to test on, and as many to rank experts on."
    )
    seed: int = option(0, SEED_HELP)
    dtype: str | None = option(None, DTYPE_HELP)
    trust_remote_code: bool = option(False, TRUST_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for the first setting out of range."""
        require(0 < self.margin < 1, "--margin", f"{self.margin:g}", "above 0 and below 100%")
        require(0.5 < self.confidence < 1, "--confidence", self.confidence, "above 0.5, below 1")
        for name in ("concurrency", "batch_draws", "output_len", "domain_tokens"):
            value = getattr(self, name)
            require(value >= 1, flag(name), value, "at least 1")
        require(self.samples >= 0, "--samples", self.samples, "0 or more")
        require(self.temperature > 0, "--temperature", self.temperature, "above 0")
        if self.limit is not None:
            require(self.limit >= 1, "--limit", self.limit, "at least 1")
        if self.engine not in ENGINES:
            raise LeanMoeError(f"engine is {self.engine!r}: it must be {', '.join(ENGINES)}")
        if self.engine != "transformers":
            self._check_engine()
        for name in ("transfer", "calibrate"):
            if getattr(self, name) is not None and not self.domain:
                raise LeanMoeError(f"--{name} works on each --domain: none is given")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise LeanMoeError(f"{self.include_path} is no folder")
        if self.calibrate is not None:
            from leanmoe.prune.criteria import CRITERIA  # needs torch, and --help must not

            CRITERIA[self.calibration()[0]]
        if self.prompts is not None and not Path(self.prompts).is_file():
            raise LeanMoeError(f"prompts {self.prompts} is no file")
        for name, file in self.domain:
            if not Path(file).exists():
                raise LeanMoeError(f"domain {name}: {file} does not exist")
        _require_once("task", self.tasks)
        _require_once("domain", [name for name, _ in self.domain])

    def calibration(self) -> tuple[str, str]:
        """Criterion and share of --calibrate; raises LeanMoeError for words unlike easy-ep:75%."""
        name, _, keep = str(self.calibrate).rpartition(":")
        if not name or not keep:
            raise LeanMoeError(f"--calibrate is {self.calibrate!r}: it must be like easy-ep:75%")
        return name, keep

    def _check_engine(self) -> None:
        """vLLM and SGLang run the harness's tasks; what else is asked for would not be run."""
        others = {"prompts": self.prompts, "domain": self.domain}
        if given := [name for name, value in others.items() if value]:
            raise LeanMoeError(
                f"--engine {self.engine} runs lm-evaluation-harness's tasks alone: "
                f"--{given[0]} needs --engine transformers"
            )
        if not self.tasks:
            raise LeanMoeError(
                f"--engine {self.engine} runs the harness's tasks: none is asked for"
            )


def _require_once(what: str, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LeanMoeError(f"{what} {twice[0]!r} is given twice")
