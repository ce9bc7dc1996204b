"""What a tune run is asked to do; every default of the main job stands here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from leanmoe.bench.settings import PRECISION, PRECISION_HELP
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import Margin
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
from leanmoe.core.text import KINDS, kind_of_text

PROMPT_SPREAD = 64
"""Replies are scored after prompts up to this many tokens shorter or longer than the load's."""


@dataclass(frozen=True)
class TuneSettings:
    """The settings of one run; a run folder belongs to exactly one of them."""

    model: str = argument(MODEL_HELP)
    text: tuple[tuple[str, str], ...] = option(
        (),
        f"{TEXT_HELP} KIND=SOURCE names its kind; may be repeated: the proof holds for each kind. "
        f"Without, four that are on every machine: {', '.join(KINDS)}.",
        parse=kind_of_text,
        repeats=True,
    )
    concurrency: tuple[int, ...] = option(
        (1, 8, 32),
        "Numbers of requests at once, comma separated; each becomes a band of the plan.",
        parse=parse_counts,
        text=numbers_text,
    )
    margins: tuple[Margin, ...] = option(
        (Margin(0.005),),
        "Largest increases in next-token loss to accept on any kind of text, comma separated; each "
        "becomes a level of the plan. A share like 1% of the full model's, or '0.01 nats' a token.",
        parse=Margin.parse_several,
        text=numbers_text,
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
    reply_prompts: int = option(
        32, "Prompts that full model and plan reply to until they end: do replies grow? 0: none."
    )
    reply_cap: int = option(128, "Tokens at which such a reply is cut.")
    profile_tokens: int = option(200_000, "Tokens of calibration text that the profile reads.")
    sensitivity_tokens: int = option(
        20_000, "Tokens of calibration text that each candidate rule is measured on."
    )
    heldout_tokens: int = option(
        160_000,
        "Tokens of held-out text that plans are proven on, shared by the kinds; about 40% of them "
        "are scored.",
    )
    batch_draws: int = option(
        3, "Random batches that a plan with batch-aware rules is proven in: who decodes with whom."
    )
    heldout_share: float = 0.5
    """Share of the sources that the search never sees."""
    compared_share: float = 0.2
    """Share of the held-out text that the table of strategies is measured on."""
    seed: int = option(0, SEED_HELP)
    dtype: str | None = option(None, DTYPE_HELP)
    trust_remote_code: bool = option(False, TRUST_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for the first setting out of range."""
        loads = list(self.concurrency)
        if len(dict(self.text)) < len(self.text):
            raise LeanMoeError("two --text are of one kind: name them, like docs=FILE")
        rising = bool(loads) and loads == sorted(set(loads)) and loads[0] >= 1
        require(rising, "--concurrency", loads, "rising numbers of requests, from 1 up")
        self._check_margins()
        require(self.batch_draws >= 1, "--batch-draws", self.batch_draws, "at least 1")
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
        require(self.reply_prompts >= 0, "--reply-prompts", self.reply_prompts, "0 or more")
        require(self.reply_cap >= 1, "--reply-cap", self.reply_cap, "at least 1")
        require(self.output_len >= 2, "--output-len", self.output_len, "at least 2")

    def _check_margins(self) -> None:
        shown = numbers_text(self.margins) or "none"
        values = [each.value for each in self.margins]
        rising = bool(values) and values == sorted(set(values))
        require(rising, "--margins", shown, "rising margins")
        units = {each.in_nats for each in self.margins}
        require(len(units) == 1, "--margins", shown, "all shares or all nats")

    def sources_of_text(self) -> dict[str, str]:
        """The source of each kind of text."""
        return dict(self.text) or {kind: kind for kind in KINDS}

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
