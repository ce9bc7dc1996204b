"""The search: candidate rules, what each costs and saves, and the plans made of them.

Letters: L MoE layers, B requests that decode together, E experts, k experts a token.
"""

from leanmoe.core.options import make_callable

make_callable(__name__)
