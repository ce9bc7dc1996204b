"""A hook of mkdocs that writes the reference pages that follow from the code.

The command line comes from the verbs' own parsers, the Python API from signatures and docstrings,
the families from `leanmoe.models.families`, from what the tests of vLLM run and from the results
files of its benchmarks, shape letters and environment variables from `leanmoe.core`.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

import leanmoe
from leanmoe.cli import VERBS, app
from leanmoe.core.environment import VARIABLES
from leanmoe.core.shapes import LETTERS
from leanmoe.models.families import FAMILIES
from leanmoe.models.family import REFUSED, Family
from leanmoe.models.hf_config import HfConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEYS = {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 8, "topk_group": 4}
"""Keys of a config.json with values that show whether a family reads them."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every verb with its parser, in the order of `leanmoe --help`."""
    group = typer.main.get_command(app)
    context = group.make_context("leanmoe", ["tune", "--help"], resilient_parsing=True)
    for verb in VERBS:
        yield verb, group.resolve_command(context, [verb])[1]  # type: ignore[attr-defined]


def cli_page() -> str:
    """The page of the command line: a table of options for each verb."""
    lines = [
        "# Command line",
        "",
        "Every verb says the same with `--help`. `--debug` shows an error's traceback.",
        "Exit codes: 1 for a mistake that one line explains, 2 for a wrong command line, 130 for "
        "Ctrl-C.",
        "",
    ]
    for verb, command in commands():
        lines += [f"## {verb}", "", VERBS[verb], ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [_option_row(parameter) for parameter in command.params]
        lines.append("")
    return "\n".join(lines)


def _option_row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.metavar or parameter.name] if is_argument else _flags(parameter)
    default = parameter.default() if callable(parameter.default) else parameter.default
    is_shown = not is_argument and not isinstance(default, bool) and default not in (None, (), [])
    shown = f"`{_plain(default)}`" if is_shown else ""
    meaning = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    shown_names = ", ".join(f"`{name.replace('|', ' or ')}`" for name in names)
    return f"| {shown_names} | {shown} | {meaning} |"


def _flags(parameter: Any) -> list[str]:
    return [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts]


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(getattr(value, "value", value))


def python_page() -> str:
    """The page of the Python API: every public name with its signature and docstring."""
    lines = ["# Python", "", inspect.getdoc(leanmoe) or "", ""]
    for name in sorted(leanmoe.__all__, key=str.lower):
        lines += _entry(f"leanmoe.{name}", getattr(leanmoe, name), 2)
    return "\n".join(lines)


def _entry(name: str, value: Any, depth: int) -> list[str]:
    target = type(value).__call__ if isinstance(value, ModuleType) else value
    lines = [f"{'#' * depth} `{name}`", ""]
    if signature := _signature(target):
        lines += ["```python", f"{name.rpartition('.')[2]}{signature}", "```", ""]
    lines += [_documentation(target), ""]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for member, function in _public_members(value):
            lines += _entry(f"{name.rpartition('.')[2]}.{member}", function, depth + 1)
    return lines


def _signature(target: Any) -> str:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return ""
    shown = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    text = ",\n    ".join(map(_parameter, shown))
    returned = signature.return_annotation
    end = "" if returned is signature.empty else f" -> {_annotation(returned)}"
    return f"(\n    {text},\n){end}" if text else f"(){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        text = f"*{text}"
    elif parameter.kind is parameter.VAR_KEYWORD:
        text = f"**{text}"
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")


def _documentation(target: Any) -> str:
    """The docstring, its list of arguments written as Markdown writes lists."""
    text = inspect.getdoc(target) or ""
    text = re.sub(r"^Args:\n", "Arguments:\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^ {8}(?=\S)", "  ", text, flags=re.MULTILINE)


