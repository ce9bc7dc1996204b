"""The one artefact: what a model may activate. Needs no torch.

`plan` says it for all layers, loads and levels, `proof` what a level was accepted by, `placement`
which rank holds which expert; `named_plans` reads several plans for a comparison.
"""

from leanmoe.models.shape import Fingerprint
from leanmoe.plan.plan import Band, Level, Plan, Rule
from leanmoe.plan.proof import KindProof, LevelProof

__all__ = ["Band", "Fingerprint", "KindProof", "Level", "LevelProof", "Plan", "Rule"]
