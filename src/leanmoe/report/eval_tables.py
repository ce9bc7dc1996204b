"""The tables of an evaluation: on screen, and on its page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

from leanmoe.core.intervals import LossChange, MeanChange, ReplyLengths
from leanmoe.results.eval import (
    DomainMatrix,
    EvalResults,
    PassAt,
    Replies,
    ReplyRow,
    TaskRow,
    Transfer,
)


@dataclass(frozen=True)
class Sheet:
    """A table as text."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def console_tables(results: EvalResults, console: Console) -> list[Table]:
    """Every table of the results for a terminal: on its side where a cell would be cut short."""
    tables = []
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left")
        for number, head in enumerate(sheet.heads):
            table.add_column(head, justify="left" if number == 0 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        tables.append(table if _is_whole(sheet, table, console) else _on_its_side(sheet))
    return tables


def _is_whole(sheet: Sheet, table: Table, console: Console) -> bool:
    """Whether no word of it is cut short; rich alone knows how it divides a width."""
    shown = StringIO()
    Console(file=shown, width=console.width, markup=False).print(table)
    words = {word for row in (sheet.heads, *sheet.rows) for cell in row for word in cell.split()}
    return words <= set(re.split(r"[\s│┃]+", shown.getvalue()))


def _on_its_side(sheet: Sheet) -> Table:
    """A line for each figure, the rows one below the other."""
    table = Table(title=sheet.title, title_justify="left", show_header=False)
    for row in sheet.rows:
        for head, cell in zip(sheet.heads, row, strict=True):
            table.add_row(head, cell)
        table.add_section()
    return table


def sheets(results: EvalResults) -> list[Sheet]:
    """Every table of the results."""
    confidence = f"{100 * results.confidence:g}%"
    tables: list[Sheet] = []
    if results.tasks:
        tables += [_accuracy(results, confidence), _certainty(results.tasks)]
    if results.generation is not None:
        tables.append(_replies(results.generation, confidence))
        if answers := [row for reply in results.generation.rows for row in _answers(reply)]:
            tables.append(
                Sheet(
                    "Answers in replies: percent of prompts",
                    f"Drawn at temperature {results.generation.temperature:g}; pass@n by the "
                    f"unbiased estimator of arXiv 2107.03374. Intervals are {confidence}.",
                    ("plan", "how", "full", "plan's", "difference"),
                    tuple(answers),
                )
            )
    if results.domains is not None:
        tables.append(_domains(results.domains, confidence))
    if results.transfer is not None:
        tables.append(_transfer(results.transfer))
    return tables


def _accuracy(results: EvalResults, confidence: str) -> Sheet:
    rows = (
        (
            row.plan,
            row.task,
            f"{row.items:,}",
            f"{100 * row.full:.2f}",
            f"{100 * row.accuracy:.2f}",
            _points(row.difference, row.low, row.high),
            "yes" if row.verdict.accepted else "no",
        )
        for row in results.tasks
    )
    within = f"within {100 * results.margin:g}"
    return Sheet(
        f"Tasks: accuracy in percent, plan less full model in points [{confidence}]",
        f"Paired by question; {_decoding(results.concurrency)}. Intervals are {confidence} each. "
        f"{_sharing(max(row.verdict.sharing for row in results.tasks), confidence)}",
        ("plan", "task", "questions", "full", "plan's", "difference", within),
        tuple(rows),
    )


def _certainty(tasks: Sequence[TaskRow]) -> Sheet:
    rows = (
        (
            row.plan,
            row.task,
            f"{row.lost}/{row.gained}",
            f"{row.mcnemar:.2g}",
            f"{100 * row.smallest_seen:.2f}",
            _batch_draws(row),
            "" if row.loss is None else _change_in_percent(row.loss),
        )
        for row in tasks
    )
    return Sheet(
        "Tasks: how sure",
        "Questions lost and gained; McNemar's exact p; the smallest loss, in points, that so many "
        "questions show with power 0.8; the worst and the best draw of batches; and how much the "
        "loss of the right answers rises.",
        ("plan", "task", "lost/gained", "p", "smallest seen", "draws", "loss of answers"),
        tuple(rows),
    )


def _decoding(concurrency: int) -> str:
    return "each decodes alone" if concurrency == 1 else f"concurrency {concurrency}"


def _batch_draws(row: TaskRow) -> str:
    if row.batch_draws == 1:
        return "1"
    return f"{row.batch_draws}: {100 * row.lowest_draw:+.2f} to {100 * row.highest_draw:+.2f}"


def _replies(replies: Replies, confidence: str) -> Sheet:
    rows = (
        (
            row.plan,
            f"{100 * row.agreement.same:.1f}%",
            f"{row.agreement.quantiles['0.5']:.0f}",
            _change(row.repetition, times=100),
            _change(row.length),
            _lengths(row.finished),
            f"{row.divergence.parts[0].mean:.4f}",
            f"{row.divergence.parts[-1].mean:.4f}",
            _change(row.divergence.growth, digits=4),
        )
        for row in replies.rows
    )
    return Sheet(
        f"Greedy replies of {replies.tokens} tokens to {replies.prompts} prompts [{confidence}]",
        f"{_decoding(replies.concurrency).capitalize()}. Divergence: KL from the full model along "
        "its own replies, nats per token, each model with its own keys and values. A gain per "
        "token over the ratio of lengths is the gain per finished request.",
        (
            "plan",
            "same to the end",
            "median first difference",
            "repetition, points",
            "length, tokens",
            "length, ratio where both end",
            "divergence, first eighth",
            "last eighth",
            "growth",
        ),
        tuple(rows),
    )


def _lengths(found: ReplyLengths | None) -> str:
    if found is None:
        return ""
    ended = f"{found.both_ended} of {found.prompts} end"
    if (ratio := found.ratio) is None:
        return f"not measurable: {ended}"
    return f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {ended}"


def _answers(row: ReplyRow) -> list[tuple[str, ...]]:
    """A plan's rows of the table of answers: greedy replies, then drawn ones."""
    rows = []
    if (match := row.exact_match) is not None:
        shares = f"{100 * match.full:.2f}", f"{100 * match.plan:.2f}"
        difference = _points(match.difference, match.low, match.high)
        rows.append((row.plan, "greedy", *shares, difference))
    return [*rows, *(_pass_at(row.plan, each) for each in row.pass_at)]


def _pass_at(plan: str, rate: PassAt) -> tuple[str, ...]:
    shares = f"{100 * rate.full:.2f}", f"{100 * rate.plan:.2f}"
    return (plan, f"pass@{rate.n}", *shares, _points(rate.mean, rate.low, rate.high))


def _domains(matrix: DomainMatrix, confidence: str) -> Sheet:
    names = [domain.name for domain in matrix.domains]
    units = ", ".join(f"{d.name} {d.units} {d.unit}" for d in matrix.domains)
    return Sheet(
        f"Domains: increase of next-token loss on held-out text [{confidence}]",
        f"Paired by document or passage ({units}).",
        ("plan", *(f"on {name}" for name in names)),
        tuple(
            (row.plan, *(_change_in_percent(row.loss[name]) for name in names))
            for row in matrix.rows
        ),
    )


def _sharing(verdicts: int, confidence: str) -> str:
    """How verdicts are corrected for their number."""
    if verdicts == 1:
        return f"Each verdict holds with {confidence} by itself: none is corrected for others."
    return f"The {verdicts} verdicts are corrected (Holm): all hold together with {confidence}."


def _transfer(moved: Transfer) -> Sheet:
    confidence = f"{100 * moved.confidence:g}%"
    return Sheet(
        f"A finished plan on other text, margin {moved.margin}",
        "By the test of the run that made it, at its loads; a claim holds for its kind alone. "
        f"{_sharing(moved.sharing, confidence)} Bounds are {confidence} each. Perplexity is the "
        "bound's.",
        (
            "load and text",
            "verdict",
            "loss",
            "at most",
            "perplexity",
            "KL",
            "changed",
            "worst tenth",
        ),
        tuple(
            (
                f"{row.concurrency}, {each.kind}",
                "within" if each.accepted else "not shown to be within",
                f"{each.loss.ratio:+.2%}",
                f"{each.loss.upper_bound:+.2%}",
                f"{each.perplexity:+.2%}",
                f"{each.divergence:.4f}",
                f"{each.flips:.1%}",
                f"{each.worst_tenth:+.2%}",
            )
            for row in moved.rows
            for each in row.kinds
        ),
    )


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _change_in_percent(loss: LossChange) -> str:
    return f"{100 * loss.ratio:+.2f}% [{100 * loss.low:+.2f}, {100 * loss.high:+.2f}]"


def _change(change: MeanChange, times: float = 1, digits: int = 2) -> str:
    mean, low, high = (times * each for each in (change.mean, change.low, change.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
