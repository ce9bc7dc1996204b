"""Renders templates to pages of one file each that open without a network."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leanmoe.core.intervals import LossChange, LossGap, MeanChange, PairedRatio, RatioOfRuns
from leanmoe.results.tune import percent

CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "resetScale2d"]],  # more lie over the legend in a narrow window
    "toImageButtonOptions": {"format": "svg"},
}
"""Of every plot: it can be saved as a picture."""


def render(template: str, **content: Any) -> str:
    """The page that `template` makes of `content`; all text is escaped.

    A template that calls `plot` gets plotly's script inlined, once.
    """
    loaded = _environment().get_template(template)
    source = _environment().loader.get_source(_environment(), template)[0]  # type: ignore[union-attr]
    if "plot(" not in source:
        return loaded.render(plotly=None, **content)
    from leanmoe.report import plots  # needs plotly, as no other part of a page does

    return loaded.render(plotly=_plotly(), plots=plots, **content)


def interval(
    value: LossChange | LossGap | RatioOfRuns | PairedRatio | MeanChange, digits: int = 2
) -> Markup:
    """A relative change in percent with its interval; a ratio counts from 1."""
    base = 0.0
    if isinstance(value, RatioOfRuns):
        middle, base, digits = value.median, 1.0, 1
    elif isinstance(value, PairedRatio):
        middle, base, digits = value.ratio, 1.0, 1
    elif isinstance(value, LossChange):
        middle = value.ratio
    else:
        middle = value.difference if isinstance(value, LossGap) else value.mean
    shown = [percent(each - base, digits) for each in (middle, value.low, value.high)]
    return Markup("{} <small>({} to {})</small>").format(*shown)


def number(value: float | None) -> str:
    """A figure to four digits or whole, never as a power of ten; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def sure(confidence: float) -> str:
    """A confidence as it was asked for: 0.975 -> "97.5%"."""
    return f"{100 * confidence:g}%"


def plot(figure: Any) -> Markup:
    """A figure as HTML, without plotly's script."""
    # The same results give the same page, byte for byte: plotly's own ids are drawn at random.
    name = hashlib.sha256(figure.to_json().encode()).hexdigest()[:12]
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=CONFIG,
        div_id=f"plot-{name}",
    )
    return Markup('<div class="scroll">{}</div>').format(Markup(html))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("leanmoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "number": number}
    environment.filters["sure"] = sure
    environment.globals |= {"plot": plot}
    return environment
