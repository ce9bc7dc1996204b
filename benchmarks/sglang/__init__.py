"""SGLang under plans on one GPU: tokens, padding and times."""
