"""What a plan costs: next-token loss and divergence per document, and paired statistics on them.

`windows` cuts documents into windows of tokens, `forward` runs a model over them, `divergence`
compares a plan with the full model, `paired` says with which confidence a plan is good enough.
`documents` and `paired` need no torch.
"""
