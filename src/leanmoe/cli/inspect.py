"""`leanmoe inspect`: what a model is, and what fewer experts could gain, from config.json alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from leanmoe.cli.options import AsJson, make_console, print_json
from leanmoe.models.catalog import find_shape
from leanmoe.models.settings import InspectSettings
from leanmoe.models.shape import MoEShape, distinct_grouped, distinct_uniform

LOWER_SHARES = (0.75, 0.5, 0.25)
"""The lower k that are shown, as shares of the model's own."""
TOKENS_AT_THE_RIDGE = 200
"""Tokens an expert that make it bound by compute: an H200's 989 TFLOP/s over 4.8 TB/s, bf16."""
NOTE = (
    "Modelled: tokens choose experts independently and evenly, each weight is read once a step, "
    "and reading it is all that takes time; KV cache and activations are left out. It stops "
    "holding where an active expert has hundreds of tokens (about {ridge} on an H200; shown as "
    "–): there time falls with k itself. Real tokens agree on experts and activate fewer, "
    "which leanmoe tune measures."
)
GROUPS_NOTE = " 'groups agree': every token of a step uses the same groups, the lower end."


def inspect(settings: InspectSettings, as_json: AsJson = False) -> None:
    """Show what a model is and what fewer experts could gain, from config.json alone.

    Example:
    leanmoe inspect deepseek-ai/DeepSeek-V3 --bandwidth 4800
    """
    model = settings.model
    shape = find_shape(model)
    steps = [_step(shape, tokens, settings.bandwidth) for tokens in settings.batch_sizes]
    if as_json:
        print_json({"model": model, **_facts(shape), "label": "modelled", "steps": steps})
        return
    console = make_console()
    console.print(_summary(model, shape), "")
    if shape.storage.unknown is None:
        console.print("A decode step by its tokens, and the ideal gain at lower k", style="bold")
        console.print(_table(shape, steps))
        note = NOTE.format(ridge=TOKENS_AT_THE_RIDGE)
        limited = shape.router.limits_groups
        console.print(note + GROUPS_NOTE if limited else note, style="dim")
    else:
        console.print(f"Bytes of weights cannot be told: {shape.storage.unknown}.", markup=False)
    if shape.hash_layers:
        console.print(
            f"Layers {_span(shape.hash_layers)} pick experts by token id, from a table: no score "
            "ranks them, no rule applies, and they stay as trained."
        )
    if shape.not_runnable is not None:
        console.print(f"No plan can run on {shape.model_type}: {shape.not_runnable}.")
    elif shape.not_loadable is not None:
        console.print(
            f"{shape.not_loadable}: leanmoe apply, tune, eval, prune and bench --engine "
            "transformers cannot run it. An engine that has one may run a plan."
        )


