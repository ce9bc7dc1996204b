"""What `leanmoe eval` is asked to do; its defaults stand here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.parsing import flag, require

PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "openbookqa", "rte", "winogrande")
"""Those of arXiv 2505.03531."""
ENGINES = ("transformers", "vllm")


@dataclass(frozen=True)
class EvalSettings:
    """The settings of one run; plans are no part of them, so that more can be added to a run."""

    model: str
    tasks: tuple[str, ...] = PAPER_TASKS
    data: str | None = None
    """A folder with task files; names in `quality.local_tasks` are read from it."""
    include_path: str | None = None
    """A folder with lm-evaluation-harness task files of one's own."""
    limit: int | None = None
    """Questions of each task at most: its first."""
    num_fewshot: int | None = None
    concurrency: int = 1
    """Requests that decode in one step."""
    batch_draws: int = 3
    """Runs in other company, for plans whose rules depend on it."""
    margin: float = 0.01
    """Largest loss of accuracy that is accepted, in shares: 0.01 is one point."""
    confidence: float = 0.95
    engine: str = "transformers"
    prompts: str | None = None
    """A file of prompts to write on from."""
    output_len: int = 128
    samples: int = 0
    """Replies drawn per prompt with an answer, for pass@1 and pass@n."""
    temperature: float = 1.0
    domains: tuple[tuple[str, str], ...] = ()
    """Names and text files."""
    calibrate: str | None = None
    """CRITERION:KEEP, to rank experts on each domain."""
    domain_tokens: int = 16384
    """Of held-out text for each domain, and as many to rank experts on."""
    seed: int = 0
    dtype: str | None = None
    trust_remote_code: bool = False

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
            raise LeanMoeError(f"engine is {self.engine!r}: it must be {' or '.join(ENGINES)}")
        if self.engine == "vllm":
            self._check_vllm()
        if self.calibrate is not None and not self.domains:
            raise LeanMoeError("--calibrate ranks experts on each --domain: none is given")
        for folder in (self.data, self.include_path):
            if folder is not None and not Path(folder).is_dir():
                raise LeanMoeError(f"{folder} is no folder")
        if self.calibrate is not None:
            from leanmoe.eval.domains import calibration  # needs torch, and --help must not

            calibration(self.calibrate)
        if self.prompts is not None and not Path(self.prompts).is_file():
            raise LeanMoeError(f"prompts {self.prompts} is no file")
        for name, file in self.domains:
            if not Path(file).exists():
                raise LeanMoeError(f"domain {name}: {file} does not exist")
        _require_once("task", self.tasks)
        _require_once("domain", [name for name, _ in self.domains])

    def _check_vllm(self) -> None:
        """vLLM runs the harness's tasks; what else is asked for would not be run in it."""
        others = {"data": self.data, "prompts": self.prompts, "domain": self.domains}
        if given := [name for name, value in others.items() if value]:
            raise LeanMoeError(
                f"--engine vllm runs lm-evaluation-harness's tasks alone: --{given[0]} needs "
                "--engine transformers"
            )
        if not self.tasks:
            raise LeanMoeError(
                "--engine vllm runs lm-evaluation-harness's tasks: none is asked for"
            )

    def to_json(self) -> dict[str, Any]:
        """As a run's settings.json holds them."""
        value = asdict(self)
        value["tasks"] = list(self.tasks)
        value["domains"] = [list(pair) for pair in self.domains]
        return value


def _require_once(what: str, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LeanMoeError(f"{what} {twice[0]!r} is given twice")
