"""How routers turn logits into experts and weights, and how a config.json decides it.

Needs no torch. Follows the router classes of Transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from leanmoe.models.hf_config import HfConfig

Scoring = Literal["softmax", "sigmoid", "softmax_after_top_k", "sqrtsoftplus"]
SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid", "softmax_after_top_k", "sqrtsoftplus")
"""By the number that kernels know each as."""
GroupScore = Literal["max", "top2_sum"]
ScoreDtype = Literal["float32", "logits"]


@dataclass(frozen=True)
class Router:
    """How a router ranks experts and weighs the ones it picked.

    A family's router casts its weights to the dtype it returns at the very end; that dtype is
    the model's, not the table's, business.
    """

    scoring: Scoring = "softmax"
    """softmax over all experts; sigmoid of each; softmax over the picked logits alone; or the
    square root of each one's softplus, ln(1 + e^x) (DeepSeek-V4)."""
    ranking_bias: str | None = None
    """Name of the module's bias that is added to the scores for ranking, never for weighting."""
    normalise: bool = False
    """Whether the picked gates are divided by their sum (`norm_topk_prob`)."""
    normalise_epsilon: float = 0.0
    """Added to that sum before dividing, as the family does it."""
    scaling: float = 1.0
    """Factor on the gate weights, after normalising (`routed_scaling_factor`)."""
    groups: int = 1
    """Groups the experts are divided into for group-limited routing; 1 for none."""
    groups_used: int = 1
    """Groups a token may pick experts from."""
    group_score: GroupScore = "top2_sum"
    """How a group is ranked: by its best expert (V2) or by the sum of its best two (V3)."""
    sorted_top_k: bool = True
    """Whether the family sorts what it picks; an order of summation differs in the last bit."""
    score_dtype: ScoreDtype = "float32"
    """Whether scores are computed in float32 or in whatever dtype the logits have."""
    logits_module: str | None = None
    """The router's part that makes the logits, where its forward returns something else."""
    expert_scale: str | None = None
    """Name of the module's factor [E] on the weight of each expert, after normalising."""
    zero_experts: int = 0
    """How many of the last experts are the identity: they compute nothing and have no weights."""

    @property
    def normalises(self) -> bool:
        """Whether what an expert weighs depends on which others are picked beside it."""
        return self.normalise or self.scoring == "softmax_after_top_k"

    @property
    def limits_groups(self) -> bool:
        """Whether a token may use the experts of some groups only."""
        return self.groups_used < self.groups


def routing(
    base: Router, normalise: str | None = None, scaling: str | None = None, groups: bool = False
) -> Callable[[HfConfig], Router]:
    """`base`, with what the config decides: keys of the flag and the factor, and groups."""

    def router(settings: HfConfig) -> Router:
        router = base
        if normalise is not None:
            router = replace(router, normalise=settings.flag(normalise))
        if scaling is not None:
            router = replace(router, scaling=settings.number(scaling, 1.0))
        if groups:
            router = replace(
                router,
                groups=settings.whole("n_group", 1, least=1),
                groups_used=settings.whole("topk_group", 1, least=1),
            )
        return router if router.normalise else replace(router, normalise_epsilon=0.0)

    return router


def deepseek_v2(settings: HfConfig) -> Router:
    """Softmax, never normalised; groups only with `topk_method` "group_limited_greedy"."""
    methods = ("greedy", "group_limited_greedy")
    limited = settings.word("topk_method", "greedy", methods) == "group_limited_greedy"
    base = Router(group_score="max", sorted_top_k=False)
    return routing(base, scaling="routed_scaling_factor", groups=limited)(settings)


def lfm2(settings: HfConfig) -> Router:
    """Sigmoid in the model's own dtype, the bias held by the block around the router."""
    bias = "expert_bias" if settings.flag("use_expert_bias") else None
    base = Router("sigmoid", bias, normalise_epsilon=1e-6, score_dtype="logits")
    return routing(base, "norm_topk_prob", "routed_scaling_factor")(settings)


def cohere(settings: HfConfig) -> Router:
    """Either of two functions, applied to the logits that were picked."""
    function = settings.word("expert_selection_fn", "softmax", ("softmax", "sigmoid"))
    if function == "softmax":
        return Router("softmax_after_top_k")
    return routing(Router("sigmoid", score_dtype="logits"), "norm_topk_prob")(settings)


def bailing(settings: HfConfig) -> Router:
    """Ling 2's is DeepSeek-V3's; before it, softmax."""
    function = settings.word("score_function", "softmax", ("softmax", "sigmoid"))
    if function == "softmax":
        return SOFTMAX(settings)
    return replace(DEEPSEEK_V3(settings), ranking_bias="expert_bias")


def longcat(settings: HfConfig) -> Router:
    """Softmax over experts and identities, of which a bias picks (arXiv 2509.01322, section 2)."""
    zero = settings.whole("zero_expert_num", 0)
    base = Router(ranking_bias=BIAS, sorted_top_k=False, zero_experts=zero)
    return routing(base, scaling="routed_scaling_factor")(settings)


BIAS = "e_score_correction_bias"
SOFTMAX = routing(Router(), "norm_topk_prob")
SOFTMAX_NORMALISED = routing(Router(normalise=True))
SOFTMAX_AFTER_TOP_K = routing(Router("softmax_after_top_k", score_dtype="logits"))
SIGMOID = Router("sigmoid", BIAS, normalise_epsilon=1e-20, sorted_top_k=False)
SQRT_SOFTPLUS = Router("sqrtsoftplus", BIAS, True, 1e-20, sorted_top_k=False, score_dtype="logits")
GEMMA4 = routing(Router(normalise=True, logits_module="proj", expert_scale="per_expert_scale"))
SIGMOID_NORMALISED = Router("sigmoid", BIAS, normalise=True)
DEEPSEEK_V3 = routing(SIGMOID, "norm_topk_prob", "routed_scaling_factor", groups=True)
