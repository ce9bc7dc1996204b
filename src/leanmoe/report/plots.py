"""All plots of the pages, each a plotly figure made from one part of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from leanmoe.core.intervals import LossChange, Margin, RatioOfRuns
from leanmoe.plan import Plan, Rule
from leanmoe.results.bench import THROUGHPUT, TPOT, BenchResults
from leanmoe.results.predict import SweepResults
from leanmoe.results.study import Table9, UShape
from leanmoe.results.tune import (
    LoadFront,
    ProfileSummary,
    StrategyTable,
    TuneResults,
    ValidatedPlan,
)

INK, FULL, OURS, LIMIT = "#1d2b3a", "#8a97a6", "#0b7a75", "#b3261e"
COLOURS = (OURS, "#d08c60", "#5b5ea6", "#a23b72", "#4f772d", "#3a86c8", "#8d6a9f", "#c9a227")
Values = Sequence[float | None]


def loss_front(front: LoadFront, margin: Margin) -> go.Figure:
    """Next-token loss against MoE-layer time for the plans validated for one concurrency."""
    figure = _figure("MoE layer time, share of the full model's (less is faster)", _LOSS)
    if not margin.in_nats:
        figure.add_hline(
            y=100 * margin.value,
            line={"color": LIMIT, "dash": "dash", "width": 1.5},
            annotation_text=f"margin {margin}",
            annotation_font_color=LIMIT,
            annotation_position="top left",
        )
    for chosen, colour, name in ((False, FULL, "validated"), (True, OURS, "chosen plan")):
        points = [point for point in front.points if point.chosen is chosen]
        if points:
            figure.add_trace(
                go.Scatter(
                    x=[point.modelled_time for point in points],
                    y=[100 * point.loss.ratio for point in points],
                    error_y=_error_bars([point.loss for point in points], thickness=1),
                    mode="markers",
                    name=name,
                    text=[_rules_in_lines(point) for point in points],
                    marker={"color": colour, "size": 11 if chosen else 7},
                    hovertemplate="%{text}<br>%{x:.3g}: %{y:+.2f}%<extra></extra>",
                )
            )
    # As many digits as tell two ticks apart; around a single point plotly would reach below none.
    times = [point.modelled_time for point in front.points]
    if times:
        beside = max(0.02, 0.05 * (max(times) - min(times)))
        figure.update_xaxes(range=[min(times) - beside, max(times) + beside])
    figure.update_xaxes(tickformat="~%")
    figure.update_yaxes(ticksuffix="%")
    return figure


def strategies(tables: Sequence[StrategyTable]) -> go.Figure:
    """What every strategy loses on one budget, at one concurrency, on the same held-out text."""
    rows = [row for table in tables for row in table.rows]
    rows.sort(key=lambda row: row.loss.ratio, reverse=True)
    figure = _figure(_LOSS, "")
    figure.add_trace(
        go.Bar(
            x=[100 * row.loss.ratio for row in rows],
            y=[row.strategy for row in rows],
            orientation="h",
            marker_color=[OURS if row.strategy == "leanmoe" else FULL for row in rows],
            error_x=_error_bars([row.loss for row in rows]),
            hovertemplate="%{y}<br>%{x:+.2f}%<extra></extra>",
        )
    )
    figure.update_xaxes(ticksuffix="%")
    return figure


def tune_gain(results: TuneResults) -> go.Figure:
    """Measured throughput of each level over the full model's, with intervals, over load."""
    figure = _figure("load", "output throughput, plan over full model")
    figure.add_hline(y=0, line={"color": FULL, "width": 1.5})
    for number, level in enumerate(results.margins):
        gains = results.of_level(level).gain
        figure.add_trace(
            go.Bar(
                x=[
                    f"concurrency {gain.concurrency}<br>{gain.input_tokens} in, "
                    f"{gain.output_tokens} out"
                    for gain in gains
                ],
                y=[100 * (gain.ratio.median - 1) for gain in gains],
                name=level,
                marker_color=COLOURS[number % len(COLOURS)],
                width=0.45 / len(results.margins),
                error_y=_error_bars([gain.ratio for gain in gains]),
                hovertemplate="%{x}<br>%{y:+.1f}%<extra></extra>",
            )
        )
    figure.update_yaxes(ticksuffix="%")
    return figure


