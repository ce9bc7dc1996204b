"""What a bench is asked to do; every default of `leanmoe bench` stands here. Needs no torch."""

from __future__ import annotations

import math
import random
import shlex
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmoe.bench.servers import is_server
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import (
    DTYPE_HELP,
    SEED_HELP,
    TEXT_HELP,
    TRUST_HELP,
    argument,
    numbers_text,
    option,
    percent_text,
)
from leanmoe.core.parsing import parse_numbers, parse_range, parse_share, require

if TYPE_CHECKING:
    from leanmoe.stats.runs import Looks

GOODPUT_LIMITS = ("ttft", "tpot", "e2el")
"""What `vllm bench serve --goodput` takes."""
ENGINES = ("transformers", "vllm")
MOST_CONCURRENCY = 4096
MOST_REQUESTS = 100_000
MOST_TOKENS = 1_000_000
MOST_RATE = 10_000.0
MOST_SECONDS = 6 * 3600.0
PRECISION = 0.02
PRECISION_HELP = "Repeats end once every gain's interval reaches at most this far to each side."
FEWEST_REQUESTS = 8
"""With one request at a time; as the square root of the load above it, and two rounds at least.
Many short runs, which take turns, tell more of a gain than few long ones."""
OPEN_LOOP_REQUESTS = 96


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt or a reply: one length, or any of a range, each as likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str, least: int) -> Lengths:
        """Reads "1024" or "512:2048". Raises LeanMoeError naming the option."""
        return cls(*parse_range(name, text, least, MOST_TOKENS))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class ServiceLoad:
    """One load: a closed loop of so many requests at once, or an open loop at a Poisson rate."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None
    """Requests a second, arriving as a Poisson process whatever is under way."""

    @property
    def name(self) -> str:
        """The load in words."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return f"{self.rate:g} a second"

    def to_json(self) -> dict[str, Any]:
        """Under the names that `vllm bench serve` uses."""
        return {
            "max_concurrency": self.concurrency,
            "request_rate": self.rate,
            "num_prompts": self.requests,
        }


def parse_goodput(name: str, text: str) -> list[tuple[str, float]]:
    """Reads "ttft:500 tpot:50", in milliseconds. Raises LeanMoeError for anything else."""
    limits: list[tuple[str, float]] = []
    for word in text.replace(",", " ").split():
        figure, _, value = word.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if figure not in GOODPUT_LIMITS or not 0 < limit < math.inf:
            raise LeanMoeError(
                f"{name} has {word!r}: it must be limits in milliseconds like ttft:500 tpot:50, "
                f"of {', '.join(GOODPUT_LIMITS)}"
            )
        limits.append((figure, limit))
    return limits


