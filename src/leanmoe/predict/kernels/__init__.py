"""How long a MoE layer's experts take in one kernel on one GPU: features, constants, tables."""
