"""Prove what a plan costs: next-token loss, paired by document, with an interval.

python examples/what_does_a_plan_cost.py
"""

from leanmoe import Plan, Rule, apply
from leanmoe.core.text import read_corpus
from leanmoe.runtime import load_model, shape_of
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import cut
from leanmoe.stats.paired import non_inferior

model, tokenizer = load_model("reference")
documents = read_corpus().documents  # what every Python brings along; or read_corpus("my.txt")
windows = cut(documents, tokenizer, tokens=20_000)

fingerprint = shape_of(model).fingerprint()
full = losses(model, windows, "Full model")
for keep in (False, True):
    plan = Plan.uniform(fingerprint, Rule(top_k=6, keep_weights=keep))
    with apply(model, plan, experts="leanmoe"):
        fewer = losses(model, windows, "k = 6")
    verdict = non_inferior(full, fewer, margin=0.01)
    loss = verdict.loss
    print(f"k = 6 of 8, {'weights kept' if keep else 'weights normalised anew'}:")
    print(f"  loss {100 * loss.ratio:+.2f}%, at most {100 * loss.upper_bound:+.2f}% (95%)")
    print(f"  within 1%: {verdict.accepted} ({verdict.reason})")
