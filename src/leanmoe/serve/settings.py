"""What `leanmoe serve` and `leanmoe export` are asked to do; every default stands here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import MODEL_HELP, argument, option
from leanmoe.core.parsing import require
from leanmoe.serve.load_control import Slo

SERVERS = ("auto", "vllm", "sglang", "transformers")
LEVEL_HELP = "The level of the plan to run, where it has several."
TIERS_HELP = "Let requests name their level; --level is then that of those that name none."
SLO_HELP = "Limits that load changes levels for, like tpot=30ms,ttft=500ms. It includes --tiers."
DROP_HELP = "A part of the plan to leave out: prompt. May be repeated."


@dataclass(frozen=True)
class ServeSettings:
    """The settings of one server."""

    model: str = argument(MODEL_HELP, "")
    engine_arguments: tuple[str, ...] = argument(
        "Arguments that are passed on to vLLM or SGLang; put -- before them.", (), repeats=True
    )
    plan: Path | None = option(
        None, "A plan.json; without one the full model is served. With commas several."
    )
    host: str = option("127.0.0.1", "The address to listen at.")
    port: int = option(8000, "The port to listen at.")
    engine: str = option("auto", "vllm, sglang, transformers, or auto: vLLM where it is installed.")
    level: str | None = option(None, LEVEL_HELP)
    drop: tuple[str, ...] = option((), DROP_HELP, repeats=True)
    tiers: bool = option(False, TIERS_HELP)
    slo: str | None = option(None, SLO_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for a setting that is not allowed."""
        known = self.engine in SERVERS
        require(known, "--engine", repr(self.engine), f"one of {', '.join(SERVERS)}")
        if self.slo is not None:
            Slo.parse(self.slo)
        if (self.tiers or self.slo) and self.plan is None:
            raise LeanMoeError("--tiers and --slo need the levels of a plan: give one with --plan")
        if self.level and self.plan is None:
            raise LeanMoeError(f"--level {self.level} is one of a plan's: give one with --plan")
        if self.drop and self.plan is None:
            raise LeanMoeError(
                f"--drop {self.drop[0]} leaves out a part of a plan: give one with --plan"
            )
        require(0 < self.port < 65536, "--port", self.port, "1 to 65535")


@dataclass(frozen=True)
class ExportSettings:
    """The settings of one recipe."""

    plan: Path = argument("The file of a plan.")
    engine: str = option("vllm", "The engine: vllm, sglang, llama.cpp or transformers.")
    model: str = option("MODEL", "A folder or a Hub name, for the command that is printed.")
    level: str | None = option(None, LEVEL_HELP)
    drop: tuple[str, ...] = option((), DROP_HELP, repeats=True)
    gguf_arch: str | None = option(None, "llama.cpp's name of the model's architecture.")

    def check(self) -> None:
        """Nothing that stands by itself can be wrong: `export` checks plan and engine."""