def parse_arguments(name: str, text: str) -> tuple[str, ...]:
    """Reads a command line's words, quoted as in a shell."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise LeanMoeError(f"{name} is {text!r}: {error}") from error


@dataclass(frozen=True)
class BenchSettings:
    """The settings of one bench."""

    targets: tuple[str, ...] = argument(
        "A folder, a name on the Hugging Face Hub or 'reference'; or servers' addresses, like "
        "full=http://127.0.0.1:8000 plan=http://127.0.0.1:8001. The first is compared with.",
        (),
        repeats=True,
        is_required=True,
        metavar="MODEL|URL...",
    )
    plan: tuple[Path, ...] = option(
        (), "A plan to run beside the full model; may be repeated.", repeats=True
    )
    level: tuple[str, ...] = option(
        (), "A level to run, of a plan that has several; may be repeated.", repeats=True
    )
    concurrency: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32),
        "Numbers of requests at once, comma separated: each is a closed loop.",
        parse=partial(parse_numbers, kind=int),
        text=numbers_text,
    )
    request_rate: tuple[float, ...] = option(
        (),
        "Requests a second, comma separated: open loops with Poisson arrivals, in place of closed "
        "ones.",
        parse=partial(parse_numbers, kind=float),
    )
    input_len: Lengths = option(
        Lengths(1024, 1024),
        "Prompt tokens: a number, or a range like 512:2048.",
        parse=partial(Lengths.parse, least=1),
    )
    output_len: Lengths = option(
        Lengths(1024, 1024),
        "Reply tokens: a number, or a range like 16:256.",
        parse=partial(Lengths.parse, least=2),
    )
    dataset_path: str | None = option(
        None, "A .jsonl file whose rows have input_len or prompt, and output_len or output."
    )
    text: str | None = option(None, TEXT_HELP)
    num_prompts: int | None = option(
        None, "Requests of one run; by default two rounds of the load, or more."
    )
    repeats: int = option(16, "Runs of each load at most; full model and plans take turns in each.")
    precision: float = option(PRECISION, PRECISION_HELP, parse=parse_share, text=percent_text)
    max_seconds: float = option(600.0, "No run sends requests for longer than this.")
    max_concurrency: int = option(
        256, "Requests under way in an open loop at most; what arrives beyond them waits."
    )
    goodput: tuple[tuple[str, float], ...] = option(
        (),
        "Limits in ms, like ttft:500 tpot:50; the requests that keep all of them are counted.",
        parse=parse_goodput,
        repeats=True,
    )
    confidence: float = option(0.95, "Confidence of every interval.")
    engine: str = option(ENGINES[0], "transformers (in this process) or vllm (its server).")
    engine_args: tuple[str, ...] = option(
        (),
        "Arguments of vLLM's server, like '--load-format dummy --enforce-eager'.",
        parse=parse_arguments,
    )
    stock: bool = option(False, "Also run Transformers' own experts beside leanmoe's.")
    tokenizer: str | None = option(
        None, "The served model's tokenizer: a folder, a Hub name or 'reference'."
    )
    served_model: str | None = option(None, "The name that servers know the model by.")
    gpus: int | None = option(None, "GPUs of one server or engine, for tokens/s a GPU.")
    allow_remote: bool = option(False, "Send the load to another machine.")
    seed: int = option(0, SEED_HELP)
    dtype: str | None = option(None, DTYPE_HELP)
    trust_remote_code: bool = option(False, TRUST_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for the first setting out of range."""
        for name, values, most in (
            ("concurrency", self.concurrency, MOST_CONCURRENCY),
            ("request-rate", self.request_rate, MOST_RATE),
        ):
            rising = list(values) == sorted(set(values))
            if not rising or any(not 0 < value <= most for value in values):
                raise LeanMoeError(
                    f"--{name} is {','.join(f'{v:g}' for v in values)}: it must be rising numbers "
                    f"above 0, at most {most:g}"
                )
        if not self.request_rate and not self.concurrency:
            raise LeanMoeError("no load was given: set --concurrency or --request-rate")
        if self.engine not in ENGINES:
            raise LeanMoeError(f"--engine is {self.engine!r}: it must be {' or '.join(ENGINES)}")
        require(1 <= self.repeats <= 100, "--repeats", self.repeats, "1 to 100")
        require(0 < self.precision < 1, "--precision", self.precision, "above 0% and below 100%")
        require(
            0 < self.max_seconds <= MOST_SECONDS,
            "--max-seconds",
            self.max_seconds,
            f"above 0 and at most {MOST_SECONDS:g}",
        )
        require(
            1 <= self.max_concurrency <= MOST_CONCURRENCY,
            "--max-concurrency",
            self.max_concurrency,
            f"1 to {MOST_CONCURRENCY}",
        )
        require(0.5 < self.confidence < 1, "--confidence", self.confidence, "above 0.5 and below 1")
        most = max((load.requests for load in self.loads()), default=0)
        require(0 < most <= MOST_REQUESTS, "--num-prompts", most, f"1 to {MOST_REQUESTS:,}")
        if self.num_prompts is not None and not self.request_rate:
            largest = max(self.concurrency)
            allowed = f"at least the largest concurrency, {largest}"
            require(self.num_prompts >= largest, "--num-prompts", self.num_prompts, allowed)

    @property
    def over_http(self) -> bool:
        """Whether the targets are servers."""
        return any(is_server(target) for target in self.targets)

    def check_targets(self) -> None:
        """Raises LeanMoeError for settings that do not go with the model or servers given."""
        if self.over_http:
            self._check_servers()
        else:
            self._check_model()
        if self.gpus is not None:
            require(1 <= self.gpus <= 10_000, "--gpus", self.gpus, "1 to 10,000")

    def _check_servers(self) -> None:
        for target in self.targets:
            if not is_server(target):
                raise LeanMoeError(f"{target} stands among addresses: give servers or one model")
        if self.plan:
            raise LeanMoeError(
                "--plan is for a model in this process: a server has its plan already; start one "
                "with the plan and one without, and give both addresses"
            )
        if self.engine != ENGINES[0]:
            raise LeanMoeError(f"--engine {self.engine} runs a model here: a server has its own")

    def _check_model(self) -> None:
        if len(self.targets) != 1:
            raise LeanMoeError(
                f"{len(self.targets)} models were given ({', '.join(self.targets)}): one at a "
                "time, or several addresses of servers"
            )
        if self.served_model or self.allow_remote:
            raise LeanMoeError("--served-model and --allow-remote are for the address of a server")
        if self.engine_args and self.engine != "vllm":
            raise LeanMoeError("--engine-args are for --engine vllm")

    def loads(self) -> tuple[ServiceLoad, ...]:
        """The loads in the order they run."""
        if self.request_rate:
            count = self.num_prompts or OPEN_LOOP_REQUESTS
            return tuple(ServiceLoad(count, rate=rate) for rate in self.request_rate)
        return tuple(
            ServiceLoad(self.num_prompts or requests_for(load), concurrency=load)
            for load in self.concurrency
        )

    @property
    def looks(self) -> Looks:
        """When the repeats of a load are looked at."""
        from leanmoe.stats.runs import Looks

        return Looks(self.repeats, self.precision, self.confidence)

    def goodput_limits(self) -> dict[str, float]:
        """Milliseconds by name."""
        return dict(self.goodput)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            **asdict(self),
            "targets": list(self.targets),
            "plan": [str(path) for path in self.plan],
            "concurrency": [] if self.request_rate else list(self.concurrency),
            "request_rate": list(self.request_rate),
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "goodput": self.goodput_limits(),
        }


def requests_for(concurrency: int) -> int:
    """Requests of a closed loop's run, so that it lasts for more than a moment at any load."""
    return max(2 * concurrency, math.ceil(FEWEST_REQUESTS * math.sqrt(concurrency)))
