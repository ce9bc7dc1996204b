"""What pruned experts cost and gain, by criterion, beside fewer experts a token."""
