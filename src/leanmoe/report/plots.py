"""The plots of the page, each a plotly figure made from one section of the results."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from leanmoe.results.tune import Results, describe_rule

INK = "#1d2b3a"
FULL = "#8a97a6"
OURS = "#0b7a75"
OTHER = "#d08c60"
LIMIT = "#b3261e"
COLOURS = ("#0b7a75", "#d08c60", "#5b5ea6", "#a23b72", "#4f772d", "#3a86c8", "#8d6a9f", "#c9a227")


def front(results: Results, concurrency: int) -> go.Figure:
    """Next-token loss against MoE-layer time for the plans validated at one load."""
    points = next(f for f in results["fronts"] if f["concurrency"] == concurrency)["points"]
    figure = figure_with(
        "MoE layer time, share of the full model's (less is faster)",
        "next-token loss, increase over the full model",
    )
    margin = results["settings"]["margin"]
    figure.add_hline(
        y=100 * margin,
        line={"color": LIMIT, "dash": "dash", "width": 1.5},
        annotation_text=f"margin {100 * margin:g}%",
        annotation_font_color=LIMIT,
        annotation_position="top left",
    )
    for chosen, colour, name in ((False, FULL, "validated"), (True, OURS, "chosen plan")):
        shown = [p for p in points if bool(p["chosen"]) is chosen]
        if shown:
            figure.add_trace(_loss_points(shown, "modelled_time", name, colour, chosen))
    # As many digits as tell two ticks apart; around a single point plotly would reach below none.
    times = [p["modelled_time"] for p in points]
    if times:
        beside = max(0.02, 0.05 * (max(times) - min(times)))
        figure.update_xaxes(range=[min(times) - beside, max(times) + beside])
    figure.update_xaxes(tickformat="~%")
    return figure


def strategies(results: Results, concurrency: int) -> go.Figure:
    """What every strategy loses on one budget, at one load, on the same held-out text."""
    tables = [t for t in results.get("strategies", []) if t["concurrency"] == concurrency]
    rows = [row for table in tables for row in table["rows"]]
    rows.sort(key=lambda row: row["loss"]["ratio"], reverse=True)
    losses = [row["loss"] for row in rows]
    figure = figure_with("next-token loss, increase over the full model", "")
    figure.add_trace(
        go.Bar(
            x=[100 * loss["ratio"] for loss in losses],
            y=[row["strategy"] for row in rows],
            orientation="h",
            marker_color=[OURS if row["strategy"] == "leanmoe" else FULL for row in rows],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * (loss["high"] - loss["ratio"]) for loss in losses],
                "arrayminus": [100 * (loss["ratio"] - loss["low"]) for loss in losses],
                "color": INK,
            },
            hovertemplate="%{y}<br>%{x:+.2f}%<extra></extra>",
        )
    )
    figure.update_xaxes(ticksuffix="%")
    return figure


def gain(results: Results) -> go.Figure:
    """Measured throughput with the plan over the full model's, with intervals, over load."""
    entries = results["gain"]
    names = [load_name(entry) for entry in entries]
    ratios = [entry["ratio"] for entry in entries]
    figure = figure_with("load", "output throughput, plan over full model")
    figure.add_hline(y=0, line={"color": FULL, "width": 1.5})
    figure.add_trace(
        go.Bar(
            x=names,
            y=[100 * (ratio["median"] - 1) for ratio in ratios],
            marker_color=OURS,
            width=0.45,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (ratio["high"] - ratio["median"]) for ratio in ratios],
                "arrayminus": [100 * (ratio["median"] - ratio["low"]) for ratio in ratios],
                "color": INK,
            },
            hovertemplate="%{x}<br>%{y:+.1f}%<extra></extra>",
        )
    )
    figure.update_yaxes(ticksuffix="%")
    return figure


