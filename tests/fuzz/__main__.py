"""Reads 100,000 damaged inputs, and writes how they ended.

python -m tests.fuzz --rounds 100
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from tests.fuzz.readers import KINDS
from tests.fuzz.run import INPUTS, counted, shares

COUNTS = ("inputs", "results", "refusals", "faults", "seconds")


def main() -> None:
    """Runs rounds of all kinds, prints each fault, and writes all after each round."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=100, help=f"each of {INPUTS:,} inputs")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind alone, as many of it")
    asked = parser.parse_args()
    made = collect()
    path = file_of(asked.output, "fuzz", made)
    kinds: dict[str, dict[str, Any]] = {}
    for number in range(asked.rounds):
        for kind, inputs in shares(INPUTS).items():
            if asked.kind in (None, kind):
                add(kinds, kind, counted(kind, inputs, number))
        total = sum(each["inputs"] for each in kinds.values())
        faults = sum(each["faults"] for each in kinds.values())
        print(f"round {number}: {total:,} inputs, {faults} faults", flush=True)
        found = {"fuzz": 1, "rounds": number + 1, "inputs": total, "faults": faults}
        write(path, made, "tested", {**found, "kinds": kinds})
    for kind, each in kinds.items():
        print(f"{kind}: {', '.join(f'{each[name]:,} {name}' for name in COUNTS)}")
    print(path)


def add(kinds: dict[str, dict[str, Any]], kind: str, counts: dict[str, Any]) -> None:
    """Adds a round's counts of a kind to those before; prints its faults."""
    for fault in counts["found"]:
        print(f"{kind}: {fault['times']} times {fault['what']}", flush=True)
    before = kinds.setdefault(kind, {**dict.fromkeys(COUNTS, 0), "found": []})
    kinds[kind] = {
        **{name: round(before[name] + counts[name], 1) for name in COUNTS},
        "found": before["found"] + counts["found"],
    }


if __name__ == "__main__":
    main()
