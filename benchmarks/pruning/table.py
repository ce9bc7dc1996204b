"""The results of `measure` in tables: loss, speed and memory of every setting in one of them."""

from __future__ import annotations

from typing import Any

STEPS = {
    "prompts": "prompts",
    "1": "1 decodes",
    "8": "8 decode",
    "32": "32 decode",
}


def one_table(result: dict[str, Any]) -> str:
    """Every setting's loss, speed at each load, weights and peak memory, as Markdown."""
    has_speed = any("speed" in row for row in result["rows"])
    names = ["setting", "loss", *(STEPS.values() if has_speed else ()), "weights, MB", "peak, MB"]
    lines = [_line(names), _line(["---"] * len(names))]
    for row in result["rows"]:
        name = row["criterion"] + ("" if row["keep"] == "100%" else f", {row['keep']}")
        cells = [name, _share(row["increase"]) if "increase" in row else "0"]
        if has_speed:
            cells += [_speed(row["speed"][load]) for load in STEPS]
        cells.append(f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "")
        cells.append(f"{row['peak_bytes'] / 1e6:.0f}")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _share(value: dict[str, float]) -> str:
    middle, low, high = (100 * value[name] for name in ("ratio", "low", "high"))
    return f"{middle:+.1f}% [{low:.1f}, {high:.1f}]"


def _speed(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def shown(estimate: dict[str, float], key: str = "ratio") -> str:
    """A share in percent with its interval."""
    value, low, high = (100 * estimate[name] for name in (key, "low", "high"))
    return f"{value:+.2f}% [{low:+.2f}, {high:+.2f}]"


def show(result: dict[str, Any]) -> None:
    """What is compared, for a terminal."""
    print("\nloss of the first less that of the second, in shares of the full model's")
    for row in result["against"]:
        names = f"{row['criterion']} - {row['rival']}"
        print(f"{names:32s} {row['keep']:>6s}  {shown(row['difference'])}")
    print("\nskipping against pruning at equal speed or better")
    for row in result["ordering"]:
        line = f"{row['load']:>7s} {row['keep']:>6s} {row['criterion']:14s} {row['skipping']:16s}"
        if "setting" in row:
            line += f" {row['setting']:18s} {shown(row['difference'])}"
        print(f"{line}  {row['verdict']}")
    counted: dict[str, int] = {}
    for row in result["ordering"]:
        counted[row["verdict"]] = counted.get(row["verdict"], 0) + 1
    print(counted)