def _facts(shape: MoEShape) -> dict[str, Any]:
    """Everything that is read from the config, for JSON; bytes that cannot be told are null."""
    is_known = shape.storage.unknown is None
    return {
        "architecture": shape.architecture,
        "model_type": shape.model_type,
        "layers": shape.layers,
        "moe_layers": list(shape.moe_layers),
        "hash_layers": list(shape.hash_layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "shared_experts": shape.shared_experts,
        "hidden": shape.hidden,
        "expert_width": shape.expert_width,
        "shared_width": shape.shared_width,
        "dense_width": shape.dense_width,
        "vocabulary": shape.vocabulary,
        "router": asdict(shape.router),
        "storage": asdict(shape.storage),
        "expert_parameters": shape.expert_parameters,
        "expert_bytes": shape.expert_bytes if is_known else None,
        "always_bytes": shape.always_bytes() if is_known else None,
        "total_bytes": shape.total_bytes() if is_known else None,
        "active_bytes": shape.decode_bytes(shape.top_k) if is_known else None,
        "total_parameters": shape.total_parameters(),
        "active_parameters": shape.active_parameters(),
        "parameters": asdict(shape.parameters),
        "not_runnable": shape.not_runnable,
        "not_loadable": shape.not_loadable,
    }


def _step(shape: MoEShape, tokens: int, bandwidth: float | None) -> dict[str, Any]:
    """A decode step of `tokens`: distinct experts, bytes, and the ratio of bytes at lower k."""
    distinct = distinct_uniform(shape.experts, shape.top_k, tokens)
    needed = shape.decode_bytes(distinct)
    step: dict[str, Any] = {
        "tokens": tokens,
        "distinct": distinct,
        "tokens_an_expert": tokens * shape.top_k / distinct,
    }
    groups, used = shape.router.groups, shape.router.groups_used
    if used < groups:
        agreed = distinct_grouped(shape.experts, shape.top_k, tokens, groups, used)
        step["distinct_if_groups_agree"] = agreed
    if shape.storage.unknown is not None:
        return step
    step["bytes"] = needed
    step["gain"] = {
        str(k): needed / shape.decode_bytes(distinct_uniform(shape.experts, k, tokens), distinct)
        for k in _lower(shape.top_k)
    }
    if bandwidth is not None:
        step["milliseconds"] = needed / bandwidth / 1e6
    return step


def _lower(top_k: int) -> list[int]:
    lower = {max(1, round(top_k * share)) for share in LOWER_SHARES}
    return sorted(lower - {top_k}, reverse=True)


def _summary(name: str, shape: MoEShape) -> Table:
    """What the model is, in words."""
    is_known = shape.storage.unknown is None
    found, router = shape.parameters, shape.router
    read = {
        "attention": found.mixers,
        "shared": found.shared,
        "dense": found.dense,
        "head": found.head or found.embedding,
    }
    experts = f"{shape.experts} a layer, {shape.top_k} a token"
    if shape.shared_experts:
        experts += f", {shape.shared_experts} shared"
    if router.limits_groups:
        experts += f"; from {router.groups_used} of {router.groups} groups"
    if router.zero_experts:
        experts += f"; {router.zero_experts} are the identity, without weights"
    lines = {
        "model": f"{name} ({shape.architecture}, {shape.model_type})",
        "layers": f"{shape.layers}, {shape.routed_layers} of them with experts",
        "experts": experts,
        "router": _router(shape),
        "one expert": f"width {shape.expert_width}, {_count(shape.expert_parameters)} parameters, "
        + (
            f"{_bytes(shape.expert_bytes)} ({shape.storage.name})"
            if is_known
            else "bytes not known"
        ),
        "parameters": f"{_count(shape.total_parameters())}, "
        f"{_count(shape.active_parameters())} active",
        "bytes": f"{_bytes(shape.total_bytes())}, {_bytes(shape.decode_bytes(shape.top_k))} read "
        "by a step of one token"
        if is_known
        else "not known",
        "always read": (f"{_bytes(shape.always_bytes())} a step: " if is_known else "")
        + "parameters of "
        + ", ".join(f"{part} {_count(count)}" for part, count in read.items() if count),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a long path is broken, not cut
    for label, text in lines.items():
        table.add_row(Text(label, "dim"), text)
    return table


NOT_NORMALISED = "weights not normalised (renormalise in a rule has no effect)"


def _router(shape: MoEShape) -> str:
    router = shape.router
    words = [router.scoring.replace("_", " ").replace("top k", "top-k")]
    if router.ranking_bias:
        words.append("a bias ranks")
    words.append("weights normalised" if router.normalises else NOT_NORMALISED)
    if router.scaling != 1:
        words.append(f"times {router.scaling:g}")
    return ", ".join(words)


def _span(layers: tuple[int, ...]) -> str:
    """The layers, as a range where they follow each other."""
    first, last = layers[0], layers[-1]
    is_range = len(layers) > 1 and last - first == len(layers) - 1
    return f"{first} to {last}" if is_range else ", ".join(map(str, layers))


def _table(shape: MoEShape, steps: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grouped, timed = "distinct_if_groups_agree" in steps[0], "milliseconds" in steps[0]
    headings = ["tokens", "distinct\nexperts"]
    headings += ["groups\nagree"] if grouped else []
    headings += ["tokens\nan expert", "bytes\nread"] + (["at\nleast"] if timed else [])
    for heading in headings + [f"k={k}" for k in _lower(shape.top_k)]:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for step in steps:
        bound = step["tokens_an_expert"] > TOKENS_AT_THE_RIDGE
        row = [str(step["tokens"]), f"{step['distinct']:.1f}"]
        row += [f"{step['distinct_if_groups_agree']:.1f}"] if grouped else []
        row += [f"{step['tokens_an_expert']:.1f}", _bytes(step["bytes"])]
        row += [f"{step['milliseconds']:.3g} ms"] if timed else []
        row += ["–" if bound else f"{100 * (g - 1):+.0f}%" for g in step["gain"].values()]
        table.add_row(*row)
    return table


def _count(number: float) -> str:
    return _scaled(number, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")), "")


def _bytes(number: float) -> str:
    return _scaled(number, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " B")


def _scaled(number: float, units: tuple[tuple[float, str], ...], rest: str) -> str:
    for size, unit in units:
        if number >= size:
            digits = 0 if number >= 99.95 * size else 1 if number >= 9.995 * size else 2
            return f"{number / size:.{digits}f}{unit}"
    return f"{number:.0f}{rest}"
