"""Which vLLM is at work, and whether what leanmoe touches in it is as in one that leanmoe ran with.

Its files are read, not run: so `leanmoe serve --check` can ask without a model, and without vLLM
starting up.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import RAN
from leanmoe.serve.vllm.hook_signatures import (
    ABSENT,
    LAYERS,
    ROUTING,
    RUNNERS,
    STEPS,
    Read,
    known_signatures,
    read_signatures,
    symbols_of,
)

EQUAL = symbols_of(ROUTING, LAYERS, STEPS)
"""What must be as in a version that ran."""
THERE = symbols_of(RUNNERS)
"""What must be there; only its first parameters are used, by name."""


def version() -> str:
    """The version of the vLLM that is imported, without what its build adds to the number."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def naming(error: LeanMoeError, number: str) -> LeanMoeError:
    """The refusal with vLLM's version in its line."""
    said = str(error)
    return error if number in said else LeanMoeError(f"vLLM {number}: {said}")


def skips_padding_by_default(number: str) -> bool:
    """Whether VLLM_MOE_SKIP_PADDING is 1 in this version unless it is set."""
    return tuple(int(part) for part in number.split(".")[:2] if part.isdigit()) >= (0, 27)


def files_of_vllm() -> Read:
    """Gives the text of the installed vLLM's files."""

    def read(name: str) -> str | None:
        spec = find_spec("vllm")
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        paths = [Path(place, name) for place in places]
        return next((path.read_text("utf-8") for path in paths if path.is_file()), None)

    return read


def check_hooks(number: str, read: Read) -> str:
    """What is known of vLLM `number`, whose files `read` gives, as a line for the log.

    Raises LeanMoeError for a version that leanmoe never ran with, unless what it touches there has
    the signatures of one that it ran with.
    """
    if number in RAN:
        return f"vLLM {number} is one that leanmoe ran with"
    like, differing = nearest(read)
    if differing:
        raise LeanMoeError(
            f"vLLM {number} was never run with leanmoe, and {differing[0]} is another than in "
            f"{like}: install one of {', '.join(RAN)}, or unset LEANMOE_PLAN"
        )
    return f"vLLM {number} was never run with leanmoe, but is as {like} in what leanmoe touches"


def nearest(read: Read) -> tuple[str, list[str]]:
    """The version that ran which is most like this one, and the symbols that differ from it."""
    found = read_signatures(read, (*EQUAL, *THERE))
    missing = [symbol for symbol in THERE if found[symbol] == ABSENT]
    known = known_signatures()
    differing = {
        ran: [symbol for symbol in EQUAL if found[symbol] != known[ran][symbol]] + missing
        for ran in reversed(RAN)
        if ran in known
    }
    best = min(differing, key=lambda ran: len(differing[ran]))
    return best, differing[best]
