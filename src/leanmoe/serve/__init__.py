"""A plan in the engines that people serve with: thin adapters over `routing` and `kernels`.

`eval` and the command line import it; the engines find it through their plugin groups.
"""
