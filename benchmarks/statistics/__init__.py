"""How often the statistics of the proof are wrong, simulated."""
