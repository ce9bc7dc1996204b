"""What a plan gains: service load on the full model and on plans, interleaved."""

from leanmoe.core.options import make_callable

make_callable(__name__)
