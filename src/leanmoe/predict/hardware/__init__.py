"""GPUs, what they reach of their stated rates, and what they tell each other."""
