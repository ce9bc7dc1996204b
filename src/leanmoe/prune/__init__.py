"""Fewer experts in total: which ones matter least, and checkpoints without them.

`criteria` watches the experts on text, ranks them and says which remain; `tensor_names` tells a
checkpoint's expert tensors from its others, and `checkpoint` writes it without them.
"""

from leanmoe.core.options import make_callable

make_callable(__name__)
