"""What is measured and how: a package a subject, run as `python -m benchmarks.<subject>.<file>`."""
