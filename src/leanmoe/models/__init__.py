"""What a model is, read from its config.json alone. Needs no torch."""
