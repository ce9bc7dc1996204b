"""How experts are chosen and computed on a CPU: programs compiled by Numba, and their launchers."""
