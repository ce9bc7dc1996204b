"""What `leanmoe predict` and `leanmoe calibrate` are asked to do; every default stands here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import MODEL_HELP, argument, numbers_text, option
from leanmoe.core.parsing import parse_counts, require

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SWEPT_CONCURRENCY = tuple(2**n for n in range(15))
SWEPT_GPUS = 8
CALIBRATE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FEWEST_TOKENS, MOST_TOKENS = 3, 65536
SCOPES = ("rank", "all")
SWEEPS_ALONE = "--output, --tpot, --ttft and --price go with --sweep"
LENGTHS_HELP = "a number, 512:2048 (even), 1024~0.8 (log-normal: median and sigma), or a file."


@dataclass(frozen=True)
class PredictSettings:
    """The settings of one prediction, or of one sweep over deployments."""

    model: str = argument(MODEL_HELP)
    plan: Path | None = option(None, "A plan.json, as leanmoe tune writes it.")
    level: str | None = option(None, "The level of the plan, where it has several.")
    top_k: int | None = option(None, "Experts a token uses at most, in place of a plan.")
    guaranteed: int | None = option(
        None,
        "Best experts that a token keeps whatever others use (k0), in place of a plan; the rest "
        "it shares with its step.",
    )
    gpu: str = option("h200", "A known GPU, or a JSON file that describes one.")
    gpus: tuple[int, ...] = option(
        (),
        "Number of GPUs; with --sweep several, like 8,16,64. By default as many as it takes.",
        parse=parse_counts,
    )
    tensor_parallel_size: int | None = option(None, "GPUs of tensor parallelism.")
    expert_parallel_size: int = option(1, "GPUs that experts are spread over, each whole.")
    data_parallel_size: int = option(1, "Copies of attention.")
    pipeline_parallel_size: int = option(1, "Stages that layers are split into.")
    batch_scope: str = option(
        "rank",
        "Whose tokens share experts under --data-parallel-size: 'rank', a rank's own, or 'all'.",
    )
    concurrency: tuple[int, ...] = option(
        (),
        f"Concurrencies to predict, comma separated; by default {numbers_text(CONCURRENCY)}.",
        parse=parse_counts,
    )
    request_rate: float | None = option(
        None, "Requests a second that arrive at random (Poisson), in place of --concurrency."
    )
    input_len: str = option("1024", f"Prompt tokens: {LENGTHS_HELP}")
    output_len: str = option("1024", f"Reply tokens: {LENGTHS_HELP}")
    kernel: str | None = option(
        None, "Whose kernel runs the experts; the error for an unknown one lists them."
    )
    profile: Path | None = option(None, "A folder with profile.json: its real routing is replayed.")
    skew: float = option(
        0.0, "Without a profile: how uneven experts are, their popularity being rank^-skew."
    )
    agreement: float = option(
        0.0, "Without a profile: how far tokens agree on their groups, from 0 to 1."
    )
    constants: Path | None = option(
        None, "A file of your own GPU's constants, from leanmoe calibrate."
    )
    sweep: bool = option(False, "Compare every split of --gpus at every concurrency.")
    tpot: float | None = option(None, "Most ms a token that a sweep's deployment may take.")
    ttft: float | None = option(
        None, "Most ms to the first token that a sweep's deployment may take."
    )
    price: float | None = option(None, "Price of a GPU and hour, for a sweep's costs.")
    seed: int = option(0, "Seed of the arrivals and lengths of --request-rate.")

    @property
    def cross_rank(self) -> bool:
        """Whether the tokens of all data-parallel ranks share experts."""
        return self.batch_scope == "all"

    def check(self) -> None:
        """Raises LeanMoeError for the first setting that is not allowed."""
        require(
            self.batch_scope in SCOPES, "--batch-scope", repr(self.batch_scope), " or ".join(SCOPES)
        )
        if self.request_rate is not None and (self.concurrency or self.sweep):
            raise LeanMoeError("--request-rate goes with neither --concurrency nor --sweep")
        limits = {"--tpot": self.tpot, "--ttft": self.ttft, "--price": self.price}
        for flag, value in limits.items():
            require(value is None or value > 0, flag, value, "above 0")
        if self.sweep:
            return
        if any(limit is not None for limit in limits.values()):
            raise LeanMoeError(SWEEPS_ALONE)
        if len(self.gpus) > 1:
            raise LeanMoeError(
                f"--gpus is '{numbers_text(self.gpus)}': several numbers go with --sweep"
            )


@dataclass(frozen=True)
class CalibrateSettings:
    """The settings of one calibration."""

    gpu: str = argument("This GPU by name, or a JSON file that describes it.")
    model: tuple[str, ...] = option(
        (), "A model whose layers are measured, too; may be repeated.", repeats=True
    )
    tokens: tuple[int, ...] = option(
        CALIBRATE_TOKENS,
        "Numbers of tokens in a step to measure at; fewer take less time.",
        parse=parse_counts,
        text=lambda values: ", ".join(map(str, values)),
    )

    def check(self) -> None:
        """Raises LeanMoeError unless constants can be fitted to so many numbers of tokens."""
        enough = len(set(self.tokens)) >= FEWEST_TOKENS and max(self.tokens) <= MOST_TOKENS
        allowed = f"{FEWEST_TOKENS} or more numbers, each from 1 to {MOST_TOKENS}"
        require(enough, "--tokens", f"'{numbers_text(self.tokens)}'", allowed)
