"""Which experts a token gets: pure tensor functions of router logits, a rule and a padding mask.

Shape suffixes: B independent forward steps (may be absent), T tokens in a step, E experts, K slots
a token, G groups of experts. An id equal to E is a skipped slot; its weight is 0.
"""

from leanmoe.routing.batch_rules import ALONE, BatchScope
from leanmoe.routing.route import (
    Routing,
    count_distinct,
    count_distinct_by_rank,
    count_slots,
    route,
    route_rows,
)
from leanmoe.routing.rule_table import RowRule, RuleTable
from leanmoe.routing.scores import Scores, check_logits, score

__all__ = [
    "ALONE",
    "BatchScope",
    "Routing",
    "RowRule",
    "RuleTable",
    "Scores",
    "check_logits",
    "count_distinct",
    "count_distinct_by_rank",
    "count_slots",
    "route",
    "route_rows",
    "score",
]
