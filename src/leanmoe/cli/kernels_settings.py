"""What `leanmoe kernels` is asked to do; every default stands here.

It lies beside the command, since whoever imports `leanmoe.kernels` loads torch."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.options import argument, numbers_text, option
from leanmoe.core.parsing import parse_counts, require

ACTIONS = ("tune", "list")
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")


def parse_shape(name: str, text: str) -> tuple[int, int, int, int]:
    """Reads "experts,hidden,width,slots". Raises LeanMoeError for anything else."""
    sizes = parse_counts(name, text)
    require(len(sizes) == 4, name, repr(text), "4 numbers: experts,hidden,width,slots")
    experts, hidden, width, slots = sizes
    if slots > experts:
        raise LeanMoeError(f"{name} is {text!r}: {slots} slots are more than {experts} experts")
    return experts, hidden, width, slots


@dataclass(frozen=True)
class KernelsSettings:
    """The settings of one search for tiles."""

    action: str = argument("'tune' for this GPU, or 'list' what there is.", metavar="tune|list")
    models: tuple[str, ...] = argument(
        "Models to tune for: folders, config.json files, Hub names, or 'reference'.",
        (),
        repeats=True,
    )
    shape: tuple[tuple[int, int, int, int], ...] = option(
        (),
        "A shape in place of a model, as experts,hidden,width,slots; may be repeated.",
        parse=parse_shape,
        repeats=True,
    )
    dtype: str = option(
        "bfloat16",
        "The number format of the weights: bfloat16, float16, float32 or float8_e4m3fn.",
    )
    transposed: bool = option(False, "The weights of --shape lie as gpt-oss has them.")
    tokens: tuple[int, ...] = option(
        (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        "Numbers of tokens in a step to tune for, comma separated.",
        parse=parse_counts,
        text=lambda values: numbers_text(values).replace(",", ", "),
    )
    most_error: float | None = option(
        None,
        "How far off float64 a tile may be, relative; by default 0.04 for fp8 weights and 0.01 "
        "for half precision.",
    )

    def check(self) -> None:
        """Raises LeanMoeError for the first setting that is not allowed."""
        if self.action not in ACTIONS:
            raise unknown_name("action", self.action, ACTIONS)
        if self.action == "list":
            if asked := [*self.models, *(",".join(map(str, each)) for each in self.shape)]:
                raise LeanMoeError(
                    f"list takes no shape, it shows all: leave out {', '.join(asked)}"
                )
            return
        require(self.dtype in DTYPES, "--dtype", repr(self.dtype), f"one of {', '.join(DTYPES)}")
        if self.most_error is not None:
            allowed = "between 0 and 1"
            require(0 < self.most_error < 1, "--most-error", f"{self.most_error:g}", allowed)
        if not self.models and not self.shape:
            raise LeanMoeError("nothing to tune: name a model, or give --shape")
