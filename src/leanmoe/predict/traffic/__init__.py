"""Throughput and latency of a service from the times of its steps, and deployments compared."""
