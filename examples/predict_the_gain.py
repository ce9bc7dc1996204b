"""What would fewer experts gain on a machine that is not here?

    python examples/predict_the_gain.py

Predicts DeepSeek-V3 on eight H200, the full model beside two ways to choose fewer experts, and says
what the figures stand on. Nothing is downloaded, no GPU is needed.
"""

from __future__ import annotations

from leanmoe import Plan
from leanmoe.models.catalog import published_shape
from leanmoe.plan import Rule
from leanmoe.predict.hardware.gpus import read_gpu
from leanmoe.predict.prediction import predict
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths

model = published_shape("deepseek-ai/DeepSeek-V3")
machine = Deployment(read_gpu("h200"), tensor=8)
tokens = read_lengths("1024", "length")
rules = {"k = 6 for all": Rule(top_k=6), "4 guaranteed, shared": Rule(guaranteed=4)}

print(f"{model.name} on {machine}: output tokens/s and what a plan gains (modelled)")
for at_once in (1, 8, 32, 128):
    load = ServiceLoadModel(tokens, tokens, at_once)
    cells = []
    for name, rule in rules.items():
        plan = Plan.uniform(model.fingerprint(), rule)
        found = predict(model, plan, machine, load)
        assert found.gain is not None
        cells.append(f"{name} {100 * (found.gain - 1):+.1f}%")
    print(f"{at_once:4d} at once: {found.full.throughput:6.0f} tok/s   " + "   ".join(cells))
print("\nIt stands on:")
for part, words in found.stands_on.items():
    print(f"  {part}: {words}")
