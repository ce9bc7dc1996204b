"""Paired differences, fixed sequences and ratios of runs: NumPy, no torch."""
