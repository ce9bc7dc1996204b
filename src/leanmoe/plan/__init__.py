"""The one artefact: what a model may activate. Needs no torch.

`rule` says it for one layer, `plan` for all layers and loads, `placement` which rank holds which
expert; `named_plans` reads several plans for a comparison.
"""

from leanmoe.models.shape import Fingerprint
from leanmoe.plan.plan import Band, Plan, Rule

__all__ = ["Band", "Fingerprint", "Plan", "Rule"]
