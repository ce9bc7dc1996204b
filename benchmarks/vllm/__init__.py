"""vLLM under plans on GPUs: decode steps beside stock, routing replayed, in turn."""
