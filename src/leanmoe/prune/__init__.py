"""Fewer experts in total: which ones matter least, and checkpoints without them.

`statistics` watches the experts on text, `criteria` ranks them, `choose` says which remain,
`names` tells a checkpoint's expert tensors from its others, `checkpoint` writes it without them.
"""
