"""Every method by name, on the same budget of active or distinct experts."""

from leanmoe.tune.strategies.registry import (
    STRATEGIES,
    Budget,
    Kind,
    Setting,
    Strategy,
    strategy,
)

__all__ = ["STRATEGIES", "Budget", "Kind", "Setting", "Strategy", "strategy"]
