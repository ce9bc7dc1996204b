"""Leave out a quarter of the experts, and skip more of the rest under a plan, in Transformers.

python examples/apply_a_plan.py
"""

from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import leanmoe
from leanmoe import Plan, Rule

with TemporaryDirectory() as name:
    pruned = leanmoe.prune("reference", output=f"{name}/pruned", keep="75%", tokens=2048)
    model = AutoModelForCausalLM.from_pretrained(pruned.output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pruned.output)
    # Tokens that decode use six of eight experts, which weigh what they weigh beside all eight.
    plan = Plan.uniform(str(pruned.output), Rule(top_k=6, renormalise=0.0))

inputs = tokenizer("A dictionary maps keys to", return_tensors="pt")
inputs.pop("token_type_ids", None)
with leanmoe.apply(model, plan, experts="leanmoe", count=True) as applied, torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)

print(tokenizer.decode(output[0]))
print(f"experts run by: {applied.implementation}")
print("experts a new token used:", [counts.slots_per_token for counts in applied.generated])
