"""What a model's router does on real text, measured once and saved.

`measure` runs the model, `statistics` counts per chunk of tokens, `saved` is the result on disk
(no torch), `replay` routes its sample of router logits again under any rule.
"""
