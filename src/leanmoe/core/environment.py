"""The environment variables that leanmoe reads: each one's name, values and meaning, once.

Whoever reads one imports its name from here. `VARIABLES` is the reference page's table.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAN = "LEANMOE_PLAN"
LEVEL = "LEANMOE_LEVEL"
DROP = "LEANMOE_DROP"
TIERS = "LEANMOE_TIERS"
SLO = "LEANMOE_SLO"
PLAN_KEY = "LEANMOE_PLAN_KEY"
BATCH_SCOPE = "LEANMOE_BATCH_SCOPE"
EXPERTS = "LEANMOE_EXPERTS"
STATISTICS = "LEANMOE_STATISTICS"
CHECK_ROWS = "LEANMOE_CHECK_ROWS"
TUNED = "LEANMOE_TUNED"
COMMIT = "LEANMOE_COMMIT"


@dataclass(frozen=True)
class Variable:
    """One environment variable, as the reference page shows it."""

    name: str
    default: str
    """What holds where the variable is not set, or empty."""
    allowed: str
    meaning: str
    """One whole sentence, or several."""


VARIABLES = (
    Variable(
        PLAN,
        "the full model runs",
        "the path of a plan.json",
        "The plan that vLLM and SGLang run. Their processes read it as they start. Of "
        "several, with commas between, vLLM runs one at a time, the first at start. That "
        "includes tiers.",
    ),
    Variable(
        LEVEL,
        "the plan's only level",
        "a level's name",
        "Names the level to run, of a plan that has several. Without it such a plan is refused.",
    ),
    Variable(
        DROP,
        "nothing is left out",
        "prompt",
        "Names the parts of the plan that may be left out, separated by commas. Without it an "
        "engine refuses a plan that it cannot run whole.",
    ),
    Variable(
        TIERS,
        "0",
        "0, 1",
        "1 lets requests in vLLM name the level that they are served at. LEANMOE_LEVEL is then "
        "that of requests that name none, which is the most careful one where it is not set.",
    ),
    Variable(
        SLO,
        "load changes no level",
        "like tpot=30ms,ttft=500ms",
        "Limits the time per output token, the time to the first token, or both. While a limit is "
        "in danger vLLM then serves replies at a faster level of the plan. It includes tiers.",
    ),
    Variable(
        PLAN_KEY,
        "the plan cannot be changed",
        "any text",
        "The key that POST /leanmoe/plan asks for in vLLM's server. vLLM's own key does not guard "
        "that path.",
    ),
    Variable(
        BATCH_SCOPE,
        "rank",
        "rank, all",
        "Says whose tokens a batch-aware rule sees under data parallelism: those of the token's "
        "own rank, or those of all ranks. SGLang has rank alone.",
    ),
    Variable(
        EXPERTS,
        "vLLM's, and leanmoe's where vLLM's would compute what a plan skips and leanmoe's can run",
        "vllm, leanmoe",
        "Says whose kernels compute the experts in vLLM. A layer that leanmoe's kernels cannot "
        "compute is refused, and so is leanmoe in SGLang.",
    ),
    Variable(
        STATISTICS,
        "0",
        "0, 1",
        "1 keeps each step's expert ids in vLLM, so that /metrics and PlanWorker can say what "
        "ran. `leanmoe serve` sets it.",
    ),
    Variable(
        CHECK_ROWS,
        "0",
        "0, 1",
        "1 compares in vLLM, in each step, which rows are a prompt's with the positions on the "
        "device, row by row. It is slow, and ends the engine where one differs.",
    ),
    Variable(
        TUNED,
        "the tiles that leanmoe ships",
        "a folder that `leanmoe kernels` wrote",
        "Names a folder of tile sizes that were measured on this machine. They come first.",
    ),
    Variable(
        COMMIT,
        "what git says",
        "a commit",
        "Names the commit in results files, where the code was copied without its history.",
    ),
)