def plan_heat_map(plan: Plan, slots: Mapping[int, Sequence[float]]) -> go.Figure:
    """Each MoE layer's rule for prompts and in each band; the colour is a token's mean slots.

    `slots` holds mean slots by layer for the bands, by number, where they are known.
    """
    layers, most = range(plan.model.moe_layers), plan.model.top_k
    names, previous = [], 0
    for band in plan.bands:
        names.append(f"{previous + 1} to {band.up_to}" if band.up_to else f"{previous + 1}+")
        previous = band.up_to or previous
    columns = [list(slots.get(n, [most] * len(layers))) for n in range(len(plan.bands))]
    rules = [band.rules for band in plan.bands]
    if plan.prompt:
        names.insert(0, "prompt tokens")
        columns.insert(0, [most if r.top_k is None else r.top_k for r in plan.prompt])
        rules.insert(0, plan.prompt)
    figure = _figure("tokens in a forward step", "MoE layer")
    figure.add_trace(
        go.Heatmap(
            x=names,
            y=[str(layer) for layer in layers],
            z=[[column[layer] for column in columns] for layer in layers],
            text=[[describe_rule(column[layer]) for column in rules] for layer in layers],
            texttemplate="%{text}",
            zmin=0,
            zmax=most,
            xgap=3,
            ygap=3,
            colorscale=[[0, OURS], [0.6, "#9ecfc9"], [1, "#f2f5f7"]],
            colorbar={"title": {"text": "slots"}, "thickness": 12},
            hovertemplate="layer %{y}, %{x} tokens<br>%{text}<br>%{z:.2f} slots<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def expert_use(profile: ProfileSummary) -> go.Figure:
    """How often each expert is chosen, layer by layer, most used first; even use would be 1."""
    figure = _figure("expert, by rank in its layer", "MoE layer")
    figure.add_trace(
        go.Heatmap(
            z=[
                sorted((share * len(layer.use) for share in layer.use), reverse=True)
                for layer in profile.layers
            ],
            y=[str(layer.layer) for layer in profile.layers],
            zmin=0,
            colorscale=[[0, "#f2f5f7"], [0.4, "#9ecfc9"], [1, "#0b5a56"]],
            colorbar={"title": {"text": "x even"}, "thickness": 12},
            hovertemplate="layer %{y}, rank %{x}<br>%{z:.2f} x even use<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def distinct_experts(profile: ProfileSummary) -> go.Figure:
    """Distinct experts that a step activates: real routing against the uniform formula."""
    figure = _figure("tokens in a forward step", "distinct experts")
    for number, layer in enumerate(profile.layers):
        tokens = [each.tokens for each in layer.distinct]
        measured = [each.measured for each in layer.distinct]
        figure.add_trace(_layer_line(tokens, measured, f"layer {layer.layer}", number))
    uniform = profile.layers[0].distinct
    tokens, formula = [each.tokens for each in uniform], [each.uniform for each in uniform]
    trace = _lines(tokens, formula, "uniform formula", INK, "dash")
    figure.add_trace(trace.update(mode="lines"))
    figure.update_xaxes(type="log", dtick=0.30103)
    return figure


def gate_mass(profile: ProfileSummary) -> go.Figure:
    """The share of a token's gate mass that its best j experts carry, layer by layer."""
    figure = _figure("best j of the token's experts", "share of the gate mass")
    for number, layer in enumerate(profile.layers):
        best = list(range(1, len(layer.mass) + 1))
        figure.add_trace(_layer_line(best, layer.mass, f"layer {layer.layer}", number))
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(dtick=1)
    return figure


def throughput(results: BenchResults) -> go.Figure:
    """Output tokens a second over load; small points are the repeats, lines their medians."""
    figure = _over_load(results, "output tokens a second")
    loads = [load.value for load in results.loads]
    for number, name in enumerate(results.names):
        runs = [(load.value, run) for load in results.loads for run in load.runs.get(name, ())]
        figure.add_trace(
            go.Scatter(
                x=[value for value, _ in runs],
                y=[run[THROUGHPUT] for _, run in runs],
                mode="markers",
                showlegend=False,
                hoverinfo="skip",
                marker={"color": _variant_colour(number), "size": 4, "opacity": 0.45},
            )
        )
        medians = [load.median.get(name, {}).get(THROUGHPUT) for load in results.loads]
        hover = f"{name}<br>%{{x}}: %{{y:,.4g}} tok/s<extra></extra>"
        figure.add_trace(_variant_line(loads, medians, name, number, hover))
    figure.update_yaxes(rangemode="tozero")
    return figure


def bench_gain(results: BenchResults) -> go.Figure:
    """Each variant over the first, paired by repeat, with intervals, over load."""
    gained = results.gained
    title = "output throughput" if gained == THROUGHPUT else "time per output token"
    figure = _over_load(results, f"{title}, over {results.names[0]}")
    figure.add_hline(y=0, line={"color": FULL, "width": 1.5})
    for number, name in enumerate(results.names[1:], 1):
        loads = [load for load in results.loads if gained in load.gain.get(name, {})]
        ratios = [load.gain[name][gained] for load in loads]
        trace = _variant_line(
            [load.value for load in loads],
            [100 * (ratio.median - 1) for ratio in ratios],
            name,
            number,
            f"{name}<br>%{{x}}: %{{y:+.1f}}%<extra></extra>",
        )
        trace.error_y = {**_error_bars(ratios), "thickness": 1.5, "color": _variant_colour(number)}
        figure.add_trace(trace)
    figure.update_yaxes(ticksuffix="%")
    figure.update_layout(showlegend=True)
    return figure


def user_against_device(results: BenchResults) -> go.Figure:
    """Tokens a second that one user sees against those that one device makes; one point a load.

    Up and to the right is better. A user's rate is 1 / median TPOT.
    """
    devices = results.devices
    figure = _figure("tok/s/user (1 / median TPOT)", f"tok/s/{devices.kind} (output)")
    for number, name in enumerate(results.names):
        loads = [load for load in results.loads if load.median.get(name, {}).get(TPOT)]
        trace = _variant_line(
            [1e3 / load.median[name][TPOT] for load in loads],
            [load.median[name][THROUGHPUT] / devices.count for load in loads],
            name,
            number,
            f"{name}, %{{text}}<br>%{{x:.4g}} tok/s/user, %{{y:,.4g}} tok/s<extra></extra>",
        )
        trace.text = [f"{load.value:g}" for load in loads]
        trace.mode = "lines+markers+text" if number == 0 else "lines+markers"
        trace.textposition = "bottom left"
        figure.add_trace(trace)
    figure.update_yaxes(rangemode="tozero")
    return figure


def deployment_fronts(results: SweepResults) -> go.Figure:
    """The Pareto front of each plan: tokens a second of a user against a GPU's."""
    figure = _figure("output tok/s of a user", "output tok/s of a GPU")
    for number, (name, points) in enumerate(results.fronts.items()):
        trace = _lines(
            [point.per_user for point in points],
            [point.per_gpu for point in points],
            name,
            _variant_colour(number),
        )
        trace.hovertext = [f"{point.place}, concurrency {point.concurrency}" for point in points]
        figure.add_trace(trace)
    figure.update_yaxes(type="log")
    return figure


def table_9(nine: Table9) -> go.Figure:
    """The paper's gains for DeepSeek-V3 beside ours."""
    x = [row.concurrency for row in nine.rows]
    figure = _figure("concurrency", "gain in throughput, %")
    _mark_loads(figure, x)
    for k, colour in zip(("6", "4", "3"), COLOURS, strict=False):
        ours, cited = ([row.gain[k] for row in nine.rows], [row.paper_gain[k] for row in nine.rows])
        figure.add_trace(_lines(x, ours, f"k = {k}, modelled", colour))
        figure.add_trace(_lines(x, cited, f"k = {k}, cited", colour, "dot"))
    return figure


def u_shapes(curves: Sequence[UShape]) -> go.Figure:
    """What half the experts a token gain over the tokens of a step, model by model."""
    figure = _figure("tokens in a decode step", "gain of half the experts a token, %")
    for number, curve in enumerate(curves):
        name = f"{curve.model.split('/')[-1]}, k = {curve.top_k} to {curve.lower}"
        tokens = [row.tokens for row in curve.rows]
        gains = [row.experts_gain for row in curve.rows]
        figure.add_trace(_lines(tokens, gains, name, COLOURS[number % len(COLOURS)]))
    figure.update_xaxes(type="log")
    return figure


_LOSS = "next-token loss, increase over the full model"


def _figure(x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the pages' style."""
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=380,
        legend={"orientation": "h", "y": 1.12},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title={"text": x_title, "font_size": 13})
    figure.update_yaxes(title={"text": y_title, "font_size": 13})
    return figure


def _over_load(results: BenchResults, title: str) -> go.Figure:
    figure = _figure("concurrency" if results.gained == THROUGHPUT else "requests a second", title)
    _mark_loads(figure, [load.value for load in results.loads])
    return figure


def _mark_loads(figure: go.Figure, loads: Sequence[float]) -> None:
    figure.update_xaxes(type="log", tickvals=list(loads), ticktext=[f"{load:g}" for load in loads])


def _error_bars(changes: Sequence[LossChange | RatioOfRuns], **more: Any) -> dict[str, Any]:
    """Asymmetric bars in percent."""
    middles = [c.ratio if isinstance(c, LossChange) else c.median for c in changes]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (c.high - m) for c, m in zip(changes, middles, strict=True)],
        "arrayminus": [100 * (m - c.low) for c, m in zip(changes, middles, strict=True)],
        "color": INK,
        **more,
    }


def _lines(x: Sequence[float], y: Values, name: str, colour: str, dash: str = "solid") -> Any:
    style = {"color": colour, "dash": dash}
    return go.Scatter(x=list(x), y=list(y), name=name, mode="lines+markers", line=style)


def _layer_line(x: Sequence[float], y: Values, name: str, number: int) -> Any:
    trace = _lines(x, y, name, COLOURS[number % len(COLOURS)])
    return trace.update(line_width=1.5, marker_size=5)


def _variant_line(x: Sequence[float], y: Values, name: str, number: int, hover: str) -> Any:
    trace = _lines(x, y, name, _variant_colour(number))
    return trace.update(line_width=2.5 if number else 2, marker_size=8, hovertemplate=hover)


def _variant_colour(number: int) -> str:
    return FULL if number == 0 else COLOURS[(number - 1) % len(COLOURS)]


def _rules_in_lines(point: ValidatedPlan) -> str:
    rules = [f"layer {n}: {describe_rule(rule)}" for n, rule in enumerate(point.rules)]
    return "<br>".join([point.name, *rules])


def describe_rule(rule: Rule) -> str:
    """A rule in the words of the plan's fields, short enough for a cell of a heat map."""
    parts = [] if rule.experts is None else [f"{len(rule.experts)} experts"]
    for name, text in (
        ("top_k", "top_k {}"),
        ("threshold", "threshold {:.2g}"),
        ("top_p", "top_p {:.3g}"),
        ("guaranteed", "guaranteed {}"),
        ("budget", "budget {}"),
        ("budget_per_rank", "budget a rank {}"),
    ):
        if (value := getattr(rule, name)) is not None:
            parts.append(text.format(value))
    if rule.renormalise < 1:
        between = f"weights renormalised by {rule.renormalise:g}"
        parts.append(between if rule.renormalise else "weights kept")
    return ", ".join(parts) or "full"