def plan_heat_map(plan: dict[str, Any], slots: dict[int, list[float]]) -> go.Figure:
    """Each MoE layer's rule for prompts and in each band; the colour is a token's mean slots."""
    bands = plan["bands"]
    names, previous = [], 0
    for band in bands:
        names.append(f"{previous + 1} to {band['up_to']}" if band["up_to"] else f"{previous + 1}+")
        previous = band["up_to"] or previous
    layers = list(range(plan["model"]["moe_layers"]))
    most = plan["model"]["top_k"]
    columns = [slots.get(b, [float(most)] * len(layers)) for b in range(len(bands))]
    rules = [band["rules"] for band in bands]
    if plan.get("prompt"):
        names.insert(0, "prompt tokens")
        columns.insert(0, [float(rule.get("top_k", most)) for rule in plan["prompt"]])
        rules.insert(0, plan["prompt"])
    values = [[column[layer] for column in columns] for layer in layers]
    texts = [[describe_rule(column[layer]) for column in rules] for layer in layers]
    figure = figure_with("tokens in a forward step", "MoE layer")
    figure.add_trace(
        go.Heatmap(
            x=names,
            y=[str(layer) for layer in layers],
            z=values,
            text=texts,
            texttemplate="%{text}",
            zmin=0,
            zmax=most,
            xgap=3,
            ygap=3,
            colorscale=[[0, "#0b7a75"], [0.6, "#9ecfc9"], [1, "#f2f5f7"]],
            colorbar={"title": {"text": "slots"}, "thickness": 12},
            hovertemplate="layer %{y}, %{x} tokens<br>%{text}<br>%{z:.2f} slots<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def expert_use(results: Results) -> go.Figure:
    """How often each expert is chosen, layer by layer, most used first; even use would be 1."""
    layers = results["profile"]["layers"]
    figure = figure_with("expert, by rank in its layer", "MoE layer")
    rows = [
        sorted((share * len(layer["use"]) for share in layer["use"]), reverse=True)
        for layer in layers
    ]
    figure.add_trace(
        go.Heatmap(
            z=rows,
            y=[str(layer["layer"]) for layer in layers],
            zmin=0,
            colorscale=[[0, "#f2f5f7"], [0.4, "#9ecfc9"], [1, "#0b5a56"]],
            colorbar={"title": {"text": "x even"}, "thickness": 12},
            hovertemplate="layer %{y}, rank %{x}<br>%{z:.2f} x even use<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def distinct_experts(results: Results) -> go.Figure:
    """Distinct experts a step wakes over its tokens: real routing against the uniform formula."""
    layers = results["profile"]["layers"]
    figure = figure_with("tokens in a forward step", "distinct experts awake")
    for number, layer in enumerate(layers):
        figure.add_trace(
            go.Scatter(
                x=[d["tokens"] for d in layer["distinct"]],
                y=[d["measured"] for d in layer["distinct"]],
                name=f"layer {layer['layer']}",
                mode="lines+markers",
                line={"color": COLOURS[number % len(COLOURS)], "width": 1.5},
                marker={"size": 5},
            )
        )
    uniform = layers[0]["distinct"]
    figure.add_trace(
        go.Scatter(
            x=[d["tokens"] for d in uniform],
            y=[d["uniform"] for d in uniform],
            name="uniform formula",
            line={"color": INK, "dash": "dash"},
            mode="lines",
        )
    )
    figure.update_xaxes(type="log", dtick=0.30103)
    return figure


def gate_mass(results: Results) -> go.Figure:
    """The share of a token's gate mass that its best j experts carry, layer by layer."""
    figure = figure_with("best j of the token's experts", "share of the gate mass")
    for number, layer in enumerate(results["profile"]["layers"]):
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(layer["mass"]) + 1)),
                y=layer["mass"],
                name=f"layer {layer['layer']}",
                mode="lines+markers",
                line={"color": COLOURS[number % len(COLOURS)], "width": 1.5},
                marker={"size": 5},
            )
        )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(dtick=1)
    return figure


def load_name(entry: dict[str, Any]) -> str:
    """A load as a reader would say it."""
    lengths = f"{entry['input_tokens']} in, {entry['output_tokens']} out"
    return f"{entry['concurrency']} at once<br>{lengths}"


def _loss_points(
    rows: list[dict[str, Any]], cost: str, name: str, colour: str, strong: bool
) -> go.Scatter:
    losses = [row["loss"] for row in rows]
    texts = ["<br>".join([row.get("name", name), *_rules_in_lines(row)]) for row in rows]
    return go.Scatter(
        x=[row[cost] for row in rows],
        y=[100 * loss["ratio"] for loss in losses],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (loss["high"] - loss["ratio"]) for loss in losses],
            "arrayminus": [100 * (loss["ratio"] - loss["low"]) for loss in losses],
            "thickness": 1,
        },
        mode="markers",
        name=name,
        text=texts,
        marker={"color": colour, "size": 11 if strong else 7},
        line={"color": colour, "width": 2.5 if strong else 1},
        hovertemplate="%{text}<br>%{x:.3g}: %{y:+.2f}%<extra></extra>",
    )


def _rules_in_lines(row: dict[str, Any]) -> list[str]:
    return [f"layer {n}: {describe_rule(rule)}" for n, rule in enumerate(row.get("rules", []))]


def figure_with(x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the page's style."""
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
    if "loss" in y_title:
        figure.update_yaxes(ticksuffix="%")
    return figure
