"""What fewer experts would gain on hardware one does not have. Needs no torch without budgets.

`hardware`: GPUs, and what they tell each other. `kernels`: how long a MoE layer's experts take.
`experts`: how many experts a step activates. `step`: how long a whole forward step takes.
`traffic`: throughput and latency of a service, and deployments compared. `prediction` joins them
for one deployment.
"""

from leanmoe.core.options import make_callable

make_callable(__name__)
