"""How each model family's router turns logits into experts and weights: written down once.

Only what truly differs per family stands here; the sizes come from config.json (`shape.py`).
Needs no torch.
"""
