"""The one artefact: what a model may activate. Needs no torch.

`plan` says it for all layers, loads and levels, `placement` which rank holds which expert;
`named_plans` reads several plans for a comparison. What a level was accepted by is in `core.proof`.
"""

from leanmoe.core.proof import KindProof, LevelProof
from leanmoe.models.shape import Fingerprint
from leanmoe.plan.plan import Band, Level, Plan, Rule

__all__ = ["Band", "Fingerprint", "KindProof", "Level", "LevelProof", "Plan", "Rule"]
