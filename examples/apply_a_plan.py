"""Run the reference model under a plan written by hand, and see what the plan did.

python examples/apply_a_plan.py
"""

import torch

import leanmoe
from leanmoe import Plan, Rule
from leanmoe.runtime import load_model, shape_of

model, tokenizer = load_model("reference")
fingerprint = shape_of(model).fingerprint()

# Tokens that decode use six of eight experts, which weigh what they weigh beside all eight.
# Prompt tokens, whose own prediction nobody reads, use three.
fewer = Plan.uniform(fingerprint, Rule(top_k=6, keep_weights=True))
plan = Plan(fingerprint, fewer.bands, (Rule(top_k=3, keep_weights=True),) * fingerprint.moe_layers)

inputs = tokenizer("A dictionary maps keys to", return_tensors="pt")
inputs.pop("token_type_ids", None)
with leanmoe.apply(model, plan, experts="leanmoe", count=True) as applied, torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)

print(tokenizer.decode(output[0]))
print(f"experts run by: {applied.implementation}")
print("experts a prompt token used:", [counts.slots_per_token for counts in applied.prompt])
print("experts a new token used:   ", [counts.slots_per_token for counts in applied.generated])
