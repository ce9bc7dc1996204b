"""A plan in the engines that people serve with: thin adapters over `routing` and `kernels`.

Nothing imports this but the command line, and the engines themselves through their plugin groups.
"""