def _public_members(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in vars(owner).items():
        if not name.startswith("_") and isinstance(value, classmethod | staticmethod):
            yield name, value.__func__
        elif not name.startswith("_") and inspect.isfunction(value):
            yield name, value


def families_page() -> str:
    """The page of families: what each router does, and which verbs and engines run it."""
    runnable = sum(family.not_runnable is None for family in FAMILIES.values())
    lines = [
        "# Families",
        "",
        f"leanmoe knows {len(FAMILIES)} families by the `model_type` of a config.json, and runs "
        f"{runnable} of them under a plan.",
        "`inspect` and `predict` read the config alone. `tune`, `eval`, `bench`, `prune` and "
        "`apply` run the model in Transformers; tests run a tiny one of each family.",
        "The vLLM plugin reads routers from vLLM's own classes; the column says what was run. "
        "A family without an entry there was not tried.",
        "",
        "| model_type | scores | weights normalised | bias for ranking | inspect, predict | "
        "tune, eval, bench, prune, apply | vLLM, run on |",
        "|---|---|---|---|---|---|---|",
    ]
    where = run_in_vllm()
    lines += [
        _family_row(name, family, where.get(name, [])) for name, family in sorted(FAMILIES.items())
    ]
    refused = [
        f"- `{name}`: {family.not_runnable}."
        for name, family in FAMILIES.items()
        if family.not_runnable
    ]
    refused += [
        f"- `{name}`: {reason} (nor can it be inspected)." for name, reason in REFUSED.items()
    ]
    return "\n".join([*lines, "", "Not runnable, with the reason:", "", *refused, ""])


def run_in_vllm() -> dict[str, list[str]]:
    """By family: where vLLM ran one under a plan, in tests and in results files of benchmarks."""
    tested = runpy.run_path(str(ROOT / "tests" / "engines" / "vllm" / "families.py"))
    where = {name: ["tests (CPU)"] for name in (*tested["RUN"], tested["REFERENCE"])}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not str(result.get("leanmoe_benchmark")).startswith("vllm"):
            continue
        name = (result.get("config") or result["model"])["model_type"]
        gpu = re.sub(r"NVIDIA (\w+).*", r"\1", result["provenance"]["hardware"])
        if gpu not in where.setdefault(name, []):
            where[name].append(gpu)
    return where


def _family_row(name: str, family: Family, where: Sequence[str]) -> str:
    on, off = _router(family, True), _router(family, False)
    normalises = "by its config" if on.normalise != off.normalise else _yes(on.normalise)
    runs = "no" if family.not_runnable else "yes"
    scoring = on.scoring.replace("_", " ")
    return (
        f"| {name} | {scoring} | {normalises} | {_yes(on.ranking_bias is not None)} | yes | {runs} "
        f"| {', '.join(where) or '–'} |"
    )


def _router(family: Family, normalise: bool) -> Any:
    return family.router(HfConfig({**family.defaults, **KEYS, "norm_topk_prob": normalise}))


def _yes(value: object) -> str:
    return "yes" if value else "no"


def environment_table() -> str:
    """Every environment variable that leanmoe reads, as a table."""
    rows = [f"| `{v.name}` | {v.allowed} | {v.default} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(
        ["| variable | values | where it is not set | meaning |", "|---|---|---|---|", *rows]
    )


def letters_table() -> str:
    """The one alphabet of shape letters, as a table."""
    rows = [f"| {letter} | {meaning} |" for letter, meaning in LETTERS.items()]
    return "\n".join(["| letter | dimension |", "|---|---|", *rows])


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/python.md": python_page,
    "reference/families.md": families_page,
}
"""By path in the site: what writes the page."""
TABLES: dict[str, Callable[[], str]] = {
    "<!-- generated: environment variables -->": environment_table,
    "<!-- generated: shape letters -->": letters_table,
}
"""By the comment in whose place it stands: what writes the table."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the written pages to the site; mkdocs calls it."""
    from mkdocs.structure.files import File

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the written tables in their places; mkdocs calls it."""
    for comment, write in TABLES.items():
        if comment in markdown:
            markdown = markdown.replace(comment, write())
    return markdown
