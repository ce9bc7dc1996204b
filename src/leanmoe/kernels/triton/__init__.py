"""How experts are chosen and computed on a GPU: Triton programs, checked launchers, public ops.

`*_program.py` files hold the programs and need Triton; each has a launcher beside it that checks
its arguments, and a torch reference that tests compare it with, in Triton's interpreter where
there is no GPU.
"""
