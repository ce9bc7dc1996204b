"""What a plan gains: service load measured in process, full model and plans interleaved."""

from leanmoe.load.measure import Comparison, Variant, compare
from leanmoe.load.metrics import Load, Measurement, Ratio, Timeline

__all__ = ["Comparison", "Load", "Measurement", "Ratio", "Timeline", "Variant", "compare"]
