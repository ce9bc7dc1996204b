"""What a tune run is asked to do; every default of the main job stands here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from leanmoe.bench.settings import PRECISION, PRECISION_HELP
from leanmoe.core.options import (
    DTYPE_HELP,
    MODEL_HELP,
    SEED_HELP,
    TEXT_HELP,
    TRUST_HELP,
    argument,
    numbers_text,
    option,
    percent_text,
)
from leanmoe.core.parsing import flag, parse_counts, parse_share, require

PROMPT_SPREAD = 64
"""Replies are scored after prompts up to this many tokens shorter or longer than the load's."""


@dataclass(frozen=True)
class TuneSettings:
    """The settings of one run; a run folder belongs to exactly one of them."""

    model: str = argument(MODEL_HELP)
    text: str | None = option(None, TEXT_HELP)
    concurrency: tuple[int, ...] = option(
        (1, 8, 32),
        "Numbers of requests at once, comma separated; each becomes a band of the plan.",
        parse=parse_counts,
        text=numbers_text,
    )
    margin: float = option(
        0.005,
        "Largest relative increase in next-token loss to accept.",
        parse=parse_share,
        text=percent_text,
    )
    confidence: float = option(0.95, "Confidence of every interval and verdict.")
    keep: str | None = option(
        None, "A memory budget: the share or number of a layer's experts that a plan may use."
    )
    criterion: str = option(
        "easy-ep", "How experts are ranked under --keep; leanmoe prune --help lists the criteria."
    )
    input_len: int = option(256, "Prompt tokens of the load to tune for.")
    output_len: int = option(32, "Reply tokens of the load to tune for.")
    repeats: int = option(
        32, "Runs of each throughput measurement at most, full model and plan in turn."
    )
    precision: float = option(PRECISION, PRECISION_HELP, parse=parse_share, text=percent_text)
    profile_tokens: int = option(200_000, "Tokens of calibration text that the profile reads.")
    sensitivity_tokens: int = option(
        20_000, "Tokens of calibration text that each candidate rule is measured on."
    )
    heldout_tokens: int = option(
        80_000,
        "Tokens of held-out text that plans are proven on; about 40% of them are scored.",
    )
    heldout_share: float = 0.4
    """Share of the documents that the search never sees."""
    compared_share: float = 0.3
    """Share of the held-out text that the table of strategies is measured on."""
    seed: int = option(0, SEED_HELP)
    dtype: str | None = option(None, DTYPE_HELP)
    trust_remote_code: bool = option(False, TRUST_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for the first setting out of range."""
        loads = list(self.concurrency)
        rising = bool(loads) and loads == sorted(set(loads)) and loads[0] >= 1
        require(rising, "--concurrency", loads, "rising numbers of requests, from 1 up")
        require(0 < self.margin < 1, "--margin", self.margin, "above 0 and below 1")
        require(0.5 < self.confidence < 1, "--confidence", self.confidence, "above 0.5 and below 1")
        require(self.repeats >= 3, "--repeats", self.repeats, "at least 3, for an interval")
        require(0 < self.precision < 1, "--precision", self.precision, "above 0% and below 100%")
        require(0 < self.heldout_share < 1, "--heldout-share", self.heldout_share, "0 to 1")
        for name in (
            "input_len",
            "profile_tokens",
            "sensitivity_tokens",
            "heldout_tokens",
        ):
            value = getattr(self, name)
            require(value >= 16, flag(name), value, "at least 16")
        if self.keep is not None:
            from leanmoe.models.shape import read_shape
            from leanmoe.prune.criteria import CRITERIA, kept_count

            CRITERIA[self.criterion]
            kept_count(self.keep, read_shape(self.model))
        require(self.output_len >= 2, "--output-len", self.output_len, "at least 2")

    def scored_window(self, can_branch: bool) -> tuple[int, int, int]:
        """Tokens of a window that is scored, of its shortest prompt, and of each of its replies.

        With branching, replies of the load's output length follow prompts whose mean length is
        the load's; otherwise one reply follows a prompt of just that length, and 0 is returned
        for the replies.
        """
        if not can_branch:
            return self.input_len + self.output_len, self.input_len, 0
        spread = min(PROMPT_SPREAD, self.input_len // 2)
        replies = max(1, 2 * spread // self.output_len)
        prompt = self.input_len - spread
        return prompt + replies * self.output_len, prompt, self.output_len

    def band_ends(self) -> dict[int, int]:
        """The upper end of each load's band, in tokens of a forward step, by concurrency.

        A load's band reaches halfway, in ratio, to the next load; the last load's reaches twice
        its tokens. Larger steps are prefill, which the band after these covers.
        """
        loads = self.concurrency
        between = [int((load * following) ** 0.5) for load, following in pairwise(loads)]
        return dict(zip(loads, [*between, 2 * loads[-1]], strict=True))
