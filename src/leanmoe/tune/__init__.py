"""The search: candidate rules, what each costs and saves, and the plans made of them.

Letters: L MoE layers, B requests that decode together, E experts, k experts a token.
"""
